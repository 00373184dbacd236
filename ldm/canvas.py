"""What a picture starts from: an initial image enlarged, cropped and filled as a request asks, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

from ldm import editing
from ldm.errors import RequestError
from ldm.images import load_image
from ldm.request import SIZE_MULTIPLE, Request

Source = str | Path | Image.Image


@dataclass(frozen=True)
class Canvas:
    """An initial image and its mask, of one size; white is repainted."""

    picture: Image.Image | None = None
    mask: Image.Image | None = None

    def fitted(self, request: Request) -> Fitted:
        """At the size of a request that has one."""
        assert request.width is not None and request.height is not None
        size = request.width, request.height
        if self.picture is None or self.mask is None:
            return Fitted(self.picture and self.picture.resize(size, Image.Resampling.LANCZOS))
        canvas = self
        if not request.only_masked and size != multiples(self.picture.size):
            picture = self.picture.resize(size, Image.Resampling.LANCZOS)
            canvas = Canvas(picture, self.mask.resize(size, Image.Resampling.BILINEAR))
        assert canvas.picture is not None and canvas.mask is not None
        box = (0, 0, *canvas.picture.size)
        if request.only_masked:
            box = editing.crop_region(canvas.mask, size, request.mask_padding)
        part = canvas.picture.crop(box).resize(size, Image.Resampling.LANCZOS)
        mask = canvas.mask.crop(box).resize(size, Image.Resampling.BILINEAR)
        return Fitted(editing.fill(part, mask, request.fill), mask, canvas, box)


@dataclass(frozen=True)
class Fitted:
    """What to paint on, at the size to paint at."""

    picture: Image.Image | None = None
    mask: Image.Image | None = None
    canvas: Canvas = Canvas()
    box: editing.Box | None = None  # where it lies on the canvas

    def finish(self, painted: Image.Image) -> Image.Image:
        """The whole picture: where there is a mask, what it keeps is that of the canvas, bit for bit."""
        if self.canvas.picture is None or self.canvas.mask is None:
            return painted
        return editing.paste(self.canvas.picture, painted, self.canvas.mask, self.box)


def proportioned(request: Request, size: tuple[int, int]) -> tuple[int, int]:
    """The size of an initial image, or its shape where a request gives one side."""
    width, height = size
    if (request.width is None) == (request.height is None):
        return size
    scale = (request.width or 0) / width + (request.height or 0) / height
    return round(width * scale), round(height * scale)


def multiples(size: tuple[int, int]) -> tuple[int, int]:
    """The largest size that latents can have within a picture's."""
    width, height = (side - side % SIZE_MULTIPLE for side in size)
    return width, height


def open_canvas(request: Request, image: Source | None, mask: Source | None) -> Canvas:
    """The initial image and its mask, with what is to be added at the sides. Raises ImageError and RequestError."""
    sides = {side: getattr(request, f"outpaint_{side}") for side in ("left", "right", "top", "bottom")}
    if image is None:
        if mask is not None or any(sides.values()):
            raise RequestError("a mask and outpainting need an initial image: give one")
        return Canvas()
    picture = load_image(image)
    drawn = None if mask is None else editing.load_mask(mask, picture.size)
    if any(sides.values()):
        extended, border = editing.extend(picture, **sides)
        if drawn is not None:
            whole = Image.new("L", extended.size)
            whole.paste(drawn, (sides["left"], sides["top"]))
            border = ImageChops.lighter(border, whole)
        picture, drawn = extended, border
    return Canvas(picture, None if drawn is None else editing.soften(drawn, request.mask_blur))
