"""The safetensors format: its header, read from files nobody has vouched for, and written.

A file is 8 bytes of header length, a JSON header that gives each tensor a dtype, a shape and a range of the rest, and
the rest: https://github.com/huggingface/safetensors#format. Every claim is checked before anything is allocated for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any, BinaryIO

MAX_HEADER_BYTES = 16 << 20  # Stable Diffusion's have 0.2 MB; the format allows 100 MB, which no model needs
MAX_MARKS = 1_000_000  # of `,` and `{`: what a header costs in memory is bounded before it is parsed
MAX_DIMS = 16
MAX_DIGITS = 20  # of a 64-bit number

# Bytes an element has, by the format's names for dtypes.
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FLOATS = {"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"}


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    dtype: str  # a key of ITEM_SIZES
    shape: tuple[int, ...]
    start: int  # in bytes from the start of the file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


def is_safetensors(start: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with these 9 has the structure of the format."""
    return start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size


def read_header(file: BinaryIO, size: int) -> Header:
    """The header of a safetensors file of `size` bytes. Raises ValueError in one line for any that is not sound."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8:
        raise ValueError(f"it has {size} bytes, the format begins with 8")
    if length > size - 8:
        raise ValueError(
            f"the header should have {length} bytes, the file has {size}: it is cut short or of another kind"
        )
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"the header has {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    if text.count(b",") + text.count(b"{") > MAX_MARKS:
        raise ValueError("the header has more entries than any model")
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("the header is not text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the header is not valid JSON ({error.msg})") from None
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map names to text")
    try:
        "".join([*content, *metadata, *metadata.values()]).encode()
    except UnicodeEncodeError:
        raise ValueError("the header has half a character in a name or in its metadata") from None
    data = 8 + length
    entries = {name: _entry(name, value, data) for name, value in content.items()}
    _check_contiguous(entries, data, size)
    return Header(entries, metadata)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"the header has a number of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON leaves open which of two equal keys counts, so readers would see different models in one file."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the header has {brief(twice)} twice")
    return content


def _entry(name: str, value: Any, data: int) -> Entry:
    """The claim a header makes of one tensor, checked in itself; `data` is where the header ends."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{brief(name)} must have a dtype, a shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ValueError(f"{brief(name)} has the dtype {brief(dtype)}; known are {', '.join(ITEM_SIZES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"{brief(name)} has the shape {brief(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{brief(name)} has the data_offsets {brief(offsets)}")
    entry = Entry(dtype, tuple(shape), data + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise ValueError(
            f"{brief(name)} takes {entry.nbytes} bytes by dtype and shape, {offsets[1] - offsets[0]} by data_offsets"
        )
    return entry


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_contiguous(entries: Mapping[str, Entry], data: int, size: int) -> None:
    """The tensors must fill the file: what lies in a hole or behind the end was hidden there."""
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise ValueError(f"{brief(name)} {kind}")
        end += entry.nbytes
    if end != size:
        raise ValueError(f"the tensors end at byte {end}, the file at {size}")


def write_header(
    file: BinaryIO, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> None:
    """The header of a file whose tensors, (name, dtype, shape), will follow in this order."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in tensors:
        end = start + Entry(dtype, shape, 0).nbytes
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
