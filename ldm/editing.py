"""The picture side of inpainting and outpainting: masks, what lies under them, and pasting back. No networks.

Masks are "L" images of the picture's size: 255 is repainted, 0 is kept, values between are blended.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, ImageStat
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import RequestError
from ldm.images import load_image

log = logging.getLogger(__name__)

OVERLAP = 8  # pixels of a picture's edge that outpainting repaints, so that no seam shows: a latent pixel
FILL_BLURS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))  # radius, times laid over what the wider ones left

Box = tuple[int, int, int, int]  # left, top, right, bottom, the last two outside


def load_mask(source: str | Path | Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask stretched to size (width, height): the luminance of a picture, its transparent parts black.

    Raises ImageError, and RequestError where all of it is black.
    """
    mask = load_image(source, background="black").convert("L")
    if abs(mask.width * size[1] - mask.height * size[0]) > 0.02 * mask.height * size[0]:
        log.warning("the mask has %d×%d pixels, the picture %d×%d: it is stretched", *mask.size, *size)
    mask = mask.resize(size, Image.Resampling.BILINEAR)
    if mask.getbbox() is None:
        raise RequestError("the mask is black all over, so nothing would be painted: make white what is to change")
    return mask


def soften(mask: Image.Image, blur: int) -> Image.Image:
    """The mask with its edge blurred by a Gaussian of that many pixels. Raises RequestError where nothing is left."""
    softened = mask.filter(ImageFilter.GaussianBlur(blur))
    if softened.getbbox() is None:
        raise RequestError(f"mask_blur is {blur}, which leaves nothing of so small a mask: use less")
    return softened


def latent_mask(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """The mask for latents of size (h, w): (1, 1, h, w) float32 in [0, 1], each the mean of its pixels."""
    pixels = torch.from_numpy(np.array(mask, dtype=np.float32))
    return F.adaptive_avg_pool2d(pixels[None, None] / 255, size)


def fill(image: Image.Image, mask: Image.Image, mode: str) -> Image.Image:
    """The RGB image with what its latents are to start from under the mask; `mode` is one of request.FILLS.

    "original" is the image itself, and so is "noise", which takes the place of the latents, not of pixels. "blur" is
    AUTOMATIC1111's `fill` (modules/masking.py): the surroundings, blurred widely, under the same blurred ever less;
    what even the widest does not reach has their mean colour. With no surroundings the image stays as it is.
    """
    kept = ImageOps.invert(mask)
    if mode != "blur" or kept.getbbox() is None:
        return image
    surroundings = image.convert("RGBA")
    surroundings.putalpha(kept)
    surroundings = surroundings.convert("RGBa")  # premultiplied, so that what is masked bleeds no colour
    mean = [round(channel) for channel in ImageStat.Stat(image, kept).mean]
    filled = Image.new("RGBA", image.size, (*mean, 0))
    for radius, times in FILL_BLURS:
        blurred = surroundings.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            filled.alpha_composite(blurred)
    return filled.convert("RGB")


def crop_region(mask: Image.Image, size: tuple[int, int], padding: int) -> Box:
    """The part of a picture to paint at size (width, height): what is masked, padded, in the shape of that size.

    It is grown to the shape and moved to lie inside the picture; where the picture is too narrow for the shape, it has
    the picture's whole side. As AUTOMATIC1111's get_crop_region and expand_crop_region (modules/masking.py). Raises
    RequestError for a mask that is black all over.
    """
    box = mask.getbbox()
    if box is None:
        raise RequestError("the mask is black all over: make white what is to change")
    left, top = max(box[0] - padding, 0), max(box[1] - padding, 0)
    right, bottom = min(box[2] + padding, mask.width), min(box[3] + padding, mask.height)
    width, height = right - left, bottom - top
    left, right = _grow(left, right, height * size[0] // size[1], mask.width)
    top, bottom = _grow(top, bottom, width * size[1] // size[0], mask.height)
    return left, top, right, bottom


def _grow(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """An interval grown to a length about its middle, then moved to lie in 0 … limit."""
    length = min(max(length, end - start), limit)
    start = start - (length - (end - start)) // 2
    start = min(max(start, 0), limit - length)
    return start, start + length


def paste(original: Image.Image, painted: Image.Image, mask: Image.Image, box: Box | None = None) -> Image.Image:
    """The original with `painted`, resized to the box or the whole, where the mask tells.

    Both are RGB. Pixels where the mask is 0 are the original's, bit for bit, and those where it is 255 are painted.
    """
    left, top, right, bottom = box = box or (0, 0, *original.size)
    result = original.copy()
    patch = painted.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    result.paste(patch, box, mask.crop(box))
    return result


def extend(
    image: Image.Image, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """An RGB image with so many pixels more at its sides, which repeat its edge blurred, and the mask that paints them.

    The mask reaches OVERLAP pixels into the image, a quarter of a small one at most.
    """
    pixels = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    canvas = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(max(left, right, top, bottom) / 8))
    canvas.paste(image, (left, top))
    across, down = min(OVERLAP, image.width // 4), min(OVERLAP, image.height // 4)
    mask = Image.new("L", canvas.size, 255)
    kept = (
        left + (across if left else 0),
        top + (down if top else 0),
        left + image.width - (across if right else 0),
        top + image.height - (down if bottom else 0),
    )
    mask.paste(0, kept)
    return canvas, mask
