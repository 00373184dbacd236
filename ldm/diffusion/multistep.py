"""Samplers with a memory: each step uses what was predicted at those before, so that one evaluation makes it accurate.

The history is a local variable of a generator: nothing is left over from another picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ldm.diffusion.levels import Denoise, Increment, Level, Step
from ldm.diffusion.prediction import from_epsilon
from ldm.diffusion.singlestep import along, move, towards

if TYPE_CHECKING:
    from torch import Tensor


def plms(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment) -> Iterator[Step]:
    """Liu et al. 2022, arXiv:2202.09778: DDIM steps along Adams-Bashforth averages of the last four predictions.

    The first step has no history: it averages the predictions at its two ends.
    """
    history: list[Tensor] = []  # predictions of eps, newest first
    for index, (level, after) in enumerate(pairwise(levels)):
        prediction = denoise(x, level)
        history = [prediction.eps, *history][:4]
        if len(history) > 1:
            average = _weighted(ADAMS_BASHFORTH[len(history)], history)
        elif after.sigma:
            average = (prediction.eps + denoise(move(prediction, after), after).eps) / 2
        else:  # a clean image has no noise to predict
            average = prediction.eps
        if level.alpha:  # otherwise nothing is known of x0 but what is predicted
            prediction = from_epsilon(average, x, level)
        x = move(prediction, after)
        yield Step(index, after, x, prediction.x0)


# Weights by the length of the history, the newest first; they add up to 1.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    first, *rest = (weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
    return sum(rest, start=first)


# The weights of past directions, given their levels (newest first) and the one to step to; they add up to 1.
Weights = Callable[[Sequence[Level], Level], Sequence[float]]


def linear_multistep(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment, *, weights: Weights, order: int
) -> Iterator[Step]:
    """Euler steps along weighted averages of the last directions."""
    history: list[tuple[Level, Tensor]] = []  # with predictions of eps, newest first
    for index, (level, after) in enumerate(pairwise(levels)):
        prediction = denoise(x, level)
        if level.alpha:
            history = [(level, prediction.eps), *history][:order]
            average = _weighted(weights([past for past, _ in history], after), [eps for _, eps in history])
            x = along(x, level, after, average)
        else:  # pure noise, which is infinitely far away
            x = move(prediction, after)
        yield Step(index, after, x, prediction.x0)


def ipndm_weights(past: Sequence[Level], after: Level) -> Sequence[float]:
    """Zhang & Chen 2022, arXiv:2204.13902, section 4: Adams-Bashforth as if all steps had one length."""
    return ADAMS_BASHFORTH[len(past)]


def lms_weights(past: Sequence[Level], after: Level) -> Sequence[float]:
    """Adams-Bashforth for steps of any length: the polynomial in the ratio through past directions, integrated."""
    return quadrature([level.ratio for level in past], _power_moments(past[0].ratio, after.ratio, len(past)))


def deis_weights(past: Sequence[Level], after: Level) -> Sequence[float]:
    """Zhang & Chen 2022, arXiv:2204.13902: with polynomials in the logarithm of the ratio; at the end Euler's."""
    if after.ratio == 0:
        return (1.0, *[0.0] * (len(past) - 1))
    return quadrature([-level.log_snr for level in past], _log_moments(past[0].ratio, after.ratio, len(past)))


def _power_moments(start: float, end: float, count: int) -> list[float]:
    """Means of s^k between two ratios, for k = 0 …"""
    return [(end ** (k + 1) - start ** (k + 1)) / (k + 1) / (end - start) for k in range(count)]


def _log_moments(start: float, end: float, count: int) -> list[float]:
    """Means of (log s)^k between two ratios, for k = 0 …, by parts: ∫ L^k ds = s L^k - k ∫ L^(k-1) ds."""

    def antiderivative(s: float, k: int) -> float:
        return s * math.log(s) ** k - (k * antiderivative(s, k - 1) if k else 0.0)

    return [(antiderivative(end, k) - antiderivative(start, k)) / (end - start) for k in range(count)]


def quadrature(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights w of the nodes u for which Σ w u^k is the k-th moment: the moments of their Lagrange polynomials."""
    weights = []
    for i, node in enumerate(nodes):
        coefficients = [1.0]  # of the product of (u - other) / (node - other), constant term first
        for other in (*nodes[:i], *nodes[i + 1 :]):
            shifted, scaled = [0.0, *coefficients], [*(-other * c for c in coefficients), 0.0]
            coefficients = [(a + b) / (node - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(sum(c * moment for c, moment in zip(coefficients, moments, strict=True)))
    return weights


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2); the step to a clean image is of first order."""
    before: tuple[Level, Tensor] | None = None
    for index, (level, after) in enumerate(pairwise(levels)):
        x0 = estimate = denoise(x, level).x0
        if before is not None and after.sigma:
            r = (level.log_snr - before[0].log_snr) / (after.log_snr - level.log_snr)
            estimate = x0 + (x0 - before[1]) / (2 * r)
        x = towards(x, level, after, estimate)
        yield Step(index, after, x, x0)
        before = level, x0


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment, *, eta: float = 1.0, second: str
) -> Iterator[Step]:
    """k-diffusion's stochastic DPM-Solver++(2M); the second order is that of the midpoint rule, or of Heun's."""
    before: tuple[Level, Tensor] | None = None
    for index, (level, after) in enumerate(pairwise(levels)):
        x0 = denoise(x, level).x0
        if after.sigma == 0:
            x = x0
        else:
            h = after.log_snr - level.log_snr
            faded = math.exp(-_times(eta, h))  # what the added noise leaves of the old one
            x = _sde_mean(x, level, after, x0, faded)
            if before is not None:
                slope = (x0 - before[1]) * (h / (level.log_snr - before[0].log_snr))
                x = x + after.alpha * SECOND_ORDER[second](_times(1 + eta, h)) * slope
            if eta:
                x = x + after.sigma * math.sqrt(1 - faded**2) * noise(level, after)
        yield Step(index, after, x, x0)
        before = level, x0


def dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment, *, eta: float = 1.0
) -> Iterator[Step]:
    """k-diffusion's stochastic DPM-Solver++ of third order, which divides differences of the last three predictions."""
    history: list[tuple[Level, Tensor]] = []  # newest first
    for index, (level, after) in enumerate(pairwise(levels)):
        x0 = denoise(x, level).x0
        history = [(level, x0), *history][:3]
        if after.sigma == 0:
            x = x0
        else:
            h = after.log_snr - level.log_snr
            faded = math.exp(-_times(eta, h))
            x = _sde_mean(x, level, after, x0, faded)
            h_eta = _times(1 + eta, h)
            slopes = [  # per step of length h
                (newer - older) * (h / (at.log_snr - past.log_snr)) for (at, newer), (past, older) in pairwise(history)
            ]
            if len(slopes) == 1:
                x = x + after.alpha * _phi_2(h_eta) * slopes[0]
            elif len(slopes) == 2:
                r0, r1 = ((at.log_snr - past.log_snr) / h for (at, _), (past, _) in pairwise(history))
                curvature = (slopes[0] - slopes[1]) / (r0 + r1)
                x = x + after.alpha * (
                    _phi_2(h_eta) * (slopes[0] + r0 * curvature) - (_phi_2(h_eta) / h_eta - 0.5) * curvature
                )
            if eta:
                x = x + after.sigma * math.sqrt(1 - faded**2) * noise(level, after)
        yield Step(index, after, x, x0)


def _times(factor: float, h: float) -> float:
    """Without NaN where h is infinite: the first step from pure noise."""
    return factor * h if factor else 0.0


def _sde_mean(x: Tensor, level: Level, after: Level, x0: Tensor, faded: float) -> Tensor:
    """The mean of the stochastic step of first order; `faded` is 1 in a deterministic one."""
    kept = faded * after.sigma / level.sigma
    return kept * x + (after.alpha - kept * level.alpha) * x0


def _phi_2(h: float) -> float:
    """(e^-h - 1) / h + 1, a coefficient of exponential integrators; 1 where h is infinite."""
    return math.expm1(-h) / h + 1


SECOND_ORDER: dict[str, Callable[[float], float]] = {
    "heun": _phi_2,
    "midpoint": lambda h: -0.5 * math.expm1(-h),
}


def unipc(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Increment, *, order: int, variant: str
) -> Iterator[Step]:
    """UniPC (Zhao et al. 2023, arXiv:2302.04867), multistep, predicting x0, of first order at both ends.

    The evaluation at a step's end, which the next step starts with, also corrects the step: `x` is one that will be.
    """
    steps = len(levels) - 1
    history: list[tuple[Level, Tensor]] = []  # with predictions of x0, newest first
    start = x
    for index, (level, after) in enumerate(pairwise(levels)):
        x0 = denoise(x, level).x0
        if history:
            x = _unipc_step(start, history, level, variant, corrected_by=x0)
        history = [(level, x0), *history][: min(order, steps - index)]
        start, x = x, _unipc_step(x, history, after, variant)
        yield Step(index, after, x, x0)
        if not level.alpha:  # pure noise is infinitely far away
            history = []


def _unipc_step(
    x: Tensor, history: Sequence[tuple[Level, Tensor]], after: Level, variant: str, corrected_by: Tensor | None = None
) -> Tensor:
    """From x at the newest level of the history to `after`; `corrected_by` is a prediction of x0 made there."""
    (level, newest), *older = history
    first_order = towards(x, level, after, newest)
    h = after.log_snr - level.log_snr
    nodes = [(past.log_snr - level.log_snr) / h for past, _ in older]
    differences = [(x0 - newest) / node for node, (_, x0) in zip(nodes, older, strict=True)]
    if corrected_by is not None:
        nodes, differences = [*nodes, 1.0], [*differences, corrected_by - newest]
    if not nodes:
        return first_order
    scale = UNIPC_SCALES[variant](-h)
    weights = (0.5,) if len(nodes) == 1 else quadrature(nodes, _unipc_moments(-h, scale, len(nodes)))
    return first_order - after.alpha * scale * _weighted(weights, differences)


def _unipc_moments(h: float, scale: float, count: int) -> list[float]:
    """k! · h · phi_(k+1)(h) / B(h) for k = 1 …: what the weighted differences must add up to."""
    moments, factorial, phi = [], 1, math.expm1(h) / h - 1
    for k in range(1, count + 1):
        moments.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    return moments


UNIPC_SCALES: dict[str, Callable[[float], float]] = {"bh1": lambda h: h, "bh2": math.expm1}  # B(h) of the paper
