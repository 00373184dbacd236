"""Reading tensors, JSON and YAML from files nobody has vouched for. torch is imported when data are first wanted."""

from __future__ import annotations

import json
import logging
import mmap
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.header import ITEM_SIZES, Entry, is_safetensors, read_header
from ldm.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

MAX_TEXT_BYTES = 16 << 20  # vocabularies; CLIP's tokenizer.json has 4 MB
MAX_CONFIG_BYTES = 1 << 20  # and indexes of shards
MAX_YAML_BYTES = 1 << 15  # CompVis's have 2 kB, and the parser is slow
MAX_INDEX_BYTES = 4 << 20  # the pickled part of a PyTorch file, which names the tensors; Stable Diffusion's has 0.3 MB

# What torch calls the dtypes of the safetensors format.
TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip
FORMAT_DTYPES = {theirs: ours for ours, theirs in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `load` answers with a view of the file's memory map: read it, never write to it."""

    name: str  # in its file
    dtype: str  # as the safetensors format spells it
    shape: tuple[int, ...]
    load: Callable[[], Tensor] = field(repr=False, compare=False)
    mapped: bool = True  # whether `load` answers with a view of the file, not with memory of its own

    @property
    def numel(self) -> int:
        return Entry(self.dtype, self.shape, 0).numel

    @property
    def nbytes(self) -> int:
        return Entry(self.dtype, self.shape, 0).nbytes


@dataclass(frozen=True)
class TensorFile:
    """What a file of tensors holds, known before any of their data are read."""

    path: Path
    format: str  # "safetensors" or "pickle"
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    others: tuple[str, ...] = ()  # entries of a pickle that are no tensors: training state


# Files that are often found under a model's name, by how they begin.
NOT_TENSORS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for: run git lfs pull, or download the file",
    b"<": "a web page, not a model: the download went wrong",
    b"PK\x03\x04": "a PyTorch file that is damaged or cut short: download it again",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GGUF": "a GGUF file, whose quantised weights are for other programs: use a .safetensors version",
}
PICKLE = b"\x80"  # the first byte of a pickle of protocol 2 or later


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a .safetensors or PyTorch file. Pickles are opened with `weights_only=True`: they run no code.

    The content decides what a file is; only a pickle that calls itself .safetensors is refused, because whoever chose
    that name was promised a file that cannot do harm. Raises CheckpointError for anything unsound.
    """
    if is_pickle(path):
        return _open_pickle(path)
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
            for sign, what in NOT_TENSORS.items():
                if start.startswith(sign):
                    raise ValueError(f"it is {what}")
            file.seek(0)
            return _open_safetensors(path, read_header(file, _size(path)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file: {error}") from error


def is_pickle(path: Path) -> bool:
    """Whether a file is to be read as a pickle, by its structure. Raises CheckpointError where it cannot be read."""
    size = _size(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
        return not is_safetensors(start, size) and (start.startswith(PICKLE) or zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _size(path: Path) -> int:
    """Of a regular file; one that is not, such as a pipe, might never answer."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    return path.stat().st_size


def _open_safetensors(path: Path, header: Any) -> TensorFile:
    source = _Map(path)
    tensors = {
        name: StoredTensor(name, entry.dtype, entry.shape, partial(source.view, entry), _is_aligned(entry))
        for name, entry in header.tensors.items()
    }
    return TensorFile(path, "safetensors", tensors, header.metadata)


def _is_aligned(entry: Entry) -> bool:
    return entry.start % ITEM_SIZES[entry.dtype] == 0


class _Map:
    """A file's memory map, opened when data are first wanted."""

    def __init__(self, path: Path):
        self.path = path
        self.map: mmap.mmap | None = None

    def view(self, entry: Entry) -> Tensor:
        import torch

        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
        if entry.numel == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if self.map is None:
            with self.path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writes would not reach the file
        if not _is_aligned(entry):  # of a writer that does not; torch wants its data aligned
            data: Any = bytearray(self.map[entry.start : entry.start + entry.nbytes])
            return torch.frombuffer(data, dtype=dtype).view(entry.shape)
        return torch.frombuffer(self.map, dtype=dtype, count=entry.numel, offset=entry.start).view(entry.shape)


