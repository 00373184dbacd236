"""Image metadata ↔ Request: what was asked, in the image itself.

A PNG carries two text chunks: `parameters`, for people and in the form AUTOMATIC1111's users know, and `request`, the
whole Request as JSON, for machines.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.diffusion import samplers
from ldm.errors import ImageError
from ldm.files import write_new
from ldm.images import open_image
from ldm.request import Request

PARAMETERS, REQUEST = "parameters", "request"


def parameters(request: Request, steps: int, model: str) -> str:
    """The text AUTOMATIC1111 would write; `steps` is the length of the sampler's grid, which may be more than asked."""
    settings = {
        "Steps": steps,
        "Sampler": samplers.SAMPLERS[request.sampler].label,
        "CFG scale": request.cfg_scale,
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": _quoted(model),
    }
    if request.strength is not None:
        settings["Denoising strength"] = request.strength
    if request.eta:
        settings["Eta"] = request.eta
    lines = [
        request.prompt,
        *([f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else []),
        ", ".join(f"{key}: {value}" for key, value in settings.items()),
    ]
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """As AUTOMATIC1111 quotes a value that would otherwise read as several."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


def save_png(path: Path, image: Image.Image, request: Request, steps: int, model: str) -> None:
    """Write an image with its metadata, whole or not at all. Raises FileExistsError where the path is taken."""
    info = PngInfo()
    info.add_text(PARAMETERS, parameters(request, steps, model))
    info.add_text(REQUEST, request.to_json())
    write_new(path, lambda file: image.save(file, "PNG", pnginfo=info))


def read_request(path: str | Path) -> Request:
    """The Request a PNG of ours was made from. Raises ImageError, RequestError."""
    text = open_image(path, formats=("PNG",)).info.get(REQUEST)
    if not isinstance(text, str):
        raise ImageError(f"{path}: carries no request; only images made by this program do")
    return Request.from_json(text)
