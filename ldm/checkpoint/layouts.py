"""Where the networks are in a file of tensors: by their prefixes, or by a name that only one network has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.checkpoint import detect
from ldm.checkpoint.files import StoredTensor, TensorFile
from ldm.checkpoint.names import Row, text_names, unet_names, vae_attention_name, vae_names
from ldm.config import LABELS, SD_V1
from ldm.errors import CheckpointError, printable

NAMES: dict[str, Callable[[Any], list[Row]]] = {"unet": unet_names, "vae": vae_names, "text": text_names}
FROM_JSON = {"unet": detect.unet_from_json, "vae": detect.vae_from_json, "text": detect.text_from_json}
FROM_SHAPES: dict[str, Callable[[detect.Shapes, str, str], Any]] = {
    "unet": detect.unet_from_shapes,
    "vae": detect.vae_from_shapes,
    "text": detect.text_from_shapes,
}


@dataclass(frozen=True)
class Part:
    """One network's tensors, under the names of its table, their common prefix removed."""

    name: str  # a key of LABELS
    where: str  # for messages
    prefix: str  # what was removed
    spelling: str  # a column of the name tables: "compvis" or "diffusers"
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    json: detect.Json | None = None  # the config.json beside the file
    hints: Mapping[str, Any] = field(default_factory=dict)  # fields of the config that shapes do not tell

    def read_config(self) -> Any:
        """The UNetConfig, VAEConfig or TextConfig that the JSON or the shapes tell. Raises CheckpointError."""
        label = LABELS[self.name]
        try:
            if self.json is not None:
                config = FROM_JSON[self.name](self.json, self.where)
            else:
                shapes = {key: tensor.shape for key, tensor in self.tensors.items()}
                config = replace(FROM_SHAPES[self.name](shapes, self.spelling, self.where), **self.hints)
            detect.check_limits(config, self.where)
            return config
        except KeyError as error:
            missing = f"{self.prefix}{error.args[0]}"
            raise CheckpointError(f"{self.where}: the {label} is incomplete: {missing} is missing") from error
        except (IndexError, ValueError) as error:
            raise CheckpointError(f"{self.where}: this {label} cannot be built: {error}") from error

    def expected(self, config: Any) -> dict[str, str]:
        """The names a network of this config has, in this part's spelling → in ours."""
        return {
            theirs: ours
            for row in NAMES[self.name](config)
            for theirs, ours in zip(row.keys(self.spelling), row.keys("ours"), strict=True)
        }


@dataclass(frozen=True)
class Contents:
    """What a file of tensors turns out to hold. Every tensor is in exactly one of these."""

    parts: Mapping[str, Part]  # by name
    ignored: Mapping[str, Mapping[str, StoredTensor]]  # by reason: not needed to run the networks
    unknown: Mapping[str, StoredTensor]  # outside of every network, and of no known use


# What a network's tensors begin with: in CompVis's files, and in those that hold a diffusers model's parts together.
PREFIXES = {
    "model.diffusion_model.": "unet",
    "unet.": "unet",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "cond_stage_model.transformer.": "text",
    "text_encoder.": "text",
    "te.": "text",
}
EMA_FOR = "model.diffusion_model."
TEXT_LEVEL = "text_model."  # which some text encoders have below their prefix
TEXT_PREFIX = r"(cond_stage_model\.transformer\.|text_encoder\.|te\.)?"

# Tensors that are not needed, by reason.
EMA, REPLACED = "EMA weights", "weights that the EMA weights replace"
POSITION_IDS, MARKS = "position ids", "marks of the prediction type"
IGNORED = {
    "noise schedule": r"betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|lvlb_weights|logvar"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|denoiser\.(sigmas|log_sigmas)",
    "EMA settings": r"model_ema\.(decay|num_updates)",
    EMA: r"model_ema\..*",
    POSITION_IDS: TEXT_PREFIX + r"(text_model\.)?embeddings\.position_ids",
    MARKS: r"v_pred|ztsnr",
    "VAE training loss": r"(first_stage_model\.|vae\.)?loss\..*",
    "text projection": TEXT_PREFIX + r"(text_projection(\.weight)?|logit_scale)",
    "image encoder": TEXT_PREFIX + r"(vision_model\..*|visual_projection\.weight)",
    "safety checker": r"safety_checker\..*",
    "textual inversion training": r"embedding_manager\..*",
}
RULES = {reason: re.compile(pattern) for reason, pattern in IGNORED.items()}

# A network's spelling is told by a name that only it has; so is the network, where it has no prefix.
SIGNATURES = {
    "input_blocks.0.0.weight": ("unet", "compvis"),
    "time_embedding.linear_1.weight": ("unet", "diffusers"),
    "encoder.down.0.block.0.conv1.weight": ("vae", "compvis"),
    "encoder.down_blocks.0.resnets.0.conv1.weight": ("vae", "diffusers"),
    "embeddings.token_embedding.weight": ("text", "diffusers"),
    TEXT_LEVEL + "embeddings.token_embedding.weight": ("text", "diffusers"),
}


