"""Pictures ↔ tensors. The one place where an image that nobody has vouched for enters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # decoders with no programs behind them


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """An RGB image, upright (EXIF), transparent parts over white. Raises ImageError."""
    name = "the image" if isinstance(source, Image.Image) else source
    try:
        image = ImageOps.exif_transpose(source if isinstance(source, Image.Image) else open_image(source))
        if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits to white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ImageError(f"{name}: pixels of 32 bits have no agreed range; save it with 8 or 16")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        raise ImageError(f"{name}: not a readable image ({error}); use one of {', '.join(FORMATS)}") from error


def open_image(path: str | Path, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image file, decoded, with its text chunks in `info`. Raises ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # past Pillow's limit of 89 megapixels
            image = Image.open(path, formats=formats)
        image.load()
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image") from error
    except Exception as error:  # decoders of damaged files raise anything
        raise ImageError(f"{path}: not a readable image ({error}); use one of {', '.join(formats)}") from error
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image → (1, 3, height, width) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels / 127.5 - 1).permute(2, 0, 1)[None]


def to_image(x: Tensor) -> Image.Image:
    """(3, height, width) in [-1, 1], clamped → RGB image, rounded to the nearest of 256 levels."""
    pixels = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size on a sheet that is as square as they allow, row by row."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
