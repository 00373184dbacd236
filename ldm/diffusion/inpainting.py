"""Keeping a part of a picture: a denoiser in, a denoiser out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm.diffusion.levels import Denoise, Level, Prediction

if TYPE_CHECKING:
    from torch import Tensor


def keep_known(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """A denoiser that knows the picture where `mask` is 0, predicts it where that is 1, and blends in between.

    known: clean latents (b, 4, h, w); mask (1, 1, h, w) in [0, 1]. Where x0 is known, so is the noise that is in x, and
    every sampler follows the known picture from level to level, whatever its steps and noise. (RePaint, Lugmayr et al.
    2022, arXiv:2201.09865, puts fresh noise on it at each step, which samplers with a memory do not bear.)
    """

    def masked(x: Tensor, level: Level) -> Prediction:
        x0 = known + mask * (denoise(x, level).x0 - known)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    return masked
