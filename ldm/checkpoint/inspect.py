"""What a file is and holds, from its header alone: no tensor is read, and torch is only imported for pickles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.detect import OtherFamilyError, cfg_scale_from_json
from ldm.checkpoint.files import TORCH_DTYPES, StoredTensor, open_tensors
from ldm.checkpoint.layouts import EMA, POSITION_IDS, Part
from ldm.checkpoint.names import VAE_ATTENTION_PLACES
from ldm.checkpoint.sources import Checkpoint, find_sidecar_vae, open_checkpoint
from ldm.config import LABELS
from ldm.errors import CheckpointError, printable

VARIANTS = {4: "text to image", 8: "InstructPix2Pix", 9: "inpainting"}  # by the U-Net's input channels
SHORT_HASH = 10  # digits of the sha256 that AUTOMATIC1111 shows


def inspect(path: Path) -> dict[str, Any]:
    """A report in plain data. Raises CheckpointError for a file that cannot be read at all."""
    try:
        checkpoint = open_checkpoint(path, sidecar_vae=False)
    except OtherFamilyError as other:
        return _describe_other(path, other.family)
    try:
        parts = {name: _describe_part(part) for name, part in checkpoint.parts.items()}
    except OtherFamilyError as other:
        return _describe_other(path, other.family)
    unet = parts.get("unet", {}).get("config", {})
    files = checkpoint.contents.values()
    return {
        "path": str(path),
        "family": "Stable Diffusion v1",
        "variant": VARIANTS.get(unet.get("in_channels")),
        "bytes": _size(path),
        "parts": parts,
        "absent": [name for name in LABELS if name not in parts],
        "prediction_type": checkpoint.schedule.prediction_type if "unet" in parts else None,
        "prediction_reason": checkpoint.prediction_reason,
        "zero_terminal_snr": checkpoint.schedule.zero_terminal_snr,
        "ema": sum(len(contents.ignored.get(EMA, ())) for contents in files),
        "ignored": _count_ignored(checkpoint),
        "unknown": sorted(name for contents in files for name in contents.unknown),
        "repaired": list(_repairs(checkpoint)),
        "notes": [*checkpoint.notes, *_sidecars(path)],
        "metadata": dict(checkpoint.metadata),
    }


def _describe_other(path: Path, family: str) -> dict[str, Any]:
    report: dict[str, Any] = {"path": str(path), "family": family, "bytes": _size(path)}
    if path.is_file():
        file = open_tensors(path)
        report |= _describe_tensors(file.tensors.values()) | {"metadata": dict(file.metadata)}
    return report


def _describe_tensors(tensors: Iterable[StoredTensor]) -> dict[str, Any]:
    counts = Counter(TORCH_DTYPES[tensor.dtype] for tensor in tensors)
    return {
        "tensors": sum(counts.values()),
        "parameters": sum(tensor.numel for tensor in tensors),
        "dtypes": dict(counts.most_common()),
    }


def _describe_part(part: Part) -> dict[str, Any]:
    report = {"names": part.spelling, "prefix": part.prefix, "file": part.where} | _describe_tensors(
        part.tensors.values()
    )
    try:
        config = part.read_config()
        habits = {"cfg_scale": cfg_scale_from_json(part.json or {}, part.where)} if part.name == "unet" else {}
    except OtherFamilyError:
        raise
    except CheckpointError as error:
        return report | {"fault": str(error)}
    expected = part.expected(config)
    return report | {
        "config": vars(config) | habits,
        "missing": [part.prefix + name for name in expected if name not in part.tensors],
        "unexpected": [part.prefix + name for name in part.tensors if name not in expected],
    }


def _count_ignored(checkpoint: Checkpoint) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for contents in checkpoint.contents.values():
        counts.update({reason: len(tensors) for reason, tensors in contents.ignored.items()})
    return dict(counts)


def _repairs(checkpoint: Checkpoint) -> Iterable[str]:
    """What loading changes beyond renaming prefixes."""
    for contents in checkpoint.contents.values():
        for name, tensor in contents.ignored.get(POSITION_IDS, {}).items():
            if tensor.dtype != "I64":
                yield f"{name} are {TORCH_DTYPES[tensor.dtype]}: made anew"
    for part in checkpoint.parts.values():
        renamed = sum(not tensor.name.endswith(name) for name, tensor in part.tensors.items())
        if renamed:
            yield f"{LABELS[part.name]}: {renamed} tensors renamed from another spelling"
        narrow = sum(tensor.dtype.startswith("F8") for tensor in part.tensors.values())
        if narrow:
            yield f"{LABELS[part.name]}: {narrow} tensors widened from float8"
    if (vae := checkpoint.parts.get("vae")) is not None:
        dims = {"compvis": 4, "diffusers": 2}[vae.spelling]
        place = VAE_ATTENTION_PLACES[vae.spelling]
        reshaped = [
            name for name, tensor in vae.tensors.items() if place in name and len(tensor.shape) not in (1, dims)
        ]
        if reshaped:
            yield f"VAE: {len(reshaped)} attention weights reshaped"


def _sidecars(path: Path) -> Iterable[str]:
    if path.is_file() and (vae := find_sidecar_vae(path)) is not None:
        yield f"{vae.name} beside it will take the place of its VAE"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def to_text(report: Mapping[str, Any]) -> str:
    """A report for people: a line for each thing to know."""
    lines = [f"{report['path']}: {report['family']}" + (f", {report['variant']}" if report.get("variant") else "")]

    def row(label: str, text: str) -> None:
        lines.append(f"  {label:<13} {text}")

    row("size", f"{report['bytes'] / 1e9:.2f} GB" if report["bytes"] >= 1e8 else f"{report['bytes'] / 1e6:.2f} MB")
    if report.get("tensors"):
        row("holds", _summary(report))
    for name, part in report.get("parts", {}).items():
        row(
            LABELS[name],
            ", ".join(
                [_summary(part)]
                + ([f"{part['names']} names"] if name != "text" else [])  # whose names are the same everywhere
                + ([f"{part['prefix']}*"] if part["prefix"] else [])
            ),
        )
        for problem in ("missing", "unexpected"):
            if names := part.get(problem):
                row("", f"{problem}: {_list(names)}")
        if "fault" in part:
            row("", f"fault: {part['fault']}")
    if report.get("absent"):
        row("absent", ", ".join(LABELS[name] for name in report["absent"]))
    if report.get("prediction_type"):
        snr = ", zero-terminal SNR" if report["zero_terminal_snr"] else ""
        row("predicts", f"{report['prediction_type']}{snr} ({report['prediction_reason']})")
    if report.get("ignored"):
        row("not needed", ", ".join(f"{reason} ({count})" for reason, count in report["ignored"].items()))
    if report.get("unknown"):
        row("unknown", _list(report["unknown"]))
    for text in [*report.get("repaired", ()), *report.get("notes", ())]:
        row("repaired" if text in report["repaired"] else "note", text)
    for key in ("sha256", "short hash"):
        if key in report:
            row(key, report[key])
    for key, value in report.get("metadata", {}).items():
        row("metadata", f"{printable(key)}: {printable(value)}")
    return "\n".join(lines)


def _summary(part: Mapping[str, Any]) -> str:
    dtypes = ", ".join(part["dtypes"])
    return f"{part['parameters'] / 1e6:.1f} M parameters in {part['tensors']} tensors, {dtypes}"


def _list(names: list[str], most: int = 5) -> str:
    return f"{len(names)}: " + ", ".join(map(printable, names[:most])) + (", …" if len(names) > most else "")
