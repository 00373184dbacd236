"""The vocabulary of sampling, in variance-preserving coordinates: x = alpha · x0 + sigma · eps, alpha² + sigma² = 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Level:
    """One noise level; `alpha` and `sigma` are Python floats computed in float64."""

    t: float  # training timestep, fractional on interpolated grids
    alpha: float
    sigma: float

    @classmethod
    def from_alpha_cumprod(cls, t: float, alpha_cumprod: float) -> Level:
        """`alpha_cumprod` is alpha², the share of signal in the variance (the ᾱ of DDPM)."""
        return cls(t, math.sqrt(alpha_cumprod), math.sqrt(1.0 - alpha_cumprod))

    @classmethod
    def from_ratio(cls, t: float, ratio: float) -> Level:
        """`ratio` is sigma / alpha."""
        alpha = 1 / math.sqrt(1 + ratio**2)
        return cls(t, alpha, ratio * alpha)

    @property
    def ratio(self) -> float:
        """sigma / alpha, which is the sigma of variance-exploding coordinates (Karras et al. 2022, k-diffusion)."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """log(alpha / sigma): the λ of DPM-Solver, half of the logarithm of the signal-to-noise ratio."""
        return -math.log(self.ratio) if 0 < self.ratio < math.inf else math.inf if self.alpha else -math.inf

    def add_noise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """A draw of q(x|x0) at this level (DDPM, arXiv:2006.11239, equation 4)."""
        return self.alpha * x0 + self.sigma * noise


class Prediction(NamedTuple):
    """A denoiser's answer, in both of its forms: x = alpha · x0 + sigma · eps holds between them."""

    x0: Tensor
    eps: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """A sampler's state after one step: `x` has reached `level`; `x0` is what it predicts the end to be."""

    index: int
    level: Level
    x: Tensor
    x0: Tensor


Denoise = Callable[["Tensor", Level], Prediction]
Noise = Callable[[], "Tensor"]  # a fresh standard normal tensor, shaped like the latents
Increment = Callable[[Level, Level], "Tensor"]  # the same, for a step between two levels: independent of others'
Sampler = Callable[[Denoise, "Tensor", Sequence[Level], Increment], Iterator[Step]]
