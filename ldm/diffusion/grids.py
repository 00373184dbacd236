"""Which noise levels a sampler visits: spaced in timesteps, or in the ratio of noise to signal."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate

from ldm.diffusion.levels import Level
from ldm.diffusion.schedule import NoiseSchedule, linspace

# --- in timesteps -----------------------------------------------------------------------------------------------------


def uniform_timesteps(total: int, steps: int) -> Sequence[float]:
    """The reference's DDIM grid: every (total // steps)-th timestep, plus one. Its length may exceed `steps`."""
    return [t + 1 for t in range(0, total, total // steps)][::-1]


def quad_timesteps(total: int, steps: int) -> Sequence[float]:
    """The reference's quadratic DDIM grid, dense near the clean end: squares up to 0.8 · total, plus one."""
    return [int(root * root) + 1 for root in linspace(0.0, math.sqrt(0.8 * total), steps)][::-1]


def linspace_timesteps(total: int, steps: int) -> Sequence[float]:
    """From total - 1 to 0 in equal strides, rounded: the respacing of improved DDPM (arXiv:2102.09672, section 4).

    Strides are added up, as its published code does; multiplying would round a tie the other way now and then.
    """
    stride = (total - 1) / max(steps - 1, 1)
    return [round(t) for t in accumulate([0.0] + [stride] * (steps - 1))][::-1]


def leading_timesteps(total: int, steps: int) -> Sequence[float]:
    """diffusers' `leading` with an offset of 1: as the reference's, but never more than `steps`."""
    return [i * (total // steps) + 1 for i in range(steps)][::-1]


def trailing_timesteps(total: int, steps: int) -> Sequence[float]:
    """From the last one down in equal strides, rounded (Lin et al. 2024, arXiv:2305.08891, table 2)."""
    return [round(total - i * total / steps) - 1 for i in range(steps)]


def normal_timesteps(total: int, steps: int) -> Sequence[float]:
    """From total - 1 to 0 in equal strides: k-diffusion's own."""
    return linspace(total - 1, 0, steps)


def sgm_uniform_timesteps(total: int, steps: int) -> Sequence[float]:
    """From total - 1 towards 0 in equal strides, without 0: Stability AI's generative-models."""
    return linspace(total - 1, 0, steps + 1)[:-1]


def simple_timesteps(total: int, steps: int) -> Sequence[float]:
    """ComfyUI's `simple`: every (total / steps)-th timestep from the last one, rounded."""
    return [total - 1 - int(i * total / steps) for i in range(steps)]


def lcm_timesteps(total: int, steps: int, trained: int = 50) -> Sequence[float]:
    """A choice among the timesteps that latent consistency models were distilled at (arXiv:2310.04378)."""
    known = [(i + 1) * (total // trained) - 1 for i in reversed(range(trained))]
    return [known[min(i * len(known) // steps, len(known) - 1)] for i in range(steps)]


# --- in the ratio of noise to signal ----------------------------------------------------------------------------------


def karras_ratios(steps: int, low: float, high: float, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, arXiv:2206.00364, equation 5: equal strides in the ρ-th root."""
    return [root**rho for root in linspace(high ** (1 / rho), low ** (1 / rho), steps)]


def exponential_ratios(steps: int, low: float, high: float, rho: float = 1.0) -> list[float]:
    """Equal strides in the logarithm; with another ρ, k-diffusion's polyexponential: denser near the clean end."""
    return [low * (high / low) ** ramp**rho for ramp in linspace(1.0, 0.0, steps)]


def kl_optimal_ratios(steps: int, low: float, high: float) -> list[float]:
    """Sabour et al. 2024, arXiv:2404.14507, equation 15: equal strides in the arc tangent."""
    return [math.tan(angle) for angle in linspace(math.atan(high), math.atan(low), steps)]


def beta_ratios(steps: int, low: float, high: float, shape: float = 0.6) -> list[float]:
    """Lee et al. 2024, arXiv:2407.12173: quantiles of a beta distribution, dense at both ends."""
    return [low + (high - low) * beta_quantile(p, shape) for p in linspace(1.0, 0.0, steps)]


def ays_ratios(steps: int, low: float, high: float) -> list[float]:
    """Align Your Steps (arXiv:2404.14507): published for Stable Diffusion 1.5, their logarithm interpolated."""
    knots = [math.log(ratio) for ratio in ALIGN_YOUR_STEPS]
    ratios = []
    for place in linspace(0, len(knots) - 1, steps):
        i = min(int(place), len(knots) - 2)
        ratios.append(math.exp(knots[i] + (place - i) * (knots[i + 1] - knots[i])))
    return ratios


# https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html
ALIGN_YOUR_STEPS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def beta_quantile(p: float, shape: float) -> float:
    """The x below which a share p of the symmetric beta distribution lies."""
    below = _beta_distribution(shape)
    target = p * below[-1]
    i = min(bisect_right(below, target), len(below) - 1)
    place = i - 1 + (target - below[i - 1]) / (below[i] - below[i - 1])
    return math.sin(place / (len(below) - 1) * math.pi / 2) ** 2


@cache
def _beta_distribution(shape: float, pieces: int = 20_000) -> list[float]:
    """Its cumulated density, not normalised, at equal strides of the angle a with x = sin²(a), by the midpoint rule."""
    angles = ((i + 0.5) / pieces * math.pi / 2 for i in range(pieces))
    return list(accumulate(((math.sin(a) * math.cos(a)) ** (2 * shape - 1) for a in angles), initial=0.0))


# --- as people know them by name --------------------------------------------------------------------------------------


def _timesteps(spacing: Callable[[int, int], Sequence[float]], schedule: NoiseSchedule, steps: int) -> list[Level]:
    total = schedule.config.timesteps
    return [schedule.level_at(min(t, total - 1)) for t in spacing(total, steps)]


def _ratios(spacing: Callable[[int, float, float], list[float]], schedule: NoiseSchedule, steps: int) -> list[Level]:
    return [schedule.level_of_ratio(ratio) for ratio in spacing(steps, schedule.ratios[0], schedule.ratios[-1])]


@dataclass(frozen=True)
class Grid:
    label: str  # how AUTOMATIC1111 spells it, where it has it
    levels: Callable[[NoiseSchedule, int], list[Level]]  # of a number of steps, noisiest first


GRIDS: dict[str, Grid] = {
    "uniform": Grid("DDIM Uniform", partial(_timesteps, uniform_timesteps)),
    "quad": Grid("Quad", partial(_timesteps, quad_timesteps)),
    "linspace": Grid("Linspace", partial(_timesteps, linspace_timesteps)),
    "leading": Grid("Leading", partial(_timesteps, leading_timesteps)),
    "trailing": Grid("Trailing", partial(_timesteps, trailing_timesteps)),
    "normal": Grid("Normal", partial(_timesteps, normal_timesteps)),
    "simple": Grid("Simple", partial(_timesteps, simple_timesteps)),
    "sgm_uniform": Grid("SGM Uniform", partial(_timesteps, sgm_uniform_timesteps)),
    "lcm": Grid("LCM", partial(_timesteps, lcm_timesteps)),
    "karras": Grid("Karras", partial(_ratios, karras_ratios)),
    "exponential": Grid("Exponential", partial(_ratios, exponential_ratios)),
    "polyexponential": Grid("Polyexponential", partial(_ratios, exponential_ratios)),  # whose ρ is 1 everywhere
    "kl_optimal": Grid("KL Optimal", partial(_ratios, kl_optimal_ratios)),
    "beta": Grid("Beta", partial(_ratios, beta_ratios)),
    "ays": Grid("Align Your Steps", partial(_ratios, ays_ratios)),
}


def fold(name: str) -> str:
    """A name as everybody would spell it."""
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def find_grid(name: str) -> str | None:
    """A row of GRIDS, by its name or AUTOMATIC1111's in any spelling; None for "Automatic". Raises ValueError."""
    spellings = {spelling: grid for grid, row in GRIDS.items() for spelling in (fold(row.label), fold(grid))}
    if fold(name) == "automatic":
        return None
    if fold(name) not in spellings:
        raise ValueError(f"schedule is {name!r:.100}: use one of {', '.join(GRIDS)}")
    return spellings[fold(name)]


def visit(schedule: NoiseSchedule, grid: str, steps: int) -> list[Level]:
    """The levels at which a sampler evaluates the network, noisiest first. Timesteps past the last are clipped to it.

    Raises ValueError for an unknown grid, or for a number of steps outside 1 … schedule.config.timesteps.
    """
    if grid not in GRIDS:
        raise ValueError(f"schedule is {grid!r}: use one of {', '.join(GRIDS)}")
    if not 1 <= steps <= schedule.config.timesteps:
        raise ValueError(f"steps is {steps}: use 1 to {schedule.config.timesteps}")
    return GRIDS[grid].levels(schedule, steps)
