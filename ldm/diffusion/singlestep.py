"""Samplers without a memory: each step starts afresh from the point it is at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ldm.diffusion.grids import karras_ratios
from ldm.diffusion.levels import Denoise, Increment, Level, Prediction, Step
from ldm.diffusion.schedule import NoiseSchedule

if TYPE_CHECKING:
    from torch import Tensor


def move(prediction: Prediction, after: Level) -> Tensor:
    """The deterministic first-order step (DDIM, Euler): the point at level `after` that has this prediction."""
    return after.add_noise(prediction.x0, prediction.eps)


def along(x: Tensor, level: Level, after: Level, eps: Tensor) -> Tensor:
    """From `x` to `after` in a direction of its own: Euler's step of dy/ds = eps, where y = x / alpha, s = ratio."""
    return after.alpha * (x / level.alpha + (after.ratio - level.ratio) * eps)


def towards(x: Tensor, level: Level, after: Level, x0: Tensor) -> Tensor:
    """From `x` to `after`, x0 held constant: DPM-Solver++ of first order (Lu et al. 2022, arXiv:2211.01095)."""
    kept = after.sigma / level.sigma
    return kept * x + (after.alpha - kept * level.alpha) * x0


def posterior_std(level: Level, after: Level) -> float:
    """Standard deviation of q(x_after | x_level, x0): DDPM (arXiv:2006.11239), equation 7, between any two levels."""
    kept = level.alpha / after.alpha if after.alpha else 1.0  # both are pure noise
    return after.sigma / level.sigma * math.sqrt(1 - kept**2)


def ddim(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment, *, eta: float = 0.0) -> Iterator[Step]:
    """Song et al. 2021, arXiv:2010.02502, equation 12. eta 0 is deterministic; eta 1 is DDPM's ancestral sampling.

    In other coordinates, eta 0 is Euler's method and eta 1 the Euler ancestral of k-diffusion.
    """
    for index, (level, after) in enumerate(pairwise(levels)):
        x0, eps = denoise(x, level)
        std = eta * posterior_std(level, after)
        x = after.alpha * x0 + math.sqrt(after.sigma**2 - std**2) * eps
        if std > 0:
            x = x + std * noise(level, after)
        yield Step(index, after, x, x0)


def heun(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment) -> Iterator[Step]:
    """Karras et al. 2022, arXiv:2206.00364, algorithm 1: the average of the directions at both ends of a step."""
    for index, (level, after) in enumerate(pairwise(levels)):
        x, x0 = _heun_step(denoise, x, level, after)
        yield Step(index, after, x, x0)


def _heun_step(denoise: Denoise, x: Tensor, level: Level, after: Level) -> tuple[Tensor, Tensor]:
    """The point at `after`, and the x0 that was predicted; of first order at both ends of the schedule."""
    prediction = denoise(x, level)
    trial = move(prediction, after)
    if level.alpha and after.sigma:
        trial = along(x, level, after, (prediction.eps + denoise(trial, after).eps) / 2)
    return trial, prediction.x0


def restart(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment, *, schedule: NoiseSchedule
) -> Iterator[Step]:
    """Xu et al. 2023, arXiv:2306.14878: Heun's steps, of which a stretch near the end is run again from more noise."""
    index = 0
    for level, after in pairwise(_with_restarts(levels, schedule)):
        if after.ratio > level.ratio:
            std = math.sqrt(after.ratio**2 - level.ratio**2)
            x = after.alpha * (x / level.alpha + std * noise(level, after))
        else:
            x, x0 = _heun_step(denoise, x, level, after)
            yield Step(index, after, x, x0)
            index += 1


