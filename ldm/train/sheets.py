"""Pictures with their captions, to look at."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont, ImageOps

FRAME, LINES, LETTERS = 4, 4, 24  # pixels around a picture; lines of its caption, and letters of a line
FONT, LINE = 9, 13  # pixels
CELL = 140  # pixels that a line needs


def captioned(picture: Image.Image, caption: str, frame: str = "white") -> Image.Image:
    """An RGB picture in a frame of a colour, and its caption below: for `ldm.images.grid`."""
    framed = ImageOps.expand(picture, FRAME, frame)
    text = "\n".join(textwrap.wrap(caption, LETTERS, max_lines=LINES, placeholder="…"))
    cell = Image.new("RGB", (max(framed.width, CELL), framed.height + (LINES + 1) * LINE), "white")
    cell.paste(framed, ((cell.width - framed.width) // 2, 0))
    font = ImageFont.load_default(FONT)
    ImageDraw.Draw(cell).multiline_text((cell.width / 2, framed.height + 2), text, "black", font, "ma", align="center")
    return cell
