"""Synthetic checkpoints: real key layouts and shapes, made-up weights that are a pure function of each key.

The reference outputs in tests/data were computed by the original implementation on these same weights.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint.header import Entry, write_header

DATA = Path(__file__).parent / "data"


def make_tensor(key: str, shape: list[int]) -> Tensor:
    """Standard normal noise seeded by the key's CRC-32: gains about 1, small biases, the rest scaled by fan-in."""
    if key.endswith("position_ids"):
        return torch.arange(shape[-1]).reshape(shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) == 1:
        return 1 + 0.1 * noise if key.endswith("weight") else 0.02 * noise
    return 0.02 * noise if "embedding.weight" in key else noise / math.sqrt(math.prod(shape[1:]))


def shapes(manifest: str, prefixes: Iterable[str] = ("",)) -> dict[str, list[int]]:
    """The keys and shapes of a manifest in tests/data that start with one of the prefixes."""
    every = json.loads((DATA / manifest).read_text())
    return {key: shape for key, shape in every.items() if key.startswith(tuple(prefixes))}


def state_dict(manifest: str, prefixes: Iterable[str] = ("",)) -> dict[str, Tensor]:
    return {key: make_tensor(key, shape) for key, shape in shapes(manifest, prefixes).items()}


def hollow_file(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str = "F32", metadata: Mapping[str, str] = {}):
    """A safetensors file of zeros that takes no space on the disk, however large its tensors are."""
    tensors = [(name, dtype, tuple(shape)) for name, shape in shapes.items()]
    with path.open("wb") as file:
        write_header(file, tensors, metadata)
        file.truncate(file.tell() + sum(Entry(dtype, shape, 0).nbytes for _, dtype, shape in tensors))
    return path
