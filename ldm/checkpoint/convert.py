"""From any model that loads to a single file or a diffusers folder, tensor by tensor and bit for bit."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.checkpoint import configs
from ldm.checkpoint.detect import PARAMETERIZATIONS
from ldm.checkpoint.files import FORMAT_DTYPES, MAX_CONFIG_BYTES, TORCH_DTYPES, StoredTensor, read_text
from ldm.checkpoint.folders import EXTRAS, FOLDERS, PREVIEW, STEMS
from ldm.checkpoint.header import FLOATS
from ldm.checkpoint.layouts import EMA, MARKS, POSITION_IDS, REPLACED, TEXT_LEVEL, Part, describe
from ldm.checkpoint.load import build, check, read_config, read_habits
from ldm.checkpoint.names import disk_dims
from ldm.checkpoint.sources import (
    CONFIG_KEY,
    MODELSPEC_KEY,
    TOKENIZER_KEY,
    Checkpoint,
    Choices,
    find_sidecar_vae,
    open_checkpoint,
)
from ldm.checkpoint.vocabulary import read_vocabulary
from ldm.checkpoint.writing import Output, release, same_bits, torch_dtype, write_tensors
from ldm.config import DTYPES, LABELS, SD_V1
from ldm.errors import CheckpointError, RequestError, printable
from ldm.files import made_folder, staged_file, staged_folder
from ldm.models.tokenizer import shipped_vocabulary

log = logging.getLogger(__name__)


FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")  # suffixes that no folder should have


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

    dtype: str | None = None  # a key of DTYPES; None keeps each tensor's own
    prune: bool = False  # leave out what is not needed to run the networks
    verify: bool = False  # read the result again and compare every tensor with the source
    overwrite: bool = False  # replace what is at the target
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise RequestError(f"dtype is {self.dtype!r:.50}: use one of {', '.join(DTYPES)}")

    def dtype_of(self, tensor: StoredTensor) -> str:
        if self.dtype is None or tensor.dtype not in FLOATS:
            return tensor.dtype
        return FORMAT_DTYPES[DTYPES[self.dtype]]


def convert(source: Path, target: Path, choices: Choices = Choices(), conversion: Conversion = Conversion()) -> None:
    """Write the model at `source` to `target`: a .safetensors file, or a diffusers folder under any other name.

    Source and target may be the same. At any moment there is the old target or the new one; memory holds a tensor at
    a time. Raises CheckpointError and RequestError, and then has written nothing.
    """
    checkpoint = open_checkpoint(source, choices, sidecar_vae=False)
    in_place = target.resolve() == source.resolve()
    write_checkpoint(checkpoint, target, replace(conversion, overwrite=conversion.overwrite or in_place))


def write_checkpoint(checkpoint: Checkpoint, target: Path, conversion: Conversion) -> None:
    """What `convert` does once the source is open."""
    single = target.suffix == ".safetensors"
    if not single and get_close_matches(target.suffix.lower(), FILES):
        raise RequestError(f"{target}: only .safetensors files are written, or folders; choose another name")
    target = target.resolve()  # what a link stands for is replaced, not the link
    check_target(target, single, conversion.overwrite)
    files = _plan_single(checkpoint, conversion) if single else _plan_folder(checkpoint, conversion)
    _report(checkpoint, conversion, single)
    size = sum(output.nbytes for file in files.values() for output in file.tensors)
    with (
        made_folder(target.parent),
        (staged_file if single else staged_folder)(target, conversion.overwrite) as staged,
        tqdm(total=size * (1 + conversion.verify), unit="B", unit_scale=True, desc=target.name) as bar,
    ):
        if size > (free := shutil.disk_usage(target.parent).free):
            raise CheckpointError(f"{target}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        _write(staged, files, bar, conversion)
        if conversion.verify:
            verify(checkpoint, open_checkpoint(staged, sidecar_vae=False), conversion, bar)
    if conversion.verify:
        cast = f" in {conversion.dtype}" if conversion.dtype else ""
        log.info("verified: every tensor is bit for bit that of the source%s", cast)


# The files of a model's folder. Where a folder holds anything else, it is not replaced: that would be lost.
OF_A_MODEL = re.compile(
    rf"(.*/)?\.DS_Store|model_index\.json|{re.escape(EXTRAS)}|{re.escape(PREVIEW)}"
    r"|scheduler/scheduler_config\.json|tokenizer/[^/]+\.(json|txt)"
    rf"|({'|'.join(FOLDERS.values())})/(config\.json|({'|'.join(STEMS)})(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?)"
)


def check_target(target: Path, single: bool, overwrite: bool) -> None:
    """Raises RequestError where something is in the way that is not to be replaced."""
    if not target.exists():
        return
    if target.is_dir() == single:
        raise RequestError(f"{target} is a {'folder' if single else 'file'}; choose another name")
    there = [] if single else [path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()]
    if others := [printable(path) for path in sorted(there) if not OF_A_MODEL.fullmatch(path)]:
        raise RequestError(
            f"{target} holds {len(others)} files that are no part of a model and would be lost "
            f"({', '.join(others[:3])}{', …' if len(others) > 3 else ''}); choose another name"
        )
    if (single or there) and not overwrite:
        raise RequestError(f"{target} exists; choose another name, or --overwrite")


def _report(checkpoint: Checkpoint, conversion: Conversion, single: bool) -> None:
    """Log what the result will not hold."""
    for note in checkpoint.notes:
        log.info("%s", note)
    if not checkpoint.borrowed and checkpoint.path.is_file() and (sidecar := find_sidecar_vae(checkpoint.path)):
        log.info("left out: %s, which takes the place of the VAE when this is loaded; bake it in with --vae", sidecar)
    if single and (preview := checkpoint.path / PREVIEW).is_file():
        log.info("left out: %s, which only a folder can hold", preview)
    for contents in checkpoint.contents.values():
        for reason, tensors in {**contents.ignored, "of no known use": contents.unknown}.items():
            if tensors and (conversion.prune or reason == REPLACED):
                log.info("left out: %s (%s)", reason, describe(list(tensors)))


@dataclass(frozen=True)
class File:
    """A file to write: tensors with metadata, or text. Raises CheckpointError where two tensors have one name."""

    tensors: list[Output]
    metadata: Mapping[str, str]
    text: str = ""

    def __post_init__(self) -> None:
        counts = Counter(output.name for output in self.tensors)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise CheckpointError(
                f"{describe(twice)} would be in the result twice, because tensors of no known use have these names; "
                "use --prune to leave those out"
            )


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
    plain = {name: _of_shapes(part) for name, part in checkpoint.parts.items()}
    model = replace(SD_V1, schedule=checkpoint.schedule, **read_habits(checkpoint))
    metadata = {}
    marked = any(MARKS in contents.ignored for contents in checkpoint.contents.values())
    if (parts, model) != (plain, SD_V1) or marked:  # by keys, which may say something else than was chosen
        content = configs.parts_to_json(parts, model)
        content |= {"scheduler": configs.schedule_to_json(checkpoint.schedule)} if "unet" in parts else {}
        metadata[CONFIG_KEY] = json.dumps(content)
    prediction_type = checkpoint.schedule.prediction_type
    if MODELSPEC_KEY in checkpoint.metadata or prediction_type != SD_V1.schedule.prediction_type:  # for other tools
        metadata[MODELSPEC_KEY] = next(name for name, type_ in PARAMETERIZATIONS.items() if type_ == prediction_type)
    if "text" in parts and (tables := read_vocabulary(checkpoint.tokenizer, checkpoint.path)) != shipped_vocabulary():
        metadata[TOKENIZER_KEY] = json.dumps({"model": {"vocab": tables[0], "merges": tables[1]}}, ensure_ascii=False)
    return metadata


def _of_shapes(part: Part) -> Any:
    """The config that a reader would guess; None where there is none that fits."""
    try:
        return replace(part, json=None, hints={}).read_config()
    except CheckpointError:
        return None


def _plan_folder(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, File]:
    metadata = {"format": "pt", **checkpoint.metadata}
    for key in (CONFIG_KEY, TOKENIZER_KEY, MODELSPEC_KEY):  # which the folder's own files tell
        metadata.pop(key, None)
    files = {
        f"{FOLDERS[name]}/{FOLDER_FILES[name]}": File(
            list(_part_outputs(checkpoint, name, FOLDER, conversion)), metadata
        )
        for name in checkpoint.parts
    }
    if absent := [label for name, label in LABELS.items() if name not in checkpoint.parts]:
        raise CheckpointError(
            f"{checkpoint.path}: holds no {' and no '.join(absent)}, and a folder needs all three networks; "
            "add them with --vae and --text-encoder, or choose a target that ends in .safetensors"
        )
    config = read_config(checkpoint)
    if extras := _extra_outputs(checkpoint, conversion):
        files[EXTRAS] = File(extras, metadata)
    texts: dict[str, Any] = {
        "model_index.json": configs.MODEL_INDEX,
        "scheduler/scheduler_config.json": configs.schedule_to_json(config.schedule),
    }
    for folder, content in configs.parts_to_json({name: getattr(config, name) for name in LABELS}, config).items():
        texts[f"{folder}/config.json"] = content
    vocab, merges = read_vocabulary(checkpoint.tokenizer, checkpoint.path)
    texts["tokenizer/vocab.json"] = vocab
    texts["tokenizer/tokenizer_config.json"] = configs.tokenizer_to_json(config.text.max_length)
    files |= {name: File([], {}, json.dumps(text, ensure_ascii=False, indent=2)) for name, text in texts.items()}
    if (preview := checkpoint.path / PREVIEW).is_file():
        files[PREVIEW] = File([], {}, read_text(preview, MAX_CONFIG_BYTES))
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
        sources = ({**checkpoint.borrowed, **checkpoint.contents}[part.where], *checkpoint.contents.values())
        found = [tensor for contents in sources for tensor in contents.ignored.get(POSITION_IDS, {}).values()]
        if found:
            ids = _sound_position_ids(found[0], config.max_length)
            yield Output(f"{layout.prefix}embeddings.position_ids", ids, ids.dtype, ids.shape)


def _sound_position_ids(tensor: StoredTensor, length: int) -> StoredTensor:
    """The constant as it should be: merging tools turn it into floats, and average it."""
    sound = torch.arange(length)[None]
    if tensor.dtype == "I64" and tensor.numel == length and torch.equal(tensor.load().reshape(1, -1), sound):
        return tensor
    log.warning("%s: repaired: it was %s and is the numbers from 0 again", tensor.name, TORCH_DTYPES[tensor.dtype])
    return StoredTensor(tensor.name, "I64", (1, length), lambda: sound, mapped=False)


def _extra_outputs(checkpoint: Checkpoint, conversion: Conversion) -> list[Output]:
    """What is kept although no network needs it, under its own names; only EMA weights are cast with the rest."""
    written_elsewhere = {REPLACED, *([POSITION_IDS] if "text" in checkpoint.parts else [])}
    return [
        Output(name, tensor, conversion.dtype_of(tensor) if reason == EMA else tensor.dtype, tensor.shape)
        for contents in (() if conversion.prune else checkpoint.contents.values())
        for reason, tensors in {**contents.ignored, "": contents.unknown}.items()
        for name, tensor in tensors.items()
        if reason not in written_elsewhere
    ]


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
