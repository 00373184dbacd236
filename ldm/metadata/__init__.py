"""Image metadata ↔ Request: what was asked, in the image itself.

A picture carries its request twice: as the `parameters` text that AUTOMATIC1111 writes and reads, and as JSON, from
which it can be made again. In a PNG these are text chunks of the names `parameters` and `request`; in JPEG and WebP the
EXIF's UserComment (in UTF-16, as AUTOMATIC1111 has it) and ImageDescription.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import ImageError, RequestError, printable
from ldm.files import write_new
from ldm.images import open_image
from ldm.metadata import automatic1111, comfyui, invokeai
from ldm.metadata.automatic1111 import parameters
from ldm.metadata.origin import Origin
from ldm.request import Request

__all__ = ["FORMATS", "Origin", "parameters", "read_origin", "read_request", "save_image"]

log = logging.getLogger(__name__)

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
OPTIONS: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}

PARAMETERS, REQUEST, COMFYUI = "parameters", "request", "prompt"
INVOKEAI, OLD_INVOKEAI = "invokeai_metadata", "sd-metadata"
EXIF_IFD, IMAGE_DESCRIPTION, USER_COMMENT = 0x8769, 0x010E, 0x9286  # of EXIF 2.32
MAX_EXIF = 65_533  # bytes, in a JPEG's one segment

# --- writing ----------------------------------------------------------------------------------------------------------


def save_image(
    path: str | Path,
    image: Image.Image,
    request: Request,
    steps: int,
    model: str,
    vae: str | None = None,
    metadata: bool = True,
    masked: bool = False,
) -> None:
    """Write an image as its suffix says (.png, .jpg, .jpeg, .webp: lossless), whole or not at all.

    request: complete (`StableDiffusion.complete`), or what the model chose is not written.
    steps, model, vae, masked: as in `parameters`. metadata: whether to write any. Raises RequestError for another
    suffix, FileExistsError where the path is taken.
    """
    path = Path(path)
    kind = format_of(path)
    text = parameters(request, steps, model, vae, masked)
    options = OPTIONS[kind]
    if metadata:
        options = options | ({"pnginfo": _chunks(text, request)} if kind == "PNG" else _exif(text, request, path))
    write_new(path, lambda file: image.save(file, kind, **options))


def format_of(path: Path) -> str:
    """PNG, JPEG or WEBP, by the suffix. Raises RequestError."""
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"{path}: pictures are not written as {path.suffix!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def _chunks(text: str, request: Request) -> PngInfo:
    info = PngInfo()
    info.add_text(PARAMETERS, text)
    info.add_text(REQUEST, request.to_json())
    return info


def _exif(text: str, request: Request, path: Path) -> dict[str, bytes]:
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = json.dumps(asdict(request))  # ASCII, as that tag must be
    exif[EXIF_IFD] = {USER_COMMENT: b"UNICODE\0" + text.encode("utf-16-be")}
    content = exif.tobytes()
    if format_of(path) == "JPEG" and len(content) > MAX_EXIF:
        log.warning("%s: a JPEG has no room for a prompt this long: written without metadata; use PNG or WebP", path)
        return {}
    return {"exif": content}


# --- reading ----------------------------------------------------------------------------------------------------------


def read_request(path: str | Path) -> Request:
    """The Request a PNG, JPEG or WebP was made from, by this program, AUTOMATIC1111, ComfyUI or InvokeAI.

    What it cannot express is named in a warning. Raises ImageError, RequestError.
    """
    return read_origin(path).request


def read_origin(path: str | Path) -> Origin:
    """The request, and with which model it was drawn. Raises ImageError, RequestError; warns as `read_request`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's about damaged EXIF
        texts = _texts(open_image(path, formats=tuple(OPTIONS)), path)
    readers = {
        INVOKEAI: invokeai.parse,
        OLD_INVOKEAI: invokeai.parse_old,
        PARAMETERS: lambda text: automatic1111.parse(text, noise="cpu" if COMFYUI in texts else "cuda"),
        COMFYUI: comfyui.parse,
    }
    try:
        if REQUEST in texts:
            return _own(texts)
        for name, read in readers.items():
            if name in texts:
                return read(texts[name])
    except (ImageError, RequestError) as error:
        raise type(error)(f"{path}: {error}") from error
    raise ImageError(
        f"{path}: carries no request; only what this program, AUTOMATIC1111, ComfyUI or InvokeAI made does"
    )


def _own(texts: dict[str, str]) -> Origin:
    """Our JSON, and the model's name out of the text beside it."""
    settings = automatic1111.split_settings(texts.get(PARAMETERS, "").rpartition("\n")[2])
    request = Request.from_json(texts[REQUEST])
    return Origin(request, settings.get("Model"), settings.get("VAE"), "Mask blur" in settings)


def _texts(image: Image.Image, path: str | Path) -> dict[str, str]:
    """The texts in a picture, by the name their chunk has in a PNG."""
    if image.format == "PNG":
        return {name: text for name, text in image.info.items() if isinstance(name, str) and isinstance(text, str)}
    try:
        exif = image.getexif()
        described, comment = exif.get(IMAGE_DESCRIPTION), exif.get_ifd(EXIF_IFD).get(USER_COMMENT)
    except Exception as error:  # EXIF is as hostile as the picture, and its reader raises as many things
        raise ImageError(f"{path}: its EXIF is damaged ({printable(str(error))})") from error
    texts = {}
    if isinstance(described, str) and described.startswith('{"prompt": '):  # as ours begin
        texts[REQUEST] = described
    if isinstance(comment, bytes):
        texts[PARAMETERS] = _user_comment(comment)
    return texts


def _user_comment(comment: bytes) -> str:
    """EXIF 2.32, 4.6.5: eight bytes name the encoding. Which end UTF-16 begins at is not told, and writers differ."""
    code, content = comment[:8], comment[8:]
    if code != b"UNICODE\0":
        return content.decode(errors="replace")
    big, little = (content.decode(f"utf-16-{end}", "replace") for end in ("be", "le"))
    return little if "Steps: " in little else big
