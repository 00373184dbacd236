"""Reading tensors and JSON from files nobody has vouched for."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import CheckpointError

MAX_JSON_BYTES = 16 << 20  # configs and vocabularies; CLIP's vocab.json has 1 MB

# The first bytes of a pickle: protocol 2 and later, or the dictionary of protocol 0.
PICKLE_STARTS = (b"\x80", b"(d", b"}q")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors or PyTorch file, as read-only views of its memory map: no data is read yet.

    The content decides, not the name. Pickles are opened with `weights_only=True`, so they run no code.
    Raises CheckpointError for anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if zipfile.is_zipfile(path) or start.startswith(PICKLE_STARTS):
        return _read_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable .safetensors file ({_first_line(error)}); download or copy it again"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual protocols, in lines that help nobody
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise CheckpointError(
            f"{path}: not loaded, because it is damaged or holds more than tensors ({_first_line(error)}); "
            "use a .safetensors version of it"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no state dict; expected names mapped to tensors")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 16 MB. Raises CheckpointError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than any model config ({MAX_JSON_BYTES >> 20} MB allowed)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
