"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): denoisers in, a denoiser out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm.diffusion.levels import Denoise, Level, Prediction

if TYPE_CHECKING:
    from torch import Tensor


def _extrapolate(uncond: Prediction, cond: Prediction, scale: float) -> Prediction:
    """uncond + scale · (cond - uncond), in x0 and eps alike: both are linear in the network's output."""
    return Prediction(*(u + scale * (c - u) for u, c in zip(uncond, cond, strict=True)))


def guide_batched(both: Denoise, scale: float) -> Denoise:
    """One evaluation a step. `both` takes a batch of twice the size: the unconditional half, then the conditional."""

    def guided(x: Tensor, level: Level) -> Prediction:
        (x0_uncond, x0_cond), (eps_uncond, eps_cond) = (t.chunk(2) for t in both(x.repeat(2, 1, 1, 1), level))
        return _extrapolate(Prediction(x0_uncond, eps_uncond), Prediction(x0_cond, eps_cond), scale)

    return guided


def guide_split(uncond: Denoise, cond: Denoise, scale: float) -> Denoise:
    """Two evaluations a step, for half the memory."""

    def guided(x: Tensor, level: Level) -> Prediction:
        return _extrapolate(uncond(x, level), cond(x, level), scale)

    return guided
