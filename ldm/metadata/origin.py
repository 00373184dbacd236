"""What a picture's metadata tell, whoever wrote them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath, PureWindowsPath
from reprlib import repr as brief
from typing import Any

from ldm.diffusion import grids, samplers
from ldm.errors import ImageError, RequestError, printable
from ldm.request import Request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The request of a picture, the names of its model and of a VAE from elsewhere, and whether it had a mask."""

    request: Request
    model: str | None = None
    vae: str | None = None
    masked: bool = False


def find_grid(name: str) -> str | None:
    """grids.find_grid for what a file says. Raises RequestError."""
    try:
        return grids.find_grid(name)
    except ValueError as error:
        raise RequestError(str(error)) from error


def find_sampler(name: object) -> tuple[str, str | None]:
    """samplers.find for what a file says. Raises RequestError."""
    if not isinstance(name, str):
        raise RequestError(f"sampler is {brief(name)}: use one of {', '.join(samplers.NAMES)}")
    try:
        return samplers.find(name)
    except ValueError as error:
        raise RequestError(str(error)) from error


def draws_brownian(sampler: str) -> bool:
    """Whether AUTOMATIC1111 and ComfyUI draw this sampler's noise from a Brownian path: those named after SDEs."""
    return "sde" in sampler.split("_")


def load_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object out of a file. Raises ImageError."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"its {what} are no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ImageError(f"its {what} are JSON of a {type(values).__name__}: expected an object")
    return values


def stem(name: object) -> str | None:
    """What a model is called, from the path of its file on anyone's machine."""
    if not isinstance(name, str) or not name:
        return None
    path = PurePath(PureWindowsPath(name).name)
    return path.stem if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") else path.name


def warn_lost(lost: Iterable[str]) -> None:
    """Name what may have shaped the picture and has no place in a request."""
    if names := sorted(set(lost)):
        log.warning("not carried over, the picture may differ: %s", printable(", ".join(names), 500))
