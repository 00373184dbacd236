"""Samplers: generators over noise levels that know nothing of prompts, guidance, networks or progress bars.

Each takes a denoiser, the latents at the first level, the levels (noisiest first, the one to end at last) and a source
of noise, and yields a Step for each level it reaches. What people know by name is a row of SAMPLERS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from ldm.diffusion.levels import Denoise, Level, Noise, Prediction, Step
from ldm.diffusion.prediction import from_epsilon
from ldm.diffusion.schedule import CLEAN, NoiseSchedule, timesteps

if TYPE_CHECKING:
    from torch import Tensor


def ddim(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """Song et al. 2021, arXiv:2010.02502, equation 12. eta 0 is deterministic; eta 1 is DDPM's ancestral sampling."""
    for index, (level, after) in enumerate(pairwise(levels)):
        x0, eps = denoise(x, level)
        std = eta * posterior_std(level, after)
        x = after.alpha * x0 + math.sqrt(after.sigma**2 - std**2) * eps
        if std > 0:
            x = x + std * noise()
        yield Step(index, after, x, x0)


def posterior_std(level: Level, after: Level) -> float:
    """Standard deviation of q(x_after | x_level, x0): DDPM (arXiv:2006.11239), equation 7, between any two levels."""
    kept = level.alpha / after.alpha if after.alpha else 1.0  # both are pure noise
    return after.sigma / level.sigma * math.sqrt(1 - kept**2)


def plms(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Liu et al. 2022, arXiv:2202.09778: DDIM steps along Adams-Bashforth averages of the last four predictions.

    The first step has no history: it averages the predictions at its two ends.
    """
    history: list[Tensor] = []  # predictions of eps, newest first
    for index, (level, after) in enumerate(pairwise(levels)):
        eps = denoise(x, level).eps
        if history:
            newest, *older = ADAMS_BASHFORTH[len(history)]
            average = sum((weight * e for weight, e in zip(older, history, strict=True)), start=newest * eps)
        else:
            trial = _move(from_epsilon(eps, x, level), after)
            average = (eps + denoise(trial, after).eps) / 2
        prediction = from_epsilon(average, x, level)
        x = _move(prediction, after)
        yield Step(index, after, x, prediction.x0)
        history = [eps, *history][:3]


ADAMS_BASHFORTH = {  # by how many past predictions there are; the newest weight first
    1: (3 / 2, -1 / 2),
    2: (23 / 12, -16 / 12, 5 / 12),
    3: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _move(prediction: Prediction, after: Level) -> Tensor:
    """The deterministic DDIM step: the point at level `after` that has this prediction."""
    return after.add_noise(prediction.x0, prediction.eps)


@dataclass(frozen=True)
class Method:
    """A sampler as people know it by name."""

    label: str  # how other tools spell it
    sampler: Callable[..., Iterator[Step]]  # a Sampler, which may take eta too
    grid: str  # a row of schedule.GRIDS
    ends_clean: bool  # at a clean image; otherwise at training timestep 0, where the reference ends
    takes_eta: bool = False


SAMPLERS: dict[str, Method] = {
    "ddim": Method("DDIM", ddim, grid="uniform", ends_clean=False, takes_eta=True),
    "plms": Method("PLMS", plms, grid="uniform", ends_clean=False),
    "ddpm": Method("DDPM", partial(ddim, eta=1.0), grid="linspace", ends_clean=True),
}
NAMES = tuple(SAMPLERS)


def levels(name: str, schedule: NoiseSchedule, steps: int, grid: str | None = None) -> list[Level]:
    """The levels that sampler `name` visits, and the one it ends at: one more than the steps it takes.

    `grid` overrides the sampler's own (a name in schedule.GRIDS). Raises ValueError for what does not exist.
    """
    method = _method(name)
    visited = [schedule.level(t) for t in timesteps(schedule, grid or method.grid, steps)]
    return [*visited, CLEAN if method.ends_clean else schedule.level(0)]


def run(
    name: str, denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise, eta: float = 0.0
) -> Iterator[Step]:
    """Sampler `name` from latents `x` at `levels[0]` down to `levels[-1]`.

    Raises ValueError for an unknown name, an eta outside 0 … 1, or one the sampler has no use for.
    """
    method = _method(name)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: use 0 to 1")
    if method.takes_eta:
        return partial(method.sampler, eta=eta)(denoise, x, levels, noise)
    if eta:
        raise ValueError(f"eta is {eta}: {name} has none, leave it at 0")
    return method.sampler(denoise, x, levels, noise)


def sample(
    name: str,
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int,
    noise: Noise,
    eta: float = 0.0,
    grid: str | None = None,
) -> Iterator[Step]:
    """The steps of sampler `name` over all the `levels` of a schedule, from standard normal noise `x`.

    `denoise` maps (x, level) to a Prediction (prediction.denoiser makes one of a network); `noise` draws standard
    normal tensors shaped like `x`. Raises ValueError as `levels` and `run` do.
    """
    return run(name, denoise, x, levels(name, schedule, steps, grid), noise, eta)


def _method(name: str) -> Method:
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}: use one of {', '.join(NAMES)}")
    return SAMPLERS[name]
