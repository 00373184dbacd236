"""From any model that loads to a single file or a diffusers folder, tensor by tensor and bit for bit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.checkpoint import configs
from ldm.checkpoint.detect import PARAMETERIZATIONS
from ldm.checkpoint.files import FORMAT_DTYPES, TORCH_DTYPES, StoredTensor
from ldm.checkpoint.folders import EXTRAS, FOLDERS
from ldm.checkpoint.header import FLOATS
from ldm.checkpoint.layouts import EMA, LABELS, MARKS, POSITION_IDS, TEXT_LEVEL, Part, describe
from ldm.checkpoint.load import build, check, read_config
from ldm.checkpoint.names import disk_dims
from ldm.checkpoint.sources import CONFIG_KEY, MODELSPEC_KEY, TOKENIZER_KEY, Checkpoint, Choices, open_checkpoint
from ldm.checkpoint.vocabulary import read_vocabulary
from ldm.checkpoint.writing import Output, release, same_bits, torch_dtype, write_tensors
from ldm.config import SD_V1
from ldm.errors import CheckpointError, RequestError
from ldm.files import staged_file, staged_folder
from ldm.models.tokenizer import shipped_vocabulary

log = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Layout:
    """How a network is written: in whose names, and after which prefix."""

    spelling: str
    prefix: str


SINGLE = {
    "unet": Layout("compvis", "model.diffusion_model."),
    "vae": Layout("compvis", "first_stage_model."),
    "text": Layout("compvis", "cond_stage_model.transformer." + TEXT_LEVEL),
}
VAE_ALONE = Layout("compvis", "")  # as those who read VAE files expect them
FOLDER = {
    "unet": Layout("diffusers", ""),
    "vae": Layout("diffusers", ""),
    "text": Layout("diffusers", TEXT_LEVEL),
}
FOLDER_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text": "model.safetensors",
}


@dataclass(frozen=True)
class Conversion:
    """What to change on the way. Raises RequestError for an unknown dtype."""

    dtype: str | None = None  # one of DTYPES; None keeps each tensor's own
    prune: bool = False  # leave out what is not needed to run the networks
    verify: bool = False  # read the result again and compare every tensor with the source
    overwrite: bool = False  # replace what is at the target
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise RequestError(f"dtype is {self.dtype!r:.50}: use one of {', '.join(DTYPES)}")

    def dtype_of(self, tensor: StoredTensor) -> str:
        return FORMAT_DTYPES[self.dtype] if self.dtype and tensor.dtype in FLOATS else tensor.dtype


def convert(source: Path, target: Path, choices: Choices = Choices(), conversion: Conversion = Conversion()) -> None:
    """Write the model at `source` to `target`: a .safetensors file, or a diffusers folder under any other name.

    Source and target may be the same. At any moment there is the old target or the new one; memory holds a tensor at
    a time. Raises CheckpointError and RequestError, and then has written nothing.
    """
    checkpoint = open_checkpoint(source, choices, sidecar_vae=False)
    single = target.suffix == ".safetensors"
    if target.suffix in (".ckpt", ".pt", ".bin", ".pth"):
        raise RequestError(f"{target}: only .safetensors files are written, or folders; choose another name")
    overwrite = conversion.overwrite or target.resolve() == source.resolve()
    if target.exists() and not overwrite:
        raise RequestError(f"{target} exists; choose another name, or --overwrite")
    if target.exists() and target.is_dir() == single:
        raise RequestError(f"{target} is a {'folder' if single else 'file'}; choose another name")
    files = _plan_single(checkpoint, conversion) if single else _plan_folder(checkpoint, conversion)
    target.parent.mkdir(parents=True, exist_ok=True)
    size = sum(output.nbytes for file in files.values() for output in file.tensors)
    if size > (free := shutil.disk_usage(target.parent).free):
        raise CheckpointError(f"{target}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    with (
        (staged_file if single else staged_folder)(target, overwrite) as staged,
        tqdm(total=size * (1 + conversion.verify), unit="B", unit_scale=True, desc=target.name) as bar,
    ):
        _write(staged, files, bar, conversion)
        if conversion.verify:
            verify(checkpoint, open_checkpoint(staged, sidecar_vae=False), conversion, bar)


@dataclass(frozen=True)
class File:
    """A file to write: tensors with metadata, or text."""

    tensors: list[Output]
    metadata: Mapping[str, str]
    text: str = ""


def _write(staged: Path, files: Mapping[str, File], bar: tqdm, conversion: Conversion) -> None:
    for name, file in files.items():
        path = staged / name
        path.parent.mkdir(exist_ok=True)
        if not file.tensors:
            path.write_text(file.text, encoding="utf-8")
            continue
        nonfinite = write_tensors(path, file.tensors, file.metadata, bar)
        if nonfinite and not conversion.allow_nonfinite:
            raise CheckpointError(
                f"{describe(nonfinite)} hold NaN or infinity"
                + (f" in {conversion.dtype}" if conversion.dtype else "")
                + "; use another dtype or source, or --allow-nonfinite",
                details=nonfinite,
            )


def _plan_single(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, File]:
    layouts = SINGLE if set(checkpoint.parts) != {"vae"} else {"vae": VAE_ALONE}
    tensors = [output for name in checkpoint.parts for output in _part_outputs(checkpoint, name, layouts, conversion)]
    tensors += _extra_outputs(checkpoint, conversion)
    metadata = {"format": "pt", **checkpoint.metadata}
    for key in (CONFIG_KEY, TOKENIZER_KEY):
        metadata.pop(key, None)
    return {"": File(tensors, metadata | _untold(checkpoint))}


def _untold(checkpoint: Checkpoint) -> dict[str, str]:
    """Metadata for what a single file's names and shapes would not tell a reader."""
    parts = {name: part.read_config() for name, part in checkpoint.parts.items()}
    plain = {name: replace(part, json=None, hints={}).read_config() for name, part in checkpoint.parts.items()}
    image_size = read_config(checkpoint).image_size if len(parts) == len(LABELS) else SD_V1.image_size
    metadata = {}
    differs = (parts, checkpoint.schedule, image_size) != (plain, SD_V1.schedule, SD_V1.image_size)
    marked = any(MARKS in contents.ignored for contents in checkpoint.contents.values())
    if differs or marked:  # by keys, which may say something else than was chosen
        content = configs.parts_to_json(parts, image_size)
        content |= {"scheduler": configs.schedule_to_json(checkpoint.schedule)} if "unet" in parts else {}
        metadata[CONFIG_KEY] = json.dumps(content)
    prediction_type = checkpoint.schedule.prediction_type
    if MODELSPEC_KEY in checkpoint.metadata or prediction_type != SD_V1.schedule.prediction_type:  # for other tools
        metadata[MODELSPEC_KEY] = next(name for name, type_ in PARAMETERIZATIONS.items() if type_ == prediction_type)
    if "text" in parts and (tables := read_vocabulary(checkpoint.tokenizer, checkpoint.path)) != shipped_vocabulary():
        metadata[TOKENIZER_KEY] = json.dumps({"model": {"vocab": tables[0], "merges": tables[1]}}, ensure_ascii=False)
    return metadata


