"""Opening a model: a single file with what lies beside it, or a diffusers folder; and the noise schedule it wants."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ldm.checkpoint import detect
from ldm.checkpoint.files import TensorFile, open_tensors, parse_json, read_json, read_yaml
from ldm.checkpoint.folders import EXTRAS, FOLDERS, is_component, open_component
from ldm.checkpoint.layouts import LABELS, MARKS, Contents, Part, describe, read_extras, read_layout
from ldm.config import ScheduleConfig
from ldm.diffusion.prediction import PREDICTION_TYPES
from ldm.errors import CheckpointError, RequestError

log = logging.getLogger(__name__)

# Entries of a single file's metadata that we write: what CompVis's names and shapes cannot tell, as JSON.
CONFIG_KEY, TOKENIZER_KEY = "ldm.config", "ldm.tokenizer"
MODELSPEC_KEY = "modelspec.prediction_type"  # https://github.com/Stability-AI/ModelSpec
VAE_SIDECARS = (".vae.safetensors", ".vae.pt", ".vae.ckpt")


@dataclass(frozen=True)
class Choices:
    """What to take from where, beyond the model's own. Raises RequestError for an unknown prediction type."""

    vae: str | Path | None = None  # a file or folder whose VAE to use
    text_encoder: str | Path | None = None  # a file or folder whose text encoder to use
    ema: bool = False  # the EMA weights of the U-Net
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            raise RequestError(
                f"prediction_type is {self.prediction_type!r:.50}: use one of {', '.join(PREDICTION_TYPES)}"
            )


@dataclass(frozen=True)
class Checkpoint:
    """What was found at a path."""

    path: Path
    parts: Mapping[str, Part]  # some of "unet", "vae", "text"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction_reason: str = ""  # why this prediction type
    tokenizer: Path | detect.Json | None = None  # the folder of it, or the tables
    metadata: Mapping[str, str] = field(default_factory=dict)
    contents: Mapping[str, Contents] = field(default_factory=dict)  # by file
    notes: tuple[str, ...] = ()  # what else a user should know

    def part(self, name: str) -> Part:
        if name not in self.parts:
            found = ", ".join(LABELS[part] for part in self.parts)
            flag = {"vae": "--vae FILE", "text": "--text-encoder FILE"}.get(name)
            remedy = f"give one with {flag}" if flag else "use a file that has one"
            raise CheckpointError(f"{self.path}: holds no {LABELS[name]} (found: {found}); {remedy}")
        return self.parts[name]

    def report(self) -> None:
        """Log what a user should know about how the file was read."""
        for where, contents in self.contents.items():
            for reason, tensors in contents.ignored.items():
                log.info("%s: left out, not needed: %s (%d tensors)", where, reason, len(tensors))
            if contents.unknown:
                log.warning("%s: left out, of no known use: %s", where, describe(list(contents.unknown)))
        for note in self.notes:
            log.info("%s", note)
        if self.prediction_reason:
            log.info("%s: predicts %s (%s)", self.path, self.schedule.prediction_type, self.prediction_reason)


def open_checkpoint(path: Path, choices: Choices = Choices(), sidecar_vae: bool = True) -> Checkpoint:
    """Find the networks at `path`, a file or a folder. Raises CheckpointError for what is not an SD v1.x model."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; give the path of a model on this machine")
    checkpoint = _open_folder(path, choices) if path.is_dir() else _open_file(path, choices, sidecar_vae)
    for name, given in {"vae": choices.vae, "text": choices.text_encoder}.items():
        if given is not None:
            checkpoint = _with_part(checkpoint, name, Path(given))
    return checkpoint


def _with_part(checkpoint: Checkpoint, name: str, path: Path) -> Checkpoint:
    """The checkpoint with a network from another file or folder; a text encoder brings its tokenizer."""
    other = open_checkpoint(path, sidecar_vae=False)
    return replace(
        checkpoint,
        parts={**checkpoint.parts, name: other.part(name)},
        contents={**checkpoint.contents, **other.contents},
        tokenizer=other.tokenizer if name == "text" else checkpoint.tokenizer,
    )


def _open_file(path: Path, choices: Choices, sidecar_vae: bool) -> Checkpoint:
    file = open_tensors(path)
    contents = read_layout(file, choices.ema)
    notes = [f"{path}: left out, training state: {', '.join(file.others)[:200]}"] if file.others else []
    parts, beside = dict(contents.parts), path.parent
    embedded = parse_json(file.metadata[CONFIG_KEY], f"{path}: {CONFIG_KEY}") if CONFIG_KEY in file.metadata else {}
    for name, part in parts.items():
        config = embedded.get(FOLDERS[name])
        if isinstance(config, dict):
            parts[name] = replace(part, json=config)
        elif part.spelling == "diffusers" and len(parts) == 1 and (beside / "config.json").is_file():
            parts[name] = replace(part, json=read_json(beside / "config.json"))
    schedule_json = embedded.get("scheduler")
    if (yaml_path := path.with_suffix(".yaml")).is_file() and "unet" in parts:
        yaml = read_yaml(yaml_path)
        for name, hints in detect.hints_from_yaml(yaml, str(yaml_path)).items():
            if name in parts:
                parts[name] = replace(parts[name], hints=hints)
    else:
        yaml = None
    sources = [
        ("its keys", _from_marks(contents)),
        ("its metadata", _from_modelspec(file)),
        (yaml_path.name, detect.schedule_from_yaml(yaml, str(yaml_path)) if yaml else {}),
        ("its metadata", _from_scheduler(schedule_json, f"{path}: {CONFIG_KEY}") if schedule_json else {}),
    ]
    schedule, reason = _schedule(sources, choices) if "unet" in parts else (ScheduleConfig(), "")
    checkpoint = Checkpoint(
        path, parts, schedule, reason, _tokenizer(file, path), file.metadata, {str(path): contents}, tuple(notes)
    )
    if sidecar_vae and choices.vae is None and "unet" in parts:
        for sidecar in (path.with_suffix(suffix) for suffix in VAE_SIDECARS):
            if sidecar.is_file():
                with_vae = _with_part(checkpoint, "vae", sidecar)
                return replace(with_vae, notes=(*checkpoint.notes, f"{path}: its VAE is taken from {sidecar.name}"))
    return checkpoint


def _tokenizer(file: TensorFile, path: Path) -> Path | detect.Json | None:
    """The tables in a single file's metadata, or the folder beside that of a component."""
    if TOKENIZER_KEY in file.metadata:
        return parse_json(file.metadata[TOKENIZER_KEY], f"{path}: {TOKENIZER_KEY}")
    folder = path.parent.parent / "tokenizer"
    return folder if folder.is_dir() else None


