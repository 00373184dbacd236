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
from ldm.checkpoint.layouts import MARKS, Contents, Part, describe, read_extras, read_layout
from ldm.config import LABELS, ScheduleConfig
from ldm.diffusion import NoiseSchedule
from ldm.diffusion.prediction import PREDICTION_TYPES
from ldm.errors import CheckpointError, RequestError, printable

log = logging.getLogger(__name__)

# Entries of a single file's metadata that we write: what CompVis's names and shapes cannot tell, as JSON.
CONFIG_KEY, TOKENIZER_KEY = "ldm.config", "ldm.tokenizer"
MODELSPEC_KEY = "modelspec.prediction_type"  # https://github.com/Stability-AI/ModelSpec
SCHEDULER_CONFIG = "scheduler_config.json"
MODEL_FOLDERS = {*FOLDERS.values(), "scheduler", "tokenizer"}
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
    contents: Mapping[str, Contents] = field(default_factory=dict)  # of its own files, by path
    borrowed: Mapping[str, Contents] = field(default_factory=dict)  # of others, of which it has but a network
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
        for where, contents in {**self.borrowed, **self.contents}.items():
            for reason, tensors in contents.ignored.items():
                log.info("%s: left out, not needed: %s (%d tensors)", where, reason, len(tensors))
            if contents.unknown:
                log.warning("%s: left out, of no known use: %s", where, describe(list(contents.unknown)))
        for note in self.notes:
            log.info("%s", note)
        if self.prediction_reason:
            log.info("%s: predicts %s (%s)", self.path, self.schedule.prediction_type, self.prediction_reason)


def open_checkpoint(path: Path, choices: Choices = Choices(), sidecar_vae: bool = True) -> Checkpoint:
    """Find the networks at `path`, a file or a folder; a VAE beside a single file only counts with `sidecar_vae`.

    Raises CheckpointError for what is not an SD v1.x model.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; give the path of a model on this machine")
    if path.is_dir():
        checkpoint = _open_folder(path, choices)
    else:
        checkpoint = _open_tensors(path, open_tensors(path), choices)
        if sidecar_vae and choices.vae is None:
            checkpoint = _with_sidecar_vae(checkpoint)
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
        borrowed={**checkpoint.borrowed, **other.contents},
        tokenizer=other.tokenizer if name == "text" else checkpoint.tokenizer,
    )


def _with_sidecar_vae(checkpoint: Checkpoint) -> Checkpoint:
    """With the VAE that lies beside a single file under its name, as other programs have it too."""
    path = checkpoint.path
    sidecar = find_sidecar_vae(path)
    if sidecar is None or "unet" not in checkpoint.parts:
        return checkpoint
    note = f"{path}: its VAE is taken from {sidecar.name}"
    return replace(_with_part(checkpoint, "vae", sidecar), notes=(*checkpoint.notes, note))


def find_sidecar_vae(path: Path) -> Path | None:
    return next((p for p in map(path.with_suffix, VAE_SIDECARS) if p.is_file()), None)


def _open_tensors(path: Path, file: TensorFile, choices: Choices) -> Checkpoint:
    """What a file holds, with what its metadata and the files beside it tell."""
    contents = read_layout(file, choices.ema)
    beside = _Beside(file, contents)
    parts = {name: beside.configured(part) for name, part in contents.parts.items()}
    schedule, reason = _schedule(path, beside.schedules(), choices) if "unet" in parts else (ScheduleConfig(), "")
    notes = (f"{file.path}: left out, training state: {printable(', '.join(file.others), 200)}",) if file.others else ()
    return Checkpoint(
        path, parts, schedule, reason, beside.tokenizer(), file.metadata, {str(file.path): contents}, notes=notes
    )


class _Beside:
    """What a file's metadata tell, its YAML, and the folder of a network that is alone in its file."""

    def __init__(self, file: TensorFile, contents: Contents):
        self.file, self.contents = file, contents
        self.alone = len(contents.parts) == 1
        self.model = file.path.parent.parent  # where a network alone has its folder
        self.embedded = self._metadata(CONFIG_KEY) or {}
        if not all(isinstance(told, dict) for told in self.embedded.values()):
            raise CheckpointError(f"{file.path}: {CONFIG_KEY} must be a JSON object of objects")
        path = file.path.with_suffix(".yaml")
        self.yaml = read_yaml(path) if "unet" in contents.parts and path.is_file() else {}
        self.yaml_name = str(path)

    def _metadata(self, key: str) -> detect.Json | None:
        text = self.file.metadata.get(key)
        return None if text is None else parse_json(text, f"{self.file.path}: {key}")

    def configured(self, part: Part) -> Part:
        """With the config that is told, or the hints."""
        config = self.file.path.with_name("config.json")
        if FOLDERS[part.name] in self.embedded:
            return replace(part, json=self.embedded[FOLDERS[part.name]])
        if part.spelling == "diffusers" and self.alone and config.is_file():
            return replace(part, json=read_json(config))
        return replace(part, hints=detect.hints_from_yaml(self.yaml, self.yaml_name).get(part.name, {}))

    def schedules(self) -> list[tuple[str, dict[str, Any]]]:
        """Who tells what of the noise schedule; the later ones count more."""
        scheduler = self.model / "scheduler" / SCHEDULER_CONFIG
        metadata = f"{self.file.path}: {CONFIG_KEY}"
        return [
            ("its keys", _from_marks(self.contents)),
            ("its metadata", _from_modelspec(self.file)),
            (Path(self.yaml_name).name, detect.schedule_from_yaml(self.yaml, self.yaml_name)),
            (scheduler.name, _from_scheduler(read_json(scheduler), str(scheduler)) if self._has(scheduler) else {}),
            (
                "its metadata",
                _from_scheduler(self.embedded["scheduler"], metadata) if "scheduler" in self.embedded else {},
            ),
        ]

    def tokenizer(self) -> Path | detect.Json | None:
        folder = self.model / "tokenizer"
        return self._metadata(TOKENIZER_KEY) or (folder if self._has(folder) else None)

    def _has(self, path: Path) -> bool:
        """Whether a network alone is part of a model's folder, which has this."""
        return self.alone and path.exists() and next(iter(self.contents.parts.values())).spelling == "diffusers"


