"""The forward process and the grids of timesteps that samplers walk. Python floats, so that importing costs nothing."""

from __future__ import annotations

import math
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


def _linspace(start: float, end: float, count: int) -> list[float]:
    """As numpy's: `count` numbers from `start` to exactly `end`; `start` alone where one is asked for."""
    step = (end - start) / max(count - 1, 1)
    return [start + i * step for i in range(count - 1)] + [end if count > 1 else start]


def linear_betas(config: ScheduleConfig) -> list[float]:
    """Ho et al. 2020, arXiv:2006.11239."""
    return _linspace(config.beta_start, config.beta_end, config.timesteps)


def scaled_linear_betas(config: ScheduleConfig) -> list[float]:
    """Linear in the square root of beta: latent diffusion's, and so Stable Diffusion's."""
    return [b * b for b in _linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), config.timesteps)]


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


def uniform_timesteps(total: int, steps: int) -> list[int]:
    """The reference's DDIM grid: every (total // steps)-th timestep, plus one. Its length may exceed `steps`."""
    return [t + 1 for t in range(0, total, total // steps)]


def quad_timesteps(total: int, steps: int) -> list[int]:
    """The reference's quadratic DDIM grid, dense near the clean end: squares up to 0.8 · total, plus one."""
    return [int(root * root) + 1 for root in _linspace(0.0, math.sqrt(0.8 * total), steps)]


def linspace_timesteps(total: int, steps: int) -> list[int]:
    """From 0 to total - 1 in equal strides, rounded: the respacing of improved DDPM (arXiv:2102.09672, section 4).

    Strides are added up, as its published code does; multiplying would round a tie the other way now and then.
    """
    stride = (total - 1) / max(steps - 1, 1)
    return [round(t) for t in accumulate([0.0] + [stride] * (steps - 1))]


GRIDS: dict[str, Callable[[int, int], list[int]]] = {
    "uniform": uniform_timesteps,
    "quad": quad_timesteps,
    "linspace": linspace_timesteps,
}


def timesteps(schedule: NoiseSchedule, grid: str, steps: int) -> list[int]:
    """The training timesteps a sampler visits, noisiest first. An index past the schedule's last is clipped to it.

    Raises ValueError for an unknown grid, or for a number of steps outside 1 … schedule.config.timesteps.
    """
    total = schedule.config.timesteps
    if grid not in GRIDS:
        raise ValueError(f"grid is {grid!r}: use one of {', '.join(GRIDS)}")
    if not 1 <= steps <= total:
        raise ValueError(f"steps is {steps}: use 1 to {total}")
    return [min(t, total - 1) for t in reversed(GRIDS[grid](total, steps))]
