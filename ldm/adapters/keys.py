"""What files call the modules that a LoRA changes, and the factors of each change.

A key is a module's name and a suffix that tells the factor's part. Modules have a name in every tool; all of them are
made here from the rows of `ldm.checkpoint.names`, so that a model of any config has its own table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ldm.checkpoint.names import Row, text_names, unet_names
from ldm.config import TextConfig, UNetConfig

UNET, TEXT = "unet", "text"  # the parts of a model that a LoRA changes


class Target(NamedTuple):
    """A module of ours: of which network, and its name there."""

    part: str
    module: str


# Before a name with dots: diffusers' and PEFT's, ComfyUI's, and that of full checkpoints.
PREFIXES = {
    UNET: ("", "unet.", "base_model.model.", "unet.base_model.model.", "diffusion_model.", "model.diffusion_model."),
    TEXT: (
        "", "text_encoder.", "base_model.model.", "text_encoder.base_model.model.", "text_encoders.clip_l.transformer.",
    ),
}  # fmt: skip
# Before a name with underscores: kohya's sd-scripts and LyCORIS's.
KOHYA_PREFIXES = {UNET: ("lora_unet_", "lycoris_"), TEXT: ("lora_te_", "lora_te1_")}

# Modules that belong to no attention processor any more, by the end of their names.
PROCESSORS = {f"{block}.{new}": f"{block}.processor.{old}" for block in ("attn1", "attn2") for new, old in [
    ("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out"),
]}  # fmt: skip
TEXT_ATTENTION = {
    f"self_attn.{new}_proj": f"self_attn.to_{old}" for new, old in [("q", "q"), ("k", "k"), ("v", "v"), ("out", "out")]
}

# What a suffix says of a tensor. Parts with a name of their own, in LyCORIS's and ComfyUI's files, are their suffix.
SUFFIXES = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
} | {f".{part}": part for part in [
    "alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm",
    "hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
]}  # fmt: skip

# Prefixes of networks that only other models have.
FOREIGN = {"lora_te2_": "SDXL", "text_encoder_2.": "SDXL", "lora_te3_": "Stable Diffusion 3", "lora_prior_": "Cascade"}


def split(key: str) -> tuple[str, str] | None:
    """A tensor's module, as its file spells it, and the tensor's part in the change; None for an unknown kind."""
    for suffix, part in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part
    return None


def spellings(unet: UNetConfig, text: TextConfig) -> Mapping[str, Target]:
    """Every name that any tool gives to a module of these networks, by which of ours it is."""
    return {
        spelling: Target(part, row.ours)
        for part, rows in [(UNET, unet_names(unet)), (TEXT, text_names(text))]
        for row in rows
        if "embeddings" not in row.ours  # tables of vectors, which are no matrices that multiply
        for spelling in _spellings(part, row)
    }


def _spellings(part: str, row: Row) -> Iterator[str]:
    for name in _names(part, row):
        yield from (prefix + name for prefix in PREFIXES[part])
        yield from (prefix + name.replace(".", "_") for prefix in KOHYA_PREFIXES[part])


def _names(part: str, row: Row) -> Iterator[str]:
    """The names of a module with dots and without a prefix."""
    names = [row.compvis, row.diffusers] if part == UNET else [row.diffusers, f"text_model.{row.diffusers}"]
    aliases = PROCESSORS if part == UNET else TEXT_ATTENTION
    for name in names:
        yield name
        yield from (name.removesuffix(new) + old for new, old in aliases.items() if name.endswith(new))
