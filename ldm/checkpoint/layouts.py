"""Where the networks are: in single files with CompVis names, diffusers folders, or files of one network alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import detect
from ldm.checkpoint.files import read_json, read_tensors
from ldm.checkpoint.names import DIFFUSERS_VAE_ALIASES
from ldm.config import ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ldm.errors import CheckpointError


@dataclass(frozen=True)
class Part:
    """One network's tensors, their common prefix removed, as views of the file's memory map."""

    where: str  # for messages
    prefix: str  # what was removed
    spelling: str  # a column of the name tables: "compvis" or "diffusers"
    tensors: Mapping[str, Tensor]
    config: Any  # UNetConfig, VAEConfig or TextConfig


@dataclass(frozen=True)
class Checkpoint:
    """What was found at a path. `ignored` counts, by reason, the tensors that are left out on purpose."""

    parts: Mapping[str, Part]  # some of "unet", "vae", "text"
    ignored: Mapping[str, int]
    schedule: ScheduleConfig
    tokenizer_folder: Path | None = None
    image_size: int | None = None

    def part(self, name: str, where: Path) -> Part:
        if name not in self.parts:
            found = ", ".join(LABELS[part] for part in self.parts)
            raise CheckpointError(f"{where}: holds no {LABELS[name]} (found: {found}); use a file that has one")
        return self.parts[name]


LABELS = {"unet": "U-Net", "vae": "VAE", "text": "text encoder"}

# The prefixes of a CompVis single file. The longer of two that fit is meant.
COMPVIS_PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.text_model.": "text",
    "cond_stage_model.transformer.": "text",
}

# Tensors that are not needed, by reason.
IGNORED = {
    "noise schedule": r"betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|lvlb_weights|logvar"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])",
    "EMA weights": r"model_ema\..*",
    "position ids": r"(.*\.)?position_ids",
    "VAE training loss": r"(first_stage_model\.)?loss\..*",
    "text projection": r"(cond_stage_model\.transformer\.)?text_projection(\.weight)?",
}


def drop_ignored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors that are needed, and how many are not, by reason."""
    rules = {reason: re.compile(pattern) for reason, pattern in IGNORED.items()}
    kept: dict[str, Tensor] = {}
    ignored: dict[str, int] = {}
    for name, tensor in tensors.items():
        reason = next((reason for reason, rule in rules.items() if rule.fullmatch(name)), None)
        if reason is None:
            kept[name] = tensor
        else:
            ignored[reason] = ignored.get(reason, 0) + 1
    return kept, ignored


# A file of one network alone is known by a name that only it has.
SIGNATURES = {
    "input_blocks.0.0.weight": ("unet", "compvis"),
    "down_blocks.0.resnets.0.time_emb_proj.weight": ("unet", "diffusers"),
    "encoder.down.0.block.0.conv1.weight": ("vae", "compvis"),
    "encoder.down_blocks.0.resnets.0.conv1.weight": ("vae", "diffusers"),
    "embeddings.token_embedding.weight": ("text", "diffusers"),
    "text_model.embeddings.token_embedding.weight": ("text", "diffusers"),
}


