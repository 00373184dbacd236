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

MAX_TEXT_BYTES = 16 << 20  # configs and vocabularies; CLIP's tokenizer.json has 4 MB


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors or PyTorch file, as read-only views of its memory map: no data is read yet.

    The content decides, not the name. Pickles are opened with `weights_only=True`, so they run no code.
    Raises CheckpointError for anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not _is_safetensors(start, path.stat().st_size) and (zipfile.is_zipfile(path) or start.startswith(PICKLE)):
        return _read_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable .safetensors file ({first_line(error)}); download or copy it again"
        ) from error


PICKLE = b"\x80"  # the first byte of a pickle of protocol 2 or later


def _is_safetensors(start: bytes, size: int) -> bool:
    """The length of a JSON header in 8 bytes, then the header: https://github.com/huggingface/safetensors#format"""
    return start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual protocols, in lines that help nobody
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise CheckpointError(
            f"{path}: not loaded, because it is damaged or holds more than tensors ({first_line(error)}); "
            "use a .safetensors version of it"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(f"{path}: holds no state dict; expected names mapped to tensors")
    return content


def first_line(error: Exception) -> str:
    """An error of another library, cut to fit into a line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def read_text(path: Path) -> str:
    """A text file in UTF-8 of at most 16 MB. Raises CheckpointError."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError(f"{path}: larger than any file of its kind ({MAX_TEXT_BYTES >> 20} MB allowed)")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not text in UTF-8") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a text file. Raises CheckpointError."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
