"""Classifier-free guidance and what people add to it. Every function makes one prediction of several.

Predictions are linear in a network's output, so what holds for eps holds for x0 and v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.diffusion.levels import Level, Prediction
from ldm.diffusion.prediction import PREDICTION_TYPES

if TYPE_CHECKING:
    from torch import Tensor


def guide(uncond: Prediction, conds: Sequence[Prediction], weights: Sequence[float], scale: float) -> Prediction:
    """uncond + scale · Σ weight · (cond - uncond): Ho & Salimans 2022, arXiv:2207.12598, of one prompt.

    Of several it is their composition (Liu et al. 2022, arXiv:2206.01714).
    """

    def mix(u: Tensor, *cs: Tensor) -> Tensor:
        first, *rest = (weight * (c - u) for weight, c in zip(weights, cs, strict=True))
        return u + scale * sum(rest, start=first)

    return Prediction(*(mix(*forms) for forms in zip(uncond, *conds, strict=True)))


def guide_edit(
    nothing: Prediction, image: Prediction, both: Prediction, *, scale: float, image_scale: float
) -> Prediction:
    """Guidance by an image and by a prompt: InstructPix2Pix, Brooks et al. 2023, arXiv:2211.09800, equation 3."""
    return Prediction(
        *(n + image_scale * (i - n) + scale * (b - i) for n, i, b in zip(nothing, image, both, strict=True))
    )


def rescale(
    guided: Prediction, plain: Prediction, share: float, x: Tensor, level: Level, prediction_type: str
) -> Prediction:
    """Give a part of the network's guided output the deviation that it has without guidance, image by image.

    Lin et al. 2024, arXiv:2305.08891, equations 15 and 16; `plain` is the prediction at guidance scale 1.
    """
    outputs = [
        p.eps if prediction_type == "epsilon" else level.alpha * p.eps - level.sigma * p.x0 for p in (guided, plain)
    ]
    deviations = [output.std(dim=(1, 2, 3), keepdim=True) for output in outputs]
    output = outputs[0] * (1 - share + share * deviations[1] / deviations[0])
    return PREDICTION_TYPES[prediction_type](output, x, level)


def threshold(guided: Prediction, plain: Prediction, share: float, x: Tensor, level: Level) -> Prediction:
    """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3), image by image.

    Values of x0 beyond the given quantile are clipped, and all are scaled so that the quantile is that of `plain`, the
    prediction at guidance scale 1: latents have no fixed range, which in the paper is that of pixels.
    """
    reached, usual = (_quantile(prediction.x0.abs(), share) for prediction in (guided, plain))
    limit = reached.maximum(usual)
    x0 = guided.x0.clamp(-limit, limit) * (usual / limit)
    return Prediction(x0, (x - level.alpha * x0) / level.sigma)


def _quantile(values: Tensor, share: float) -> Tensor:
    """Of each image, (b, 1, 1, 1); by sorting, because torch.quantile refuses large pictures."""
    ordered = values.flatten(1).sort(dim=1).values
    return ordered[:, round(share * (ordered.shape[1] - 1))].view(-1, 1, 1, 1)