def open_checkpoint(path: Path) -> Checkpoint:
    """Find the networks at `path`, a file or a folder. Raises CheckpointError for what is not an SD v1.x model."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; give the path of a model on this machine")
    if path.is_dir():
        return _open_folder(path)
    tensors, ignored = drop_ignored(read_tensors(path))
    if not tensors:
        raise CheckpointError(f"{path}: holds no network")
    detect.check_family(tensors, str(path))
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in COMPVIS_PREFIXES if name.startswith(p)), "")
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = tensor
    alone = groups.pop("", {})
    if alone and groups:
        raise CheckpointError(
            f"{path}: {describe(list(alone))} belong to no known part of a Stable Diffusion v1.x model"
        )
    parts = {}
    for prefix, group in groups.items():
        name = COMPVIS_PREFIXES[prefix]
        if name in parts:
            raise CheckpointError(f"{path}: has two text encoders, with and without the text_model level")
        parts[name] = _part(name, str(path), prefix, "compvis", group)
    if alone:
        name, part = _part_alone(path, alone)
        parts[name] = part
    return Checkpoint(parts, ignored, ScheduleConfig())


def describe(names: list[str], most: int = 3) -> str:
    """A list of tensor names, the first few of them in full."""
    shown = ", ".join(sorted(names)[:most])
    return f"{len(names)} tensors ({shown}{', …' if len(names) > most else ''})"


def _part_alone(path: Path, tensors: dict[str, Tensor]) -> tuple[str, Part]:
    """A file of one network, whose config may lie beside it."""
    found = next((SIGNATURES[name] for name in SIGNATURES if name in tensors), None)
    if found is None:
        raise CheckpointError(f"{path}: {describe(list(tensors))} are not those of a Stable Diffusion v1.x model")
    name, spelling = found
    beside = path.parent / "config.json"
    json = read_json(beside) if spelling == "diffusers" and beside.is_file() else None
    return name, _part(name, str(path), "", spelling, tensors, json)


def _part(
    name: str, where: str, prefix: str, spelling: str, tensors: dict[str, Tensor], json: detect.Json | None = None
) -> Part:
    if name == "text" and all(key.startswith("text_model.") for key in tensors):
        prefix += "text_model."
        tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    if (name, spelling) == ("vae", "diffusers"):
        for old, new in DIFFUSERS_VAE_ALIASES.items():
            tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        config = FROM_JSON[name](json, where) if json is not None else _from_shapes(name, where, spelling, shapes)
    except KeyError as error:
        raise CheckpointError(
            f"{where}: the {LABELS[name]} is incomplete: {prefix}{error.args[0]} is missing"
        ) from error
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{where}: this {LABELS[name]} cannot be built: {error}") from error
    return Part(where, prefix, spelling, tensors, config)


FROM_JSON: dict[str, Callable[[detect.Json, str], UNetConfig | VAEConfig | TextConfig]] = {
    "unet": detect.unet_from_json,
    "vae": detect.vae_from_json,
    "text": detect.text_from_json,
}


def _from_shapes(name: str, where: str, spelling: str, shapes: detect.Shapes) -> UNetConfig | VAEConfig | TextConfig:
    if name == "vae":
        return detect.vae_from_shapes(shapes, spelling, where)
    if name == "text":
        return detect.text_from_shapes(shapes)
    if spelling == "diffusers":
        raise CheckpointError(f"{where}: a U-Net in diffusers' names needs its config.json beside it")
    return detect.unet_from_shapes(shapes, where)


# The folders of a diffusers model, and the weights in them: the plain file first, then half precision, then pickles.
FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
WEIGHT_FILES = [
    f"{stem}{variant}"
    for variant in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
]


def _open_folder(path: Path) -> Checkpoint:
    if not (path / "model_index.json").is_file():
        if any((path / name).is_file() for name in WEIGHT_FILES):  # one network's own folder
            tokenizer = path.parent / "tokenizer"
            return replace(
                open_checkpoint(_weight_file(path)), tokenizer_folder=tokenizer if tokenizer.is_dir() else None
            )
        raise CheckpointError(
            f"{path}: a folder without model_index.json; expected a diffusers model, or give one file"
        )
    parts: dict[str, Part] = {}
    ignored: dict[str, int] = {}
    for name, folder in FOLDERS.items():
        if not (path / folder).is_dir():
            continue
        opened = open_checkpoint(_weight_file(path / folder))
        parts[name] = opened.part(name, path / folder)
        ignored.update(opened.ignored)
    scheduler = path / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise CheckpointError(f"{path}: scheduler/scheduler_config.json is missing; copy the whole folder again")
    tokenizer = path / "tokenizer"
    return Checkpoint(
        parts,
        ignored,
        detect.schedule_from_json(read_json(scheduler), str(scheduler)),
        tokenizer if tokenizer.is_dir() else None,
        _image_size(path, parts),
    )


def _weight_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: no weights found; expected {WEIGHT_FILES[0]} or a .fp16 variant of it")


def _image_size(path: Path, parts: Mapping[str, Part]) -> int | None:
    """The side of the pictures the model was trained on, where the U-Net's config tells."""
    config = path / "unet" / "config.json"
    sample_size = read_json(config).get("sample_size") if config.is_file() else None
    if type(sample_size) is not int or not 1 <= sample_size <= 1024 or "vae" not in parts:
        return None
    return sample_size * parts["vae"].config.downsampling