def _open_pickle(path: Path) -> TensorFile:
    import torch

    content, mapped = read_pickle(path), zipfile.is_zipfile(path)
    nested = content.get("state_dict") if isinstance(content, dict) else None
    outer = [_name(key) for key in content if key != "state_dict"] if isinstance(nested, dict) else []
    content = nested if isinstance(nested, dict) else content
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no state dict; expected names mapped to tensors")
    tensors, others = {}, outer
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            others.append(_name(name))
        else:
            tensors[name] = store(path, name, value.detach(), mapped)
    return TensorFile(path, "pickle", tensors, {}, tuple(others))


def _name(key: object) -> str:
    if isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 63):
        return str(key)
    return f"a {type(key).__name__}"  # what it says of itself may be endless


def store(path: Path, name: str, tensor: Tensor, mapped: bool = False) -> StoredTensor:
    """A tensor from a pickle. Raises CheckpointError for one that is not plain, dense and as large as it claims."""
    import torch

    dtype = FORMAT_DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if tensor.layout != torch.strided or tensor.is_quantized or dtype is None or tensor.is_meta:
        kind = "quantised" if tensor.is_quantized else str(tensor.layout if dtype else tensor.dtype)[6:]
        raise CheckpointError(f"{path}: {name!r:.100} is a {kind} tensor; expected a dense one of a plain dtype")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {name!r:.100} claims the shape {list(tensor.shape)}, of which it holds a part")
    return StoredTensor(name, dtype, tuple(tensor.shape), lambda: tensor, mapped and tensor.is_contiguous())


class _Inert:
    """Stands for an object of training code, which is not run: it takes whatever the pickle hands it."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# What PyTorch Lightning and the first embeddings leave in public checkpoints. Nothing of these modules is imported.
INERT = [
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "torch.nn.modules.container.ParameterDict",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "typing.Any",
    "builtins.dict",
    "builtins.int",
    "builtins.list",
    "collections.defaultdict",
]


def read_pickle(path: Path) -> Any:
    """What a PyTorch file holds: its tensors as views of the memory map. Raises CheckpointError."""
    import torch

    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: not loaded, because it is a pickle under the name of a safer format; rename it to .ckpt if you "
            "trust its source"
        )
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_archive(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Inert, name) for name in INERT]):
            warnings.simplefilter("ignore")  # of unusual protocols, in lines that help nobody
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise CheckpointError(
            f"{path}: not loaded, because it is damaged or holds more than tensors ({_cause(error)}); "
            "use a .safetensors version of it"
        ) from error


def _check_archive(path: Path) -> None:
    """PyTorch never compresses its archives, and maps what it takes to be plain data."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is a compressed archive")
            if record.filename.endswith("data.pkl") and record.file_size > MAX_INDEX_BYTES:
                raise ValueError(f"its index has {record.file_size} bytes; at most {MAX_INDEX_BYTES} are allowed")


def _cause(error: Exception) -> str:
    """torch explains at length; the name of what a pickle wanted to call is what matters."""
    found = re.search(r"GLOBAL (\S+)", str(error), re.IGNORECASE)
    return f"it wants to call {found[1][:100]}" if found else first_line(error)


def first_line(error: Exception) -> str:
    """An error of another library, cut to fit into a line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def drop_pages(tensor: Tensor) -> None:
    """Tell the system that a view of a memory map will not be read again soon, so that its pages need not stay.

    Without effect on systems that have no madvise. Only for maps of files: other memory would lose what it holds.
    """
    import ctypes

    madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if madvise is not None and last > first:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def read_text(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """A text file in UTF-8 of at most `most` bytes. Raises CheckpointError."""
    try:
        if _size(path) > most:
            raise CheckpointError(f"{path}: larger than any file of its kind ({most >> 10} kB allowed)")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not text in UTF-8") from error


def read_json(path: Path, most: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a text file of at most `most` bytes. Raises CheckpointError."""
    return parse_json(read_text(path, most), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(content).__name__}")
    return content


def read_yaml(path: Path) -> Any:
    """Plain data from a YAML file without aliases, a few of which can stand for gigabytes. Raises CheckpointError."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has aliases")
            return super().compose_node(parent, index)

    text = read_text(path, MAX_YAML_BYTES)
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # its constructors raise whatever Python's do
        raise CheckpointError(f"{path}: not valid YAML ({first_line(error)})") from error