def _plan_folder(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, File]:
    metadata = {"format": "pt", **checkpoint.metadata}
    for key in (CONFIG_KEY, TOKENIZER_KEY, MODELSPEC_KEY):  # which the folder's own files tell
        metadata.pop(key, None)
    config = read_config(checkpoint)
    files = {
        f"{FOLDERS[name]}/{FOLDER_FILES[name]}": File(
            list(_part_outputs(checkpoint, name, FOLDER, conversion)), metadata
        )
        for name in checkpoint.parts
    }
    if extras := _extra_outputs(checkpoint, conversion):
        files[EXTRAS] = File(extras, metadata)
    texts: dict[str, Any] = {
        "model_index.json": configs.MODEL_INDEX,
        "scheduler/scheduler_config.json": configs.schedule_to_json(config.schedule),
    }
    for folder, content in configs.parts_to_json(
        {name: getattr(config, name) for name in LABELS}, config.image_size
    ).items():
        texts[f"{folder}/config.json"] = content
    vocab, merges = read_vocabulary(checkpoint.tokenizer, checkpoint.path)
    texts["tokenizer/vocab.json"] = vocab
    texts["tokenizer/tokenizer_config.json"] = configs.tokenizer_to_json(config.text.max_length)
    files |= {name: File([], {}, json.dumps(text, ensure_ascii=False, indent=2)) for name, text in texts.items()}
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    return files | {"tokenizer/merges.txt": File([], {}, "\n".join(lines))}