def _open_folder(path: Path, choices: Choices) -> Checkpoint:
    if not (path / "model_index.json").is_file():
        if is_component(path):
            return _open_component(path)
        raise CheckpointError(
            f"{path}: a folder without model_index.json; expected a diffusers model, or give one file"
        )
    if choices.ema:
        raise CheckpointError(f"{path}: a folder in diffusers' layout holds no EMA weights; leave out --ema")
    opened = {name: _open_component(path / folder) for name, folder in FOLDERS.items() if (path / folder).is_dir()}
    scheduler = path / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise CheckpointError(f"{path}: scheduler/scheduler_config.json is missing; copy the whole folder again")
    contents = {where: found for component in opened.values() for where, found in component.contents.items()}
    if (path / EXTRAS).is_file():
        contents[str(path / EXTRAS)] = read_extras(open_tensors(path / EXTRAS))
    schedule, reason = _schedule([(scheduler.name, _from_scheduler(read_json(scheduler), str(scheduler)))], choices)
    return Checkpoint(
        path,
        {name: component.part(name) for name, component in opened.items()},
        schedule,
        reason,
        path / "tokenizer" if (path / "tokenizer").is_dir() else None,
        opened["unet"].metadata if "unet" in opened else {},
        contents,
    )


def _open_component(folder: Path) -> Checkpoint:
    """One network's own folder, its config.json beside it."""
    file = open_component(folder)
    contents = read_layout(file)
    config = folder / "config.json"
    json = read_json(config) if config.is_file() else None
    parts = {name: replace(part, json=json) for name, part in contents.parts.items()}
    tokenizer = _tokenizer(file, file.path)
    return Checkpoint(folder, parts, tokenizer=tokenizer, metadata=file.metadata, contents={str(file.path): contents})


def _schedule(sources: list[tuple[str, dict[str, Any]]], choices: Choices) -> tuple[ScheduleConfig, str]:
    """The schedule that the sources tell, a later one before an earlier, and which of them told the prediction type."""
    asked = {name: getattr(choices, name) for name in ("prediction_type", "zero_terminal_snr")}
    values: dict[str, Any] = {}
    reason = "Stable Diffusion v1's: nothing else is said"
    for source, told in [*sources, ("asked for", {name: value for name, value in asked.items() if value is not None})]:
        values |= told
        if "prediction_type" in told:
            reason = source
    return ScheduleConfig(**values), reason


def _from_marks(contents: Contents) -> dict[str, Any]:
    """Some merges say by keys without content that they predict v, and that no signal is left at their last level."""
    marks = contents.ignored.get(MARKS, {})
    told: dict[str, Any] = {"prediction_type": "v_prediction"} if marks else {}
    return told | ({"zero_terminal_snr": True} if "ztsnr" in marks else {})


def _from_modelspec(file: TensorFile) -> dict[str, Any]:
    told = file.metadata.get(MODELSPEC_KEY)
    if told is None:
        return {}
    told = detect.PARAMETERIZATIONS.get(told, told)
    if told not in PREDICTION_TYPES:
        raise CheckpointError(
            f"{file.path}: {MODELSPEC_KEY} is {told!r:.50}; only {' and '.join(PREDICTION_TYPES)} are supported"
        )
    return {"prediction_type": told}


def _from_scheduler(json: Any, where: str) -> dict[str, Any]:
    if not isinstance(json, dict):
        raise CheckpointError(f"{where}: scheduler must be a JSON object")
    schedule = detect.schedule_from_json(json, where)
    return {f.name: getattr(schedule, f.name) for f in fields(ScheduleConfig)}
