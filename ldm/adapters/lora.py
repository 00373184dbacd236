"""Reading a LoRA, or one of its relatives, from a file nobody has vouched for."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.adapters.keys import FOREIGN, TEXT, UNET, Target, spellings, split
from ldm.adapters.kinds import KINDS, Change, read_change, read_magnitude
from ldm.checkpoint import detect
from ldm.checkpoint.files import StoredTensor, TensorFile, open_tensors, parse_json, read_json
from ldm.checkpoint.layouts import describe
from ldm.errors import CheckpointError
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet

log = logging.getLogger(__name__)

MAX_ALPHA = 1e6  # alphas are about as large as ranks
Parameter = tuple[str, str]  # of which network ("unet" or "text"), and its name there


@dataclass(frozen=True, eq=False)
class Lora:
    """The changes that a file makes to a model's weights."""

    name: str
    changes: Mapping[Parameter, Change]


def read_lora(
    path: str | Path, unet: UNet, text: TextEncoder, *, name: str | None = None, allow_nonfinite: bool = False
) -> Lora:
    """A file's changes to these networks, every shape checked against them; `name` is the file's stem where not given.

    What belongs to no module, or is of an unknown kind, is left out with one warning. Raises CheckpointError for a
    file that changes nothing here, is incomplete or misshapen, or, unless `allow_nonfinite`, holds NaN or infinity.
    """
    path = Path(path)
    file = open_tensors(path)
    modules = _sort(file, spellings(unet.config, text.config))
    alphas = _read_alphas(file)
    weights: dict[Parameter, Tensor] = {
        (part, key): weight
        for part, network in [(UNET, unet), (TEXT, text)]
        for key, weight in network.named_parameters()
    }
    changes = {}
    try:
        for target, tensors in modules.items():
            for stored in tensors.values() if not allow_nonfinite else ():
                if not stored.load().float().isfinite().all():
                    raise ValueError(f"{stored.name!r:.150} holds NaN or infinity: the file is damaged")
            for leaf, change in _read_module(tensors, alphas, target, weights):
                changes[target.part, f"{target.module}.{leaf}"] = change
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Lora(name if name is not None else path.stem, changes)


def _sort(file: TensorFile, names: Mapping[str, Target]) -> dict[Target, dict[str, StoredTensor]]:
    """A file's tensors by the module they change and their part in the change."""
    modules: dict[Target, dict[str, StoredTensor]] = defaultdict(dict)
    strays: dict[str, list[str]] = defaultdict(list)
    for key, stored in file.tensors.items():
        if foreign := next((model for prefix, model in FOREIGN.items() if key.startswith(prefix)), None):
            raise CheckpointError(f"{file.path}: it is for {foreign}, whose {key!r:.150} this model has no place for")
        module, part = split(key) or (key, "")
        if not part:
            strays["of an unknown kind"].append(key)
        elif module not in names:
            strays["not in this model"].append(key)
        elif other := modules[names[module]].get(part):
            raise CheckpointError(
                f"{file.path}: {key!r:.150} and {other.name!r:.150} are the same, spelled in two ways"
            )
        else:
            modules[names[module]][part] = stored
    for target in [target for target, parts in modules.items() if parts.keys() == {"alpha"}]:
        strays["without anything to scale"].append(modules.pop(target)["alpha"].name)
    described = "; ".join(f"{reason}: {describe(keys)}" for reason, keys in strays.items() if keys)
    if not modules and (kind := detect.not_an_addition(file.tensors, "a LoRA")) is not None:
        raise CheckpointError(f"{file.path}: this is {kind}; expected a LoRA or one of its relatives")
    if not modules:
        raise CheckpointError(
            f"{file.path}: it changes nothing in this model, it may be for another kind such as SDXL; "
            f"its tensors: {described or 'none'}"
        )
    if described:
        log.warning("%s: tensors left out: %s", file.path, described)
    return modules


def _read_module(
    tensors: Mapping[str, StoredTensor], alphas: _Alphas, target: Target, weights: Mapping[Parameter, Tensor]
) -> Iterator[tuple[str, Change]]:
    """What a module's tensors change: its weight, its bias or both. Raises ValueError."""
    kinds = [kind for kind in KINDS.values() if kind.parts & tensors.keys()]
    first = next(iter(tensors.values())).name
    leaves = [kind.leaf for kind in kinds]
    if not kinds or len(set(leaves)) < len(leaves):
        raise ValueError(
            f"{first!r:.150} has {'two changes' if kinds else 'no factors'} beside it; expected one change"
        )
    for kind in kinds:
        weight = weights.get((target.part, f"{target.module}.{kind.leaf}"))
        if weight is None:
            raise ValueError(f"{first!r:.150} is of a module that has no {kind.leaf}")
        change = read_change(kind, tensors, weight.shape)
        if change.rank:
            change = replace(change, scale=alphas.scale(tensors, change))
        if kind.leaf == "weight":
            change = replace(change, magnitude=read_magnitude(tensors, weight.shape))
        yield kind.leaf, change


@dataclass(frozen=True)
class _Alphas:
    """What scales a change, alpha / rank: by its own tensor, or else by the settings of PEFT, or else not at all."""

    settings: Mapping[str, Mapping[str, Any]]  # PEFT's LoraConfig by the prefix of the modules it is for

    def scale(self, tensors: Mapping[str, StoredTensor], change: Change) -> float:
        assert change.rank
        if "alpha" in tensors:
            stored = tensors["alpha"]
            if stored.numel != 1 or not abs(alpha := float(stored.load().item())) <= MAX_ALPHA:
                raise ValueError(f"{stored.name!r:.150} should be a number, it has the shape {list(stored.shape)}")
            return alpha / change.rank
        name = next(iter(change.tensors.values())).name
        module = (split(name) or (name, ""))[0]
        for prefix, settings in self.settings.items():
            if module.startswith(prefix):
                return _peft_scale(settings, module, change.rank)
        return 1.0


def _peft_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's scale of a module, of which `alpha_pattern` may name the end. Raises ValueError."""
    alpha = settings.get("lora_alpha", rank)
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", pattern) for pattern in patterns):
        raise ValueError("its PEFT settings have an alpha_pattern that is not of modules' names")
    for pattern, value in patterns.items():
        if f".{module}".endswith(f".{pattern.removeprefix('^')}"):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
        raise ValueError(f"its PEFT settings have the lora_alpha {alpha!r:.50}; expected a number")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


PEFT_KEY = "lora_adapter_metadata"  # where diffusers puts PEFT's settings, in the metadata of a .safetensors file
PEFT_FILE, PEFT_SETTINGS = "adapter_model", "adapter_config.json"  # PEFT's own names, of the file and what is beside it


def _read_alphas(file: TensorFile) -> _Alphas:
    """The settings that PEFT keeps apart from its tensors. Raises CheckpointError."""
    if PEFT_KEY in file.metadata:
        packed = parse_json(file.metadata[PEFT_KEY], f"{file.path}: {PEFT_KEY}")
        if "lora_alpha" in packed:  # of a network that was saved alone
            return _Alphas({"": packed})
        settings: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in packed.items():
            network, _, field = key.partition(".")
            settings[f"{network}."][field] = value
        return _Alphas(settings)
    beside = file.path.with_name(PEFT_SETTINGS)
    if file.path.stem == PEFT_FILE and beside.is_file():
        config = read_json(beside)
        if config.get("peft_type", "LORA") != "LORA":
            raise CheckpointError(f"{beside}: PEFT's {config['peft_type']!r:.50} is not read; expected LORA")
        return _Alphas({"": config})
    return _Alphas({})