def read_layout(file: TensorFile, ema: bool = False) -> Contents:
    """Find the networks in a file, with the EMA weights in place of the U-Net's own if asked for.

    Raises CheckpointError for a file of another family, for one that holds no network, and for networks held twice.
    """
    where = str(file.path)
    needed, ignored = _sort_out(file)
    groups: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in needed.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = tensor
    if (other := detect.family(file.tensors, detect.OTHER_FAMILIES)) is not None:
        raise detect.OtherFamilyError(other, where)
    if ema and EMA not in ignored:
        raise CheckpointError(f"{where}: holds no EMA weights; leave out --ema")
    if EMA in ignored and (ema or not any(PREFIXES.get(prefix) == "unet" for prefix in groups)):
        _use_ema(where, groups, ignored)
    unknown = groups.pop("", {})
    if not groups:
        groups, unknown = {"": unknown}, {}  # one network without a prefix
    if not any(_signature(tensors)[0] for tensors in groups.values()):
        raise _not_a_model(file)
    return Contents(_parts(where, groups), ignored, unknown)


def read_extras(file: TensorFile) -> Contents:
    """What a file holds that is part of no network."""
    unknown, ignored = _sort_out(file)
    return Contents({}, ignored, unknown)


def _sort_out(file: TensorFile) -> tuple[dict[str, StoredTensor], dict[str, dict[str, StoredTensor]]]:
    """The tensors that are needed, and those that are not, by reason."""
    needed: dict[str, StoredTensor] = {}
    ignored: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in file.tensors.items():
        reason = next((reason for reason, rule in RULES.items() if rule.fullmatch(name)), None)
        target = needed if reason is None else ignored.setdefault(reason, {})
        target[name] = tensor
    return needed, ignored


def _parts(where: str, groups: Mapping[str, dict[str, StoredTensor]]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for prefix, tensors in groups.items():
        name = PREFIXES.get(prefix) or _signature(tensors)[0]
        if name in parts:
            raise CheckpointError(
                f"{where}: has two of the {LABELS[name]}, under {parts[name].prefix} and {prefix or 'no prefix'}; "
                "which of them is meant, nothing tells"
            )
        parts[name] = _part(name, where, prefix, tensors)
    return parts


def _part(name: str, where: str, prefix: str, tensors: dict[str, StoredTensor]) -> Part:
    if name == "text" and any(key.startswith(TEXT_LEVEL) for key in tensors):
        if bare := [key for key in tensors if not key.startswith(TEXT_LEVEL)]:
            raise CheckpointError(f"{where}: has text encoder tensors with and without {TEXT_LEVEL}: {describe(bare)}")
        prefix, tensors = prefix + TEXT_LEVEL, {key.removeprefix(TEXT_LEVEL): t for key, t in tensors.items()}
    spelling = _signature(tensors)[1]
    if name == "vae":
        tensors = _in_one_spelling(where, tensors, spelling)
    return Part(name, where, prefix, spelling, tensors)


def _signature(tensors: Mapping[str, object]) -> tuple[str, str]:
    """Part and spelling; a network without any signature is incomplete, and CompVis's as well as any other's."""
    return next((SIGNATURES[key] for key in SIGNATURES if key in tensors), ("", "compvis"))


def _in_one_spelling(where: str, tensors: dict[str, StoredTensor], spelling: str) -> dict[str, StoredTensor]:
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        name = vae_attention_name(name, spelling)
        if name in renamed:
            raise CheckpointError(f"{where}: has {name} twice, by two of its names")
        renamed[name] = tensor
    return renamed


def _use_ema(
    where: str, groups: dict[str, dict[str, StoredTensor]], ignored: dict[str, dict[str, StoredTensor]]
) -> None:
    """Move the EMA weights to the U-Net's names, whose dots they lack; SD v1's names where it has no weights itself."""
    own, averages = groups.get(EMA_FOR, {}), ignored[EMA]
    names = list(own) or [key for row in unet_names(SD_V1.unet) for key in row.keys("compvis")]
    without_dots = {name: "model_ema.diffusion_model" + name.replace(".", "") for name in names}
    if lacking := [name for name in own if without_dots[name] not in averages]:
        raise CheckpointError(f"{where}: its EMA weights lack {describe(lacking)}; leave out --ema")
    if found := {name: averages.pop(dotless) for name, dotless in without_dots.items() if dotless in averages}:
        groups[EMA_FOR] = found
    if own:
        ignored[REPLACED] = {EMA_FOR + name: tensor for name, tensor in own.items()}
    if not averages:
        del ignored[EMA]


def _not_a_model(file: TensorFile) -> CheckpointError:
    names = [*file.tensors, *file.others]
    if (addition := detect.family(names, detect.ADDITIONS)) is not None:
        return detect.OtherFamilyError(addition, str(file.path))
    if not file.tensors:
        return CheckpointError(f"{file.path}: holds no tensors")
    return CheckpointError(f"{file.path}: {describe(names)} are not those of a Stable Diffusion v1.x model")


def describe(names: list[str], most: int = 3) -> str:
    """A list of tensor names, the first few of them in full: names are the file's, and may be anything."""
    shown = ", ".join(printable(name, 200) for name in sorted(names)[:most])
    return f"{len(names)} tensors ({shown}{', …' if len(names) > most else ''})"
