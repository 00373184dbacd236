"""The files of a diffusers folder: plain, variants such as fp16, or several with an index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ldm.checkpoint.files import TensorFile, open_tensors, read_json
from ldm.errors import CheckpointError, printable

FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}  # of each network, in a model's folder
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
INDEX = ".index"
EXTRAS = "extras.safetensors"  # in a model's folder: what a single file held beside the networks, for the way back
PREVIEW = "preview.json"  # in a model's folder: how its latents look


def is_component(folder: Path) -> bool:
    """Whether a folder holds the weights of one network."""
    return next(_weight_files(folder), None) is not None


def open_component(folder: Path) -> TensorFile:
    """The weights of one network: a plain file before a variant, safetensors before pickles. Raises CheckpointError."""
    path = next(_weight_files(folder), None)
    if path is None:
        raise CheckpointError(f"{folder}: no weights found; expected {STEMS[0]}.safetensors or a variant of it")
    return _open_shards(folder, path) if path.suffix == ".json" else open_tensors(path)


def _weight_files(folder: Path) -> Iterator[Path]:
    """Files of weights, and indexes of them, the preferred first. `model.fp16.safetensors` is the variant fp16."""
    for suffix in (".safetensors", ".bin"):
        for variant in ("", ".fp16", ".*"):
            for stem in STEMS:
                yield from sorted(folder.glob(f"{stem}{variant}{suffix}"))
                yield from sorted(folder.glob(f"{stem}{suffix}{INDEX}{variant}.json"))


def _open_shards(folder: Path, index: Path) -> TensorFile:
    """Several files as one. Whatever the index says, nothing outside of the folder is opened."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map the names of tensors to those of files")
    shards = {file: open_tensors(_inside(folder, file, index)) for file in sorted(set(weight_map.values()))}
    tensors = {}
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise CheckpointError(f"{index}: {name!r:.200} should be in {file}, and is not")
        tensors[name] = shards[file].tensors[name]
    for file, shard in shards.items():
        if surplus := shard.tensors.keys() - weight_map.keys():
            raise CheckpointError(f"{folder / file}: holds {len(surplus)} tensors that {index.name} does not list")
    first = next(iter(shards.values()))
    return TensorFile(index, first.format, tensors, first.metadata)


def _inside(folder: Path, name: str, index: Path) -> Path:
    """A file of the folder. A link may only lead out of it as in the hub's cache, to the blobs of the same model."""
    if Path(name).name != name or "\\" in name or not name.isprintable():
        raise CheckpointError(f"{index}: names {printable(name)}, which is not a file of its folder")
    path = folder / name
    homes = [folder.resolve()]
    for parent in folder.resolve().parents:
        if parent.name == "snapshots":
            homes.append(parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise CheckpointError(f"{index}: names {name}, which is not a file of its folder")
    return path
