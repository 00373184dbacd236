"""What a network is, from the names and shapes of its tensors, or from the config.json beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from reprlib import repr as brief
from typing import Any, NamedTuple

from ldm.config import ACTIVATIONS, MAX_CFG_SCALE, SD_V1, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ldm.diffusion.prediction import PREDICTION_TYPES
from ldm.diffusion.schedule import BETA_SCHEDULES
from ldm.errors import CheckpointError

Shapes = Mapping[str, Sequence[int]]
Json = Mapping[str, Any]

CFG_SCALE_KEY = "_guidance_scale"  # of unet/config.json: ours alone; diffusers passes over names that start so

# Files that are not an SD v1.x model, by a pattern that none of its keys match. The first row that fits names the file.
OTHER_FAMILIES = {
    r"^(control_model\.|input_hint_block\.|controlnet_|zero_convs\.)": "a ControlNet",
    r"^conditioner\.embedders\.|add_embedding\.linear_1|label_emb\.": "a Stable Diffusion XL model",
    r"^cond_stage_model\.model\.": "a Stable Diffusion 2.x model",
    r"joint_blocks\.|joint_transformer_blocks|double_blocks\.|single_transformer_blocks|text_encoders\.t5xxl": (
        "a Stable Diffusion 3 or Flux model"
    ),
}
# What is made to be added to a model; merges carry such keys too, so these count only where no network is found.
ADDITIONS = {
    r"lora[._]|lokr_|hada_|dora_scale": "a LoRA",
    r"^(emb_params|string_to_param|clip_[lg]|<.*>)$": "a textual inversion embedding",
    r"^(320|640|768|1280)$": "a hypernetwork",
    r"motion_modules\.": "an AnimateDiff motion module",
    r"^(ip_adapter|image_proj)\.": "an IP-Adapter",
    r"^(encoder|decoder)\.layers\.\d|^\d+\.conv\.\d": "a TAESD autoencoder",
}
MODELS = {
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|unet|vae|decoder)\.": "a model or a part of one"
}
ADDED_WITH = {"a LoRA": "--lora", "a textual inversion embedding": "--embedding"}
OTHER_CONTEXT_DIMS = {1024: "a Stable Diffusion 2.x model", 2048: "a Stable Diffusion XL model"}


class OtherFamilyError(CheckpointError):
    """A sound file of something else than Stable Diffusion v1.x."""

    def __init__(self, family: str, where: str):
        advice = f"; use it with {ADDED_WITH[family]}" if family in ADDED_WITH else ""
        super().__init__(f"{where}: this is {family}; expected a Stable Diffusion v1.x model{advice}")
        self.family = family


def family(names: Iterable[str], table: Mapping[str, str]) -> str | None:
    """What a file with these names is, by one of the tables above."""
    text = "\n".join(names)
    return next((what for pattern, what in table.items() if re.search(pattern, text, re.MULTILINE)), None)


def not_an_addition(names: Iterable[str], wanted: str) -> str | None:
    """What a file is that is not what was wanted, a row of ADDITIONS."""
    return family(names, {pattern: what for pattern, what in (ADDITIONS | MODELS).items() if what != wanted})


def _count(shapes: Shapes, template: str) -> int:
    """How many consecutive numbers from 0 make `template` a name in `shapes`."""
    n = 0
    while template.format(n) in shapes:
        n += 1
    return n


def _multiples(widths: Sequence[int], where: str) -> tuple[int, ...]:
    if 0 in widths or any(width % widths[0] for width in widths):
        raise CheckpointError(f"{where}: level widths {list(widths)} are not multiples of the first")
    return tuple(width // widths[0] for width in widths)


def unet_from_shapes(shapes: Shapes, spelling: str, where: str) -> UNetConfig:
    """The config of a U-Net. Heads and norm groups leave no trace in shapes: SD v1's are taken."""
    widths, blocks, attention_levels = UNET_LEVELS[spelling](shapes)
    ends = UNET_ENDS[spelling]
    channels, in_channels = shapes[ends.conv_in][:2]
    context_dim = shapes[ends.context][1]
    if context_dim in OTHER_CONTEXT_DIMS:
        raise OtherFamilyError(OTHER_CONTEXT_DIMS[context_dim], where)
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shapes[ends.conv_out][0],
        channels=channels,
        channel_mult=_multiples([channels, *widths], where)[1:],
        blocks_per_level=blocks,
        attention_levels=tuple(attention_levels),
        context_dim=context_dim,
    )


