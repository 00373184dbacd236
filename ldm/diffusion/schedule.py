"""The forward process: the noise level of each timestep. In Python floats, so that importing costs nothing."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate, pairwise
from operator import mul
from typing import TYPE_CHECKING

from ldm.config import ScheduleConfig
from ldm.diffusion.levels import Level

if TYPE_CHECKING:
    from torch import Tensor

CLEAN = Level(t=0.0, alpha=1.0, sigma=0.0)  # a finished image


def linspace(start: float, end: float, count: int) -> list[float]:
    """As numpy's: `count` numbers from `start` to exactly `end`; `start` alone where one is asked for."""
    step = (end - start) / max(count - 1, 1)
    return [start + i * step for i in range(count - 1)] + [end if count > 1 else start]


def linear_betas(config: ScheduleConfig) -> list[float]:
    """Ho et al. 2020, arXiv:2006.11239."""
    return linspace(config.beta_start, config.beta_end, config.timesteps)


def scaled_linear_betas(config: ScheduleConfig) -> list[float]:
    """Linear in the square root of beta: latent diffusion's, and so Stable Diffusion's."""
    return [b * b for b in linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), config.timesteps)]


def cosine_betas(config: ScheduleConfig, offset: float = 0.008, max_beta: float = 0.999) -> list[float]:
    """Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17. `beta_start` and `beta_end` do not enter."""
    times = [i / config.timesteps for i in range(config.timesteps + 1)]
    alphas_cumprod = [math.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2 for time in times]
    return [min(1 - after / before, max_beta) for before, after in pairwise(alphas_cumprod)]


BETA_SCHEDULES: dict[str, Callable[[ScheduleConfig], list[float]]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
}


def _without_terminal_signal(alphas_cumprod: list[float]) -> list[float]:
    """Lin et al. 2024, arXiv:2305.08891, algorithm 1: shift and scale the roots, so that the last is 0."""
    roots = [math.sqrt(alpha_cumprod) for alpha_cumprod in alphas_cumprod]
    first, last = roots[0], roots[-1]
    return [((root - last) * first / (first - last)) ** 2 for root in roots]


class NoiseSchedule:
    """The noise level of each training timestep, from float64 betas.

    Raises ValueError for an unknown beta schedule, or one that does not go from some noise to nearly all of it.
    """

    def __init__(self, config: ScheduleConfig):
        if config.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule is {config.beta_schedule!r}: use one of {', '.join(BETA_SCHEDULES)}")
        self.config = config
        self.betas = BETA_SCHEDULES[config.beta_schedule](config)
        self._alphas_cumprod = list(accumulate((1.0 - beta for beta in self.betas), mul))
        if not 1e-12 < self._alphas_cumprod[-1] <= self._alphas_cumprod[0] < 1:
            raise ValueError(
                f"betas from {self.betas[0]} to {self.betas[-1]} leave {self._alphas_cumprod[-1]} of the signal at the "
                "end; it must be less than at the start, and more than 1e-12"
            )
        if config.zero_terminal_snr:
            if config.prediction_type == "epsilon":
                raise ValueError("zero-terminal SNR needs v_prediction: from noise alone, its epsilon tells nothing")
            self._alphas_cumprod = _without_terminal_signal(self._alphas_cumprod)
            self.betas = [1 - after / before for before, after in pairwise([1.0, *self._alphas_cumprod])]

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The share of signal in the variance at each timestep: float64, (timesteps,)."""
        import torch

        return torch.tensor(self._alphas_cumprod, dtype=torch.float64)

    def level(self, t: int) -> Level:
        """The level of a training timestep, 0 ≤ t < timesteps."""
        return Level.from_alpha_cumprod(float(t), self._alphas_cumprod[t])

    @cached_property
    def ratios(self) -> list[float]:
        """sigma / alpha at each timestep: k-diffusion's sigmas. Where no signal is left, 4096 as diffusers has it."""
        return [math.sqrt((1 - share) / share) for share in (max(a, 2.0**-24) for a in self._alphas_cumprod)]

    def level_at(self, t: float) -> Level:
        """The level of a timestep that may lie between two, the logarithm of whose ratios is interpolated."""
        below = int(t)
        if below == t:
            return self.level(below)
        first, second = self.ratios[below : below + 2]
        return Level.from_ratio(t, first * (second / first) ** (t - below))

    def level_of_ratio(self, ratio: float) -> Level:
        """The level of a ratio of noise to signal, for whose timestep the logarithm is interpolated, and clipped."""
        above = min(max(bisect_right(self.ratios, ratio), 1), len(self.ratios) - 1)
        first, second = self.ratios[above - 1 : above + 1]
        place = math.log(ratio / first) / math.log(second / first)
        return Level.from_ratio(above - 1 + min(max(place, 0.0), 1.0), ratio)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A draw of q(x_t|x0); each element of the batch has a timestep of its own, t (b,)."""
        alpha, sigma = self._coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What v-prediction is trained to predict (arXiv:2202.00512, appendix D); t (b,)."""
        alpha, sigma = self._coefficients(t, x0)
        return alpha * noise - sigma * x0

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at timesteps t (b,), shaped to broadcast over `like`."""
        alphas_cumprod = self.alphas_cumprod[t.cpu()].view(-1, *[1] * (like.ndim - 1))
        alpha, sigma = alphas_cumprod.sqrt().to(like.dtype), (1 - alphas_cumprod).sqrt().to(like.dtype)
        return alpha.to(like.device), sigma.to(like.device)  # after the dtype: not every device has float64