def _with_restarts(levels: Sequence[Level], schedule: NoiseSchedule) -> list[Level]:
    """As many steps as between the given levels, some of them spent on restarts from ratio 2 at ratio 0.1.

    How many, and on which grid, are AUTOMATIC1111's choice (modules/sd_samplers_extra.py).
    """
    steps, low, high = len(levels) - 1, levels[-2].ratio, levels[0].ratio
    if steps < 20 or high == math.inf:
        return list(levels)
    spent, times = (steps // 4, 2) if steps >= 36 else (9, 1)
    plain = [*karras_ratios(steps - spent * times, low, high), levels[-1].ratio]
    top, bottom = (min(range(len(plain)), key=lambda i: abs(plain[i] - ratio)) for ratio in (2.0, 0.1))
    again = karras_ratios(spent + 1, plain[bottom], plain[top]) if top < bottom else []
    path = [*plain[: bottom + 1], *again * times, *plain[bottom + 1 :]]
    return [schedule.level_of_ratio(ratio) if ratio else levels[-1] for ratio in path]


def _middle(level: Level, after: Level, schedule: NoiseSchedule) -> Level:
    """Half way in log-SNR."""
    return schedule.level_of_ratio(math.sqrt(level.ratio * after.ratio))


def _below(level: Level, after: Level, eta: float) -> tuple[Level, float]:
    """Where to step to, so that noise of the given standard deviation leads up to `after`: an ancestral step.

    The signal there is scaled as at `after`, with a part of its noise: alpha² + sigma² is less than 1.
    """
    std = min(eta * posterior_std(level, after), after.sigma)
    return Level(after.t, after.alpha, math.sqrt(after.sigma**2 - std**2)), std


def dpm_2(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment, *, eta: float = 0.0, schedule: NoiseSchedule
) -> Iterator[Step]:
    """DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927) as k-diffusion has it: the direction half way in log-SNR."""
    for index, (level, after) in enumerate(pairwise(levels)):
        prediction = denoise(x, level)
        below, std = _below(level, after, eta)
        if level.alpha and below.sigma:
            middle = _middle(level, below, schedule)
            x = along(x, level, below, denoise(move(prediction, middle), middle).eps)
        else:
            x = move(prediction, below)
        if std > 0:
            x = x + std * noise(level, after)
        yield Step(index, after, x, prediction.x0)


def dpmpp_2s(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment, *, eta: float = 1.0, schedule: NoiseSchedule
) -> Iterator[Step]:
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, algorithm 1), ancestral as k-diffusion has it."""
    for index, (level, after) in enumerate(pairwise(levels)):
        x0 = estimate = denoise(x, level).x0
        below, std = _below(level, after, eta)
        if level.alpha and below.sigma:
            middle = _middle(level, below, schedule)
            estimate = denoise(towards(x, level, middle, x0), middle).x0
        x = towards(x, level, below, estimate)
        if std > 0:
            x = x + std * noise(level, after)
        yield Step(index, after, x, x0)


def dpmpp_sde(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment, *, eta: float = 1.0, schedule: NoiseSchedule
) -> Iterator[Step]:
    """k-diffusion's stochastic DPM-Solver++: as 2S, but the way to the middle is ancestral too."""
    for index, (level, after) in enumerate(pairwise(levels)):
        x0 = estimate = denoise(x, level).x0
        if level.alpha and after.sigma:
            middle = _middle(level, after, schedule)
            below, std = _below(level, middle, eta)
            estimate = denoise(towards(x, level, below, x0) + std * noise(level, middle), middle).x0
        below, std = _below(level, after, eta)
        x = towards(x, level, below, estimate)
        if std > 0:
            x = x + std * noise(level, after)
        yield Step(index, after, x, x0)


def lcm(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment) -> Iterator[Step]:
    """Latent consistency models (Luo et al. 2023, arXiv:2310.04378): denoise to the end, add noise again."""
    for index, (level, after) in enumerate(pairwise(levels)):
        x0 = denoise(x, level).x0
        x = after.add_noise(x0, noise(level, after)) if after.sigma else x0
        yield Step(index, after, x, x0)


def tcd(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment, *, eta: float = 0.3, schedule: NoiseSchedule
) -> Iterator[Step]:
    """Trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159), whose gamma is eta.

    A deterministic step down to (1 - eta) of the next timestep, then noise up to it.
    """
    for index, (level, after) in enumerate(pairwise(levels)):
        prediction = denoise(x, level)
        below = schedule.level(int((1 - eta) * after.t)) if after.sigma else after
        x = move(prediction, below)
        if below.ratio < after.ratio:
            kept = after.alpha / below.alpha
            x = kept * x + math.sqrt(1 - kept**2) * noise(level, after)
        yield Step(index, after, x, prediction.x0)
