"""Pictures ↔ tensors. The one place where an image that nobody has vouched for enters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ldm.errors import ImageError, printable

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # decoders with no programs behind them

SMALLEST_FONT, LARGEST_FONT = 14, 48  # pixels, of the labels on a contact sheet; between, a 24th of a picture's width
LABEL_LENGTH = 40  # characters
LABEL_GAP = 4  # pixels around a label

_FILTERS = Lock()  # those of warnings belong to all threads


def load_image(source: str | Path | Image.Image, background: str = "white") -> Image.Image:
    """An RGB image, upright (EXIF), transparent parts over the background. Raises ImageError."""
    name = "the image" if isinstance(source, Image.Image) else source
    try:
        image = ImageOps.exif_transpose(source if isinstance(source, Image.Image) else open_image(source))
        if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits to white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ImageError(f"{name}: pixels of 32 bits have no agreed range; save it with 8 or 16")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
        return image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        raise ImageError(f"{name}: not a readable image ({error}); use one of {', '.join(FORMATS)}") from error


def open_image(path: str | Path, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image file, decoded, with its text chunks in `info`. Raises ImageError."""
    try:
        image = open_header(path, formats)
        image.load()
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image") from error
    except Exception as error:  # decoders of damaged files raise anything
        raise ImageError(f"{path}: not a readable image ({error}); use one of {', '.join(formats)}") from error
    return image


def open_header(source: str | Path | BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A picture of which no more than the header has been read, and that is no bomb. Raises whatever Pillow raises."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # past Pillow's limit of 89 megapixels
        return Image.open(source, formats=formats)


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


def contact_sheet(
    images: Sequence[Image.Image], column_labels: Sequence[str], row_labels: Sequence[str]
) -> Image.Image:
    """A white table of RGB images, given row by row, with a label over each column and one beside each row.

    A column is as wide as its widest image or its label, a row as high as its highest image or a line of text; images
    are centred in them. Labels are shortened to LABEL_LENGTH characters; if all of a side are empty, it takes no room.
    Pillow's own font has the letters of ASCII, and a box for any other.
    """
    columns, rows = (
        [printable(" ".join(text.split()), LABEL_LENGTH) for text in labels] for labels in (column_labels, row_labels)
    )
    table = [images[i : i + len(columns)] for i in range(0, len(images), len(columns))]
    font = ImageFont.load_default(min(max(images[0].width // 24, SMALLEST_FONT), LARGEST_FONT))
    length = {text: math.ceil(font.getlength(text)) + 2 * LABEL_GAP for text in (*columns, *rows)}
    line = math.ceil(font.getbbox("Ag")[3]) + 2 * LABEL_GAP
    widths = [
        max(length[text], *(image.width for image in column))
        for text, column in zip(columns, zip(*table, strict=True), strict=True)
    ]
    heights = [max(line, *(image.height for image in row)) for row in table]
    lefts = list(accumulate(widths, initial=max(length[text] for text in rows) if any(rows) else 0))
    tops = list(accumulate(heights, initial=line if any(columns) else 0))

    sheet = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    write = partial(ImageDraw.Draw(sheet).text, fill="black", font=font, anchor="mm")
    for text, left, width in zip(columns, lefts, widths, strict=False):
        write((left + width / 2, tops[0] / 2), text)
    for text, top, height in zip(rows, tops, heights, strict=False):
        write((lefts[0] / 2, top + height / 2), text)
    for row, top, height in zip(table, tops, heights, strict=False):
        for image, left, width in zip(row, lefts, widths, strict=False):
            sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
    return sheet
