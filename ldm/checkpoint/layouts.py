"""Where the networks are: in single files with CompVis names, diffusers folders, or files of one network alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from torch import Tensor

from ldm.checkpoint import detect
from ldm.checkpoint.files import read_json, read_tensors
from ldm.checkpoint.names import DIFFUSERS_VAE_ALIASES
from ldm.config import ScheduleConfig
from ldm.errors import CheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One network's tensors, their common prefix removed, as views of the file's memory map."""

    name: str  # "unet", "vae" or "text"
    where: str  # for messages
    prefix: str  # what was removed
    spelling: str  # a column of the name tables: "compvis" or "diffusers"
    tensors: Mapping[str, Tensor]
    json: detect.Json | None = None  # the config.json beside the file

    def read_config(self) -> Any:
        """The UNetConfig, VAEConfig or TextConfig that the JSON or the shapes tell. Raises CheckpointError."""
        label = LABELS[self.name]
        try:
            if self.json is not None:
                return FROM_JSON[self.name](self.json, self.where)
            if (self.name, self.spelling) == ("unet", "diffusers"):
                raise CheckpointError(f"{self.where}: a U-Net in diffusers' names needs its config.json beside it")
            shapes = {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}
            return FROM_SHAPES[self.name](shapes, self.spelling, self.where)
        except KeyError as error:
            missing = f"{self.prefix}{error.args[0]}"
            raise CheckpointError(f"{self.where}: the {label} is incomplete: {missing} is missing") from error
        except (IndexError, ValueError) as error:
            raise CheckpointError(f"{self.where}: this {label} cannot be built: {error}") from error


LABELS = {"unet": "U-Net", "vae": "VAE", "text": "text encoder"}
FROM_JSON = {"unet": detect.unet_from_json, "vae": detect.vae_from_json, "text": detect.text_from_json}
FROM_SHAPES: dict[str, Callable[[detect.Shapes, str, str], Any]] = {
    "unet": detect.unet_from_shapes,
    "vae": detect.vae_from_shapes,
    "text": detect.text_from_shapes,
}


@dataclass(frozen=True)
class Checkpoint:
    """What was found at a path."""

    parts: Mapping[str, Part]  # some of "unet", "vae", "text"
    schedule: ScheduleConfig
    tokenizer_folder: Path | None = None

    def part(self, name: str, where: Path) -> Part:
        if name not in self.parts:
            found = ", ".join(LABELS[part] for part in self.parts)
            raise CheckpointError(f"{where}: holds no {LABELS[name]} (found: {found}); use a file that has one")
        return self.parts[name]


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
    return _open_folder(path) if path.is_dir() else _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    tensors, ignored = drop_ignored(read_tensors(path))
    for reason, count in ignored.items():
        log.info("%s: left out, not needed: %s (%d tensors)", path, reason, count)
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
    if alone:
        return _open_network(path, alone)
    parts: dict[str, Part] = {}
    for prefix, group in groups.items():
        name = COMPVIS_PREFIXES[prefix]
        if name in parts:
            raise CheckpointError(f"{path}: has two text encoders, with and without the text_model level")
        parts[name] = Part(name, str(path), prefix, "compvis", group)
    return Checkpoint(parts, ScheduleConfig())


def describe(names: list[str], most: int = 3) -> str:
    """A list of tensor names, the first few of them in full: names are the file's, and may be anything."""
    shown = ", ".join(name if name.isprintable() and len(name) < 200 else brief(name) for name in sorted(names)[:most])
    return f"{len(names)} tensors ({shown}{', …' if len(names) > most else ''})"


def _open_network(path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    """A file of one network, whose config and tokenizer may lie beside it."""
    found = next((SIGNATURES[name] for name in SIGNATURES if name in tensors), None)
    if found is None:
        raise CheckpointError(f"{path}: {describe(list(tensors))} are not those of a Stable Diffusion v1.x model")
    name, spelling = found
    prefix = "text_model." if name == "text" and all(key.startswith("text_model.") for key in tensors) else ""
    tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    if found == ("vae", "diffusers"):
        tensors = _with_new_names(path, tensors)
    config = path.parent / "config.json"
    json = read_json(config) if spelling == "diffusers" and config.is_file() else None
    part = Part(name, str(path), prefix, spelling, tensors, json)
    return Checkpoint({name: part}, ScheduleConfig(), _existing(path.parent.parent / "tokenizer"))


def _with_new_names(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in DIFFUSERS_VAE_ALIASES.items():
            name = name.replace(old, new)
        if name in renamed:
            raise CheckpointError(f"{path}: has {name} twice, by its old name and its new one")
        renamed[name] = tensor
    return renamed


def _existing(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None


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
            return _open_file(_weight_file(path))
        raise CheckpointError(
            f"{path}: a folder without model_index.json; expected a diffusers model, or give one file"
        )
    parts = {
        name: _open_file(_weight_file(path / folder)).part(name, path / folder)
        for name, folder in FOLDERS.items()
        if (path / folder).is_dir()
    }
    scheduler = path / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise CheckpointError(f"{path}: scheduler/scheduler_config.json is missing; copy the whole folder again")
    schedule = detect.schedule_from_json(read_json(scheduler), str(scheduler))
    return Checkpoint(parts, schedule, _existing(path / "tokenizer"))


def _weight_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: no weights found; expected {WEIGHT_FILES[0]} or a .fp16 variant of it")
