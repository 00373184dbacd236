"""What a network's output means: eps (DDPM, arXiv:2006.11239), v or x0 (Salimans & Ho 2022, arXiv:2202.00512)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ldm.diffusion.levels import Denoise, Level, Prediction

if TYPE_CHECKING:
    from torch import Tensor


def from_epsilon(output: Tensor, x: Tensor, level: Level) -> Prediction:
    return Prediction(x0=(x - level.sigma * output) / level.alpha, eps=output)


def from_v(output: Tensor, x: Tensor, level: Level) -> Prediction:
    return Prediction(
        x0=level.alpha * x - level.sigma * output,
        eps=level.sigma * x + level.alpha * output,
    )


def from_x0(output: Tensor, x: Tensor, level: Level) -> Prediction:
    return Prediction(x0=output, eps=(x - level.alpha * output) / level.sigma)


PREDICTION_TYPES: dict[str, Callable[[Tensor, Tensor, Level], Prediction]] = {
    "epsilon": from_epsilon,
    "v_prediction": from_v,
    "sample": from_x0,  # diffusers' name for x0
}


def denoiser(network: Callable[[Tensor, Level], Tensor], prediction_type: str) -> Denoise:
    """Wrap a network, (x, level) → output, into a denoiser. Raises ValueError for an unknown prediction type."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}: use one of {', '.join(PREDICTION_TYPES)}")
    predict = PREDICTION_TYPES[prediction_type]
    return lambda x, level: predict(network(x, level), x, level)
