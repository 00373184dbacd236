"""Writing tensors to safetensors files one after the other, so that memory never holds more than one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ldm.checkpoint.files import TORCH_DTYPES, StoredTensor, drop_pages
from ldm.checkpoint.header import ITEM_SIZES, write_header

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Output:
    """A tensor to write: where it comes from, and what it is to be."""

    name: str
    source: StoredTensor
    dtype: str  # as the safetensors format spells it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.source.numel * ITEM_SIZES[self.dtype]

    def make(self) -> Tensor:
        return self.source.load().to(torch_dtype(self.dtype)).reshape(self.shape).contiguous()


def torch_dtype(name: str) -> torch.dtype:
    """From the safetensors format's name for it."""
    return getattr(torch, TORCH_DTYPES[name])


def release(tensor: StoredTensor) -> None:
    """What was read of this tensor need not stay in memory."""
    if tensor.mapped:
        drop_pages(tensor.load())


def write_tensors(path: Path, outputs: Iterable[Output], metadata: Mapping[str, str], bar: tqdm) -> list[str]:
    """Write a file, and answer with the names, in their sources, of tensors that are not finite in their new dtype.

    The order is that of the safetensors library, wide dtypes first, so that every tensor is aligned.
    """
    outputs = sorted(outputs, key=lambda output: (-ITEM_SIZES[output.dtype], output.name))
    nonfinite = []
    with path.open("wb") as file:
        write_header(file, [(output.name, output.dtype, output.shape) for output in outputs], metadata)
        for output in outputs:
            tensor = output.make()
            if tensor.is_floating_point() and not is_finite(tensor):
                nonfinite.append(output.source.name)
            file.write(_bytes(tensor).numpy().data)
            release(output.source)
            bar.update(output.nbytes)
    return nonfinite


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def is_finite(tensor: Tensor) -> bool:
    """By their sum, which is ten times faster than looking at each; only where that overflows is a look needed."""
    if tensor.element_size() == 1:  # float8, with which torch does not calculate
        tensor = tensor.half()
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal in dtype and in every bit, NaN and the sign of zero included; shapes may differ in their ones."""
    return first.dtype == second.dtype and torch.equal(_bytes(first), _bytes(second))