def _open_folder(path: Path, choices: Choices) -> Checkpoint:
    if not (path / "model_index.json").is_file():
        if is_component(path):
            return _open_tensors(path, open_component(path), choices)
        raise CheckpointError(
            f"{path}: a folder without model_index.json; expected a diffusers model, or give one file"
        )
    if choices.ema:
        raise CheckpointError(
            f"{path}: EMA weights are taken from single files only; leave out --ema, or convert this to one first"
        )
    folders = {name: path / folder for name, folder in FOLDERS.items() if (path / folder).is_dir()}
    opened = {name: _open_tensors(folder, open_component(folder), choices) for name, folder in folders.items()}
    scheduler = path / "scheduler" / SCHEDULER_CONFIG
    if not scheduler.is_file():
        raise CheckpointError(f"{path}: scheduler/{SCHEDULER_CONFIG} is missing; copy the whole folder again")
    contents = {where: found for component in opened.values() for where, found in component.contents.items()}
    if (path / EXTRAS).is_file():
        contents[str(path / EXTRAS)] = read_extras(open_tensors(path / EXTRAS))
    notes = [note for component in opened.values() for note in component.notes]
    if surplus := sorted(p.name for p in path.iterdir() if p.is_dir() and p.name not in MODEL_FOLDERS):
        notes.append(f"{path}: not read: {printable(', '.join(surplus), 200)}")
    told = _from_scheduler(read_json(scheduler), str(scheduler))
    schedule, reason = _schedule(path, [(scheduler.name, told)], choices)
    return Checkpoint(
        path,
        {name: component.part(name) for name, component in opened.items()},
        schedule,
        reason,
        path / "tokenizer" if (path / "tokenizer").is_dir() else None,
        opened["unet"].metadata if "unet" in opened else {},
        contents,
        notes=tuple(notes),
    )


def _schedule(path: Path, sources: list[tuple[str, dict[str, Any]]], choices: Choices) -> tuple[ScheduleConfig, str]:
    """The schedule that the sources tell, a later one before an earlier, and which of them told the prediction type."""
    asked = {name: getattr(choices, name) for name in ("prediction_type", "zero_terminal_snr")}
    values: dict[str, Any] = {}
    reason = "Stable Diffusion v1's: nothing else is said"
    for source, told in [*sources, ("asked for", {name: value for name, value in asked.items() if value is not None})]:
        values |= told
        if "prediction_type" in told:
            reason = source
    schedule = ScheduleConfig(**values)
    try:
        NoiseSchedule(schedule)
    except ValueError as error:
        raise CheckpointError(f"{path}: its noise schedule cannot be: {error}") from error
    return schedule, reason


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
            f"{file.path}: {MODELSPEC_KEY} is {told!r:.50}; only {', '.join(PREDICTION_TYPES)} are supported"
        )
    return {"prediction_type": told}


def _from_scheduler(json: detect.Json, where: str) -> dict[str, Any]:
    schedule = detect.schedule_from_json(json, where)
    return {f.name: getattr(schedule, f.name) for f in fields(ScheduleConfig)}