def _part_outputs(
    checkpoint: Checkpoint, name: str, layouts: Mapping[str, Layout], conversion: Conversion
) -> Iterator[Output]:
    """The tensors of one network, once it is sure that none is missing, surplus or misshapen."""
    part, layout = checkpoint.part(name), layouts[name]
    config = part.read_config()
    shapes = check(build(checkpoint, name, config), part, config)
    target = Part(name, part.where, layout.prefix, layout.spelling, {}).expected(config)
    theirs = {ours: key for key, ours in target.items()}
    for key, ours in part.expected(config).items():
        tensor, shape = part.tensors[key], tuple(shapes[ours])
        dims = disk_dims(name, ours, len(shape), layout.spelling)
        padded = (*shape, *[1] * (dims - len(shape)))
        yield Output(layout.prefix + theirs[ours], tensor, conversion.dtype_of(tensor), padded)
    if name == "text" and not conversion.prune:
        contents = {**checkpoint.borrowed, **checkpoint.contents}[part.where]
        for tensor in contents.ignored.get(POSITION_IDS, {}).values():
            ids = _sound_position_ids(tensor, config.max_length)
            yield Output(f"{layout.prefix}embeddings.position_ids", ids, ids.dtype, ids.shape)
            break


def _sound_position_ids(tensor: StoredTensor, length: int) -> StoredTensor:
    """The constant as it should be: merging tools turn it into floats, and average it."""
    sound = torch.arange(length)[None]
    if tensor.dtype == "I64" and tensor.numel == length and torch.equal(tensor.load().reshape(1, -1), sound):
        return tensor
    log.warning("%s: repaired: it was %s and is the numbers from 0 again", tensor.name, TORCH_DTYPES[tensor.dtype])
    return StoredTensor(tensor.name, "I64", (1, length), lambda: sound, mapped=False)


def _extra_outputs(checkpoint: Checkpoint, conversion: Conversion) -> list[Output]:
    """What is kept although no network needs it, under its own names; only EMA weights are cast with the rest."""
    outputs = []
    for contents in checkpoint.contents.values():
        for reason, tensors in {**contents.ignored, "unknown": contents.unknown}.items():
            if conversion.prune:
                log.info("left out: %s (%d tensors)", reason, len(tensors))
            elif reason != POSITION_IDS:
                for name, tensor in tensors.items():
                    dtype = conversion.dtype_of(tensor) if reason == EMA else tensor.dtype
                    outputs.append(Output(name, tensor, dtype, tensor.shape))
    return outputs


def verify(source: Checkpoint, result: Checkpoint, conversion: Conversion, bar: tqdm) -> None:
    """Compare every tensor of two checkpoints bit for bit, each found through the name table of its own spelling.

    Raises CheckpointError with the names of those that differ.
    """
    different = []
    for name, part in source.parts.items():
        config = part.read_config()
        theirs = {ours: key for key, ours in result.part(name).expected(config).items()}
        for key, ours in part.expected(config).items():
            first, second = part.tensors[key], result.part(name).tensors[theirs[ours]]
            if not same_bits(first.load().to(torch_dtype(conversion.dtype_of(first))), second.load()):
                different.append(part.prefix + key)
            for tensor in (first, second):
                release(tensor)
            bar.update(second.nbytes)
    kept = {output.name: output for output in _extra_outputs(source, conversion)}
    there = {output.name: output for output in _extra_outputs(result, Conversion())}
    different += [name for name in kept if name not in there or not same_bits(kept[name].make(), there[name].make())]
    if different:
        raise CheckpointError(f"verification failed: {describe(different)} differ from the source", details=different)