class _Ends(NamedTuple):
    """Where a U-Net's channels show."""

    conv_in: str
    conv_out: str
    context: str


UNET_ENDS = {
    "compvis": _Ends(
        "input_blocks.0.0.weight", "out.2.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    ),
    "diffusers": _Ends(
        "conv_in.weight", "conv_out.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    ),
}


def _compvis_levels(shapes: Shapes) -> tuple[list[int], int, list[int]]:
    """Widths, blocks a level, and the levels that attend; the layers are counted through, so they are walked."""
    widths, attention_levels, blocks = [shapes["input_blocks.1.0.in_layers.2.weight"][0]], [], 0
    layer = 1
    while True:
        if (conv := shapes.get(f"input_blocks.{layer}.0.in_layers.2.weight")) is not None:
            widths[-1] = conv[0]
            blocks += len(widths) == 1
            if f"input_blocks.{layer}.1.norm.weight" in shapes and len(widths) - 1 not in attention_levels:
                attention_levels.append(len(widths) - 1)
        elif f"input_blocks.{layer}.0.op.weight" in shapes:
            widths.append(0)  # the next block tells
        else:
            return widths, blocks, attention_levels
        layer += 1


def _diffusers_levels(shapes: Shapes) -> tuple[list[int], int, list[int]]:
    block = "down_blocks.{}.resnets.{}.conv1.weight"
    widths = [shapes[block.format(level, 0)][0] for level in range(_count(shapes, block.format("{}", 0)))]
    attention_levels = [n for n in range(len(widths)) if f"down_blocks.{n}.attentions.0.norm.weight" in shapes]
    return widths, _count(shapes, block.format(0, "{}")), attention_levels


UNET_LEVELS = {"compvis": _compvis_levels, "diffusers": _diffusers_levels}


VAE_BLOCKS = {  # where a level's ResBlocks are, by spelling
    "compvis": "encoder.down.{}.block.{}.conv1.weight",
    "diffusers": "encoder.down_blocks.{}.resnets.{}.conv1.weight",
}


def vae_from_shapes(shapes: Shapes, spelling: str, where: str) -> VAEConfig:
    """The config of an autoencoder; scale factor and norm groups leave no trace in shapes: SD v1's are taken."""
    block = VAE_BLOCKS[spelling]
    levels = _count(shapes, block.format("{}", 0))
    channels, in_channels = shapes["encoder.conv_in.weight"][:2]
    widths = [shapes[block.format(level, 0)][0] for level in range(levels)]
    return VAEConfig(
        in_channels=in_channels,
        latent_channels=shapes["post_quant_conv.weight"][0],
        channels=channels,
        channel_mult=_multiples([channels, *widths], where)[1:],
        blocks_per_level=_count(shapes, block.format(0, "{}")),
    )


def text_from_shapes(shapes: Shapes, spelling: str, where: str) -> TextConfig:
    """The config of a CLIP text encoder, whose heads are 64 wide."""
    vocab_size, width = shapes["embeddings.token_embedding.weight"]
    return TextConfig(
        vocab_size=vocab_size,
        width=width,
        layers=_count(shapes, "encoder.layers.{}.mlp.fc1.weight"),
        heads=max(1, width // 64),
        mlp_width=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        max_length=shapes["embeddings.position_embedding.weight"][0],
    )


# What a network may measure. A header of a few bytes can claim any number of layers; a network of them takes memory.
LIMITS = {
    **dict.fromkeys(("channels", "in_channels", "out_channels", "latent_channels"), 1 << 14),
    **dict.fromkeys(("context_dim", "width", "mlp_width"), 1 << 16),
    "blocks_per_level": 16, "layers": 64, "max_length": 4096, "vocab_size": 1 << 20,
}  # fmt: skip
MAX_LEVELS = 8


def check_limits(config: Any, where: str) -> None:
    """Raises CheckpointError for a UNetConfig, VAEConfig or TextConfig of a network larger than any of its kind."""
    for name, value in vars(config).items():
        if name in LIMITS and not 1 <= value <= LIMITS[name]:
            raise CheckpointError(f"{where}: {name} is {brief(value)}; only 1 to {LIMITS[name]} is supported")
        if name == "channel_mult" and len(value) > MAX_LEVELS:
            raise CheckpointError(f"{where}: there are {len(value)} levels; only 1 to {MAX_LEVELS} are supported")


# What a diffusers config must say for its network to be ours; absent or null means the default, which is this.
UNET_REQUIRED = {
    "act_fn": "silu", "addition_embed_type": None, "center_input_sample": False, "class_embed_type": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None, "downsample_padding": 1,
    "dual_cross_attention": False, "encoder_hid_dim": None, "flip_sin_to_cos": True, "freq_shift": 0,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5,
    "num_class_embeds": None, "only_cross_attention": False, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "time_cond_proj_dim": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}  # fmt: skip
VAE_REQUIRED = {
    "act_fn": "silu", "latents_mean": None, "latents_std": None, "mid_block_add_attention": True, "shift_factor": None,
    "use_quant_conv": True, "use_post_quant_conv": True,
}  # fmt: skip
TEXT_REQUIRED = {"layer_norm_eps": 1e-5}
SCHEDULER_REQUIRED = {"trained_betas": None}

DIFFUSERS_BETA_SCHEDULES = {"squaredcos_cap_v2": "cosine"}  # the others have our names


class _Reader:
    """Typed, bounded look-ups in a config.json, which nobody has vouched for."""

    def __init__(self, json: Json, required: Json, where: str):
        self.json, self.where = json, where
        for key, value in required.items():
            if json.get(key) not in (None, value):
                raise self.error(key, f"{value!r}")

    def error(self, key: str, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {brief(self.json.get(key))}; only {allowed} is supported")

    def integer(self, key: str, default: int | None = None, most: int = 1 << 16) -> int:
        value = default if self.json.get(key) is None else self.json[key]
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(key, f"a whole number from 1 to {most}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        values: Any = self.json.get(key)
        fits = isinstance(values, list) and 1 <= len(values) <= MAX_LEVELS
        if not fits or not all(type(value) is int and 1 <= value <= 1 << 16 for value in values):
            raise self.error(key, f"a list of 1 to {MAX_LEVELS} whole numbers")
        return tuple(values)

    def number(self, key: str, default: float, most: float = 1e6) -> float:
        value = default if self.json.get(key) is None else self.json[key]
        if type(value) not in (int, float) or not 0 < value <= most:
            raise self.error(key, f"a positive number up to {most:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        if (value := self.json.get(key)) is not None and type(value) is not bool:
            raise self.error(key, "true or false")
        return bool(value)

    def choice(self, key: str, default: str, allowed: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
        value = default if self.json.get(key) is None else self.json[key]
        if aliases and isinstance(value, str):
            value = aliases.get(value, value)
        if value not in (allowed := tuple(allowed)):
            raise self.error(key, " or ".join(allowed))
        return value


def cfg_scale_from_json(json: Json, where: str) -> float:
    """The guidance scale that a U-Net draws best with, from its unet/config.json."""
    return _Reader(json, {}, where).number(CFG_SCALE_KEY, SD_V1.cfg_scale, MAX_CFG_SCALE)


def unet_from_json(json: Json, where: str) -> UNetConfig:
    """The config of a U-Net from diffusers' unet/config.json."""
    for context_dim, family in OTHER_CONTEXT_DIMS.items():
        if json.get("cross_attention_dim") == context_dim:
            raise OtherFamilyError(family, where)
    read = _Reader(json, UNET_REQUIRED, where)
    widths = read.integers("block_out_channels")
    down = json.get("down_block_types")
    known = list(UP_BLOCK)  # a list, because what a file holds in this place may not be hashable
    if not isinstance(down, list) or len(down) != len(widths) or any(kind not in known for kind in down):
        raise read.error("down_block_types", f"{len(widths)} of {' and '.join(UP_BLOCK)}")
    up = [UP_BLOCK[kind] for kind in reversed(down)]
    if json.get("up_block_types") != up:
        raise read.error("up_block_types", f"the mirror of down_block_types, {up},")
    return UNetConfig(
        in_channels=read.integer("in_channels"),
        out_channels=read.integer("out_channels"),
        channels=widths[0],
        channel_mult=_multiples(widths, where),
        blocks_per_level=read.integer("layers_per_block"),
        attention_levels=tuple(level for level, kind in enumerate(down) if kind == "CrossAttnDownBlock2D"),
        # diffusers has always called the number of heads attention_head_dim
        heads=read.integer("attention_head_dim" if json.get("num_attention_heads") is None else "num_attention_heads"),
        context_dim=read.integer("cross_attention_dim"),
        norm_groups=read.integer("norm_num_groups"),
    )


UP_BLOCK = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}


def vae_from_json(json: Json, where: str) -> VAEConfig:
    """The config of an autoencoder from diffusers' vae/config.json. The oldest ones have no scaling_factor: SD v1's."""
    read = _Reader(json, VAE_REQUIRED, where)
    widths = read.integers("block_out_channels")
    return VAEConfig(
        in_channels=read.integer("in_channels"),
        latent_channels=read.integer("latent_channels"),
        channels=widths[0],
        channel_mult=_multiples(widths, where),
        blocks_per_level=read.integer("layers_per_block"),
        scale_factor=read.number("scaling_factor", VAEConfig.scale_factor),
        norm_groups=read.integer("norm_num_groups"),
    )


def text_from_json(json: Json, where: str) -> TextConfig:
    """The config of a text encoder from transformers' text_encoder/config.json, or from that of a whole CLIP."""
    inner = json.get("text_config")
    read = _Reader(inner if isinstance(inner, dict) else json, TEXT_REQUIRED, where)
    return TextConfig(
        vocab_size=read.integer("vocab_size", most=1 << 20),
        width=read.integer("hidden_size"),
        layers=read.integer("num_hidden_layers"),
        heads=read.integer("num_attention_heads"),
        mlp_width=read.integer("intermediate_size"),
        max_length=read.integer("max_position_embeddings"),
        activation=read.choice("hidden_act", "quick_gelu", ACTIVATIONS),
    )


def schedule_from_json(json: Json, where: str) -> ScheduleConfig:
    """The noise schedule from diffusers' scheduler/scheduler_config.json, with its defaults.

    Which sampler it names does not enter: any of ours runs on any schedule.
    """
    read = _Reader(json, SCHEDULER_REQUIRED, where)
    return ScheduleConfig(
        timesteps=read.integer("num_train_timesteps", 1000, most=100_000),
        beta_schedule=read.choice("beta_schedule", "linear", BETA_SCHEDULES, DIFFUSERS_BETA_SCHEDULES),
        beta_start=read.number("beta_start", 0.0001),
        beta_end=read.number("beta_end", 0.02),
        prediction_type=read.choice("prediction_type", "epsilon", PREDICTION_TYPES),
        zero_terminal_snr=read.flag("rescale_betas_zero_snr"),
    )


# What CompVis's YAML files and the modelspec in a file's metadata call the prediction types.
PARAMETERIZATIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def schedule_from_yaml(yaml: Json, where: str) -> dict[str, Any]:
    """The fields of ScheduleConfig that a CompVis YAML file tells. Its "linear" is what we call scaled linear."""
    params = _params(yaml, "model")
    read = _Reader(params, {"beta_schedule": "linear"}, where)
    fields: dict[str, Any] = {}
    if "parameterization" in params:
        fields["prediction_type"] = read.choice("parameterization", "eps", PREDICTION_TYPES, PARAMETERIZATIONS)
    if "timesteps" in params:
        fields["timesteps"] = read.integer("timesteps", most=100_000)
    for theirs, ours in {"linear_start": "beta_start", "linear_end": "beta_end"}.items():
        if theirs in params:
            fields[ours] = read.number(theirs, 0)
    return fields


def hints_from_yaml(yaml: Json, where: str) -> dict[str, dict[str, Any]]:
    """What a CompVis YAML file tells of the networks that shapes do not: fields of their configs, by part."""
    model = _params(yaml, "model")
    unet = _params(model, "unet_config")
    hints: dict[str, dict[str, Any]] = {}
    if "num_heads" in unet and unet.get("num_head_channels") in (None, -1):
        hints["unet"] = {"heads": _Reader(unet, {}, where).integer("num_heads")}
    if "scale_factor" in model:
        hints["vae"] = {"scale_factor": _Reader(model, {}, where).number("scale_factor", 1)}
    return hints


def _params(yaml: Any, key: str) -> Json:
    """`yaml[key]["params"]`, or nothing where it is not that deep."""
    node = yaml.get(key) if isinstance(yaml, dict) else None
    params = node.get("params") if isinstance(node, dict) else None
    return params if isinstance(params, dict) else {}
