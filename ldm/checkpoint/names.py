"""What files on disk call our modules: one table a network, generated from its config.

A row names a module in three spellings: ours, CompVis's (single files) and diffusers' (folders). A tensor's key is its
module's name and one of its leaves. Within a network every spelling names each module once, so a table reads in any
direction, and it lists exactly the tensors that a network of its config has. Prefixes that only say which network a
tensor belongs to are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ldm.config import TextConfig, UNetConfig, VAEConfig

BOTH, WEIGHT = ("weight", "bias"), ("weight",)  # what a module may hold


class Row(NamedTuple):
    ours: str
    compvis: str
    diffusers: str
    leaves: tuple[str, ...] = BOTH

    def keys(self, spelling: str) -> list[str]:
        """The names of the module's tensors in one spelling: "ours", "compvis" or "diffusers"."""
        return [f"{getattr(self, spelling)}.{leaf}" for leaf in self.leaves]


def _same(*names: str) -> list[Row]:
    return [Row(name, name, name) for name in names]


def _under(prefix: tuple[str, str, str], rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, each spelling below its prefix."""
    for row in rows:
        ours, compvis, diffusers = (f"{head}.{name}" for head, name in zip(prefix, row[:3], strict=True))
        yield Row(ours, compvis, diffusers, row.leaves)


UNET_RESNET = [
    Row("resnet.norm1", "in_layers.0", "norm1"),
    Row("resnet.conv1", "in_layers.2", "conv1"),
    Row("time_proj", "emb_layers.1", "time_emb_proj"),
    Row("resnet.norm2", "out_layers.0", "norm2"),
    Row("resnet.conv2", "out_layers.3", "conv2"),
]
UNET_SKIP = Row("resnet.skip", "skip_connection", "conv_shortcut")  # where a ResBlock changes the width

TRANSFORMER = [
    Row(f"transformer.{ours}", theirs, theirs, WEIGHT if ours.endswith(("to_q", "to_k", "to_v")) else BOTH)
    for ours, theirs in [
        ("norm", "norm"),
        ("proj_in", "proj_in"),
        ("norm1", "transformer_blocks.0.norm1"),
        ("self_attention.to_q", "transformer_blocks.0.attn1.to_q"),
        ("self_attention.to_k", "transformer_blocks.0.attn1.to_k"),
        ("self_attention.to_v", "transformer_blocks.0.attn1.to_v"),
        ("self_attention.to_out", "transformer_blocks.0.attn1.to_out.0"),
        ("norm2", "transformer_blocks.0.norm2"),
        ("cross_attention.to_q", "transformer_blocks.0.attn2.to_q"),
        ("cross_attention.to_k", "transformer_blocks.0.attn2.to_k"),
        ("cross_attention.to_v", "transformer_blocks.0.attn2.to_v"),
        ("cross_attention.to_out", "transformer_blocks.0.attn2.to_out.0"),
        ("norm3", "transformer_blocks.0.norm3"),
        ("feed_forward.proj_in", "transformer_blocks.0.ff.net.0.proj"),
        ("feed_forward.proj_out", "transformer_blocks.0.ff.net.2"),
        ("proj_out", "proj_out"),
    ]
]


def _changes_width(channel_mult: Sequence[int], level: int) -> bool:
    """Whether a level on the way down is wider than what enters it: the one before, or the first convolution."""
    return channel_mult[level] != (channel_mult[level - 1] if level else 1)


def unet_names(config: UNetConfig) -> list[Row]:
    """Every module of the U-Net that holds weights."""
    return list(_unet_rows(config))


def _unet_rows(config: UNetConfig) -> Iterator[Row]:
    levels = len(config.channel_mult)
    yield Row("time_mlp.0", "time_embed.0", "time_embedding.linear_1")
    yield Row("time_mlp.2", "time_embed.2", "time_embedding.linear_2")
    yield Row("conv_in", "input_blocks.0.0", "conv_in")

    # CompVis counts the layers of each half through; diffusers counts them within a level.
    layer = 0
    for level in range(levels):
        block = f"down_blocks.{level}"
        for i in range(config.blocks_per_level):
            ours, compvis = f"down.{layer}", f"input_blocks.{layer + 1}"
            skip = [UNET_SKIP] if i == 0 and _changes_width(config.channel_mult, level) else []
            yield from _under((ours, f"{compvis}.0", f"{block}.resnets.{i}"), UNET_RESNET + skip)
            if level in config.attention_levels:
                yield from _under((ours, f"{compvis}.1", f"{block}.attentions.{i}"), TRANSFORMER)
            layer += 1
        if level != levels - 1:
            yield Row(f"down.{layer}.conv", f"input_blocks.{layer + 1}.0.op", f"{block}.downsamplers.0.conv")
            layer += 1

    yield from _under(("middle.0", "middle_block.0", "mid_block.resnets.0"), UNET_RESNET)
    yield from _under(("middle.0", "middle_block.1", "mid_block.attentions.0"), TRANSFORMER)
    yield from _under(("middle.1", "middle_block.2", "mid_block.resnets.1"), UNET_RESNET)

    # CompVis puts an Upsample into the last block of its level; ours is a layer of its own.
    layer = stage = 0
    for level in reversed(range(levels)):
        block = f"up_blocks.{levels - 1 - level}"
        attends = level in config.attention_levels
        for i in range(config.blocks_per_level + 1):
            ours, compvis = f"up.{layer}", f"output_blocks.{stage}"
            yield from _under((ours, f"{compvis}.0", f"{block}.resnets.{i}"), [*UNET_RESNET, UNET_SKIP])
            if attends:
                yield from _under((ours, f"{compvis}.1", f"{block}.attentions.{i}"), TRANSFORMER)
            layer, stage = layer + 1, stage + 1
        if level != 0:
            yield Row(f"up.{layer}.conv", f"{compvis}.{1 + attends}.conv", f"{block}.upsamplers.0.conv")
            layer += 1

    yield Row("norm_out", "out.0", "conv_norm_out")
    yield Row("conv_out", "out.2", "conv_out")


VAE_RESNET = _same("norm1", "conv1", "norm2", "conv2")
VAE_SKIP = Row("skip", "nin_shortcut", "conv_shortcut")

VAE_ATTENTION = [
    Row("norm", "norm", "group_norm"),
    Row("to_q", "q", "to_q"),
    Row("to_k", "k", "to_k"),
    Row("to_v", "v", "to_v"),
    Row("to_out", "proj_out", "to_out.0"),
]


def vae_names(config: VAEConfig) -> list[Row]:
    """Every module of the autoencoder that holds weights."""
    return [*_same("quant_conv", "post_quant_conv"), *_encoder_rows(config), *_decoder_rows(config)]


def _half_rows(half: str) -> Iterator[Row]:
    """What encoder and decoder have in common."""
    yield from _under((half, half, half), _same("conv_in", "conv_out"))
    yield Row(f"{half}.norm_out", f"{half}.norm_out", f"{half}.conv_norm_out")
    yield from _under((f"{half}.middle.0", f"{half}.mid.block_1", f"{half}.mid_block.resnets.0"), VAE_RESNET)
    yield from _under((f"{half}.middle.1", f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"), VAE_ATTENTION)
    yield from _under((f"{half}.middle.2", f"{half}.mid.block_2", f"{half}.mid_block.resnets.1"), VAE_RESNET)


def _encoder_rows(config: VAEConfig) -> Iterator[Row]:
    yield from _half_rows("encoder")
    levels = len(config.channel_mult)
    layer = 0
    for level in range(levels):
        compvis, diffusers = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for i in range(config.blocks_per_level):
            prefix = (f"encoder.down.{layer}", f"{compvis}.block.{i}", f"{diffusers}.resnets.{i}")
            skip = [VAE_SKIP] if i == 0 and _changes_width(config.channel_mult, level) else []
            yield from _under(prefix, VAE_RESNET + skip)
            layer += 1
        if level != levels - 1:
            yield Row(f"encoder.down.{layer}.conv", f"{compvis}.downsample.conv", f"{diffusers}.downsamplers.0.conv")
            layer += 1


def _decoder_rows(config: VAEConfig) -> Iterator[Row]:
    yield from _half_rows("decoder")
    levels = len(config.channel_mult)
    layer = 0
    for level in reversed(range(levels)):  # CompVis numbers levels by resolution, diffusers in running order
        compvis, diffusers = f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(config.blocks_per_level + 1):
            prefix = (f"decoder.up.{layer}", f"{compvis}.block.{i}", f"{diffusers}.resnets.{i}")
            before = config.channel_mult[min(level + 1, levels - 1)]  # what enters the level, from the one below
            skip = [VAE_SKIP] if i == 0 and config.channel_mult[level] != before else []
            yield from _under(prefix, VAE_RESNET + skip)
            layer += 1
        if level != 0:
            yield Row(f"decoder.up.{layer}.conv", f"{compvis}.upsample.conv", f"{diffusers}.upsamplers.0.conv")
            layer += 1


def disk_dims(network: str, key: str, dims: int, spelling: str) -> int:
    """How many dimensions a tensor of ours has on disk, where some of our linear layers are 1×1 convolutions."""
    module = key.removesuffix(".weight").rpartition(".")[2]
    if key.endswith(".weight") and network == "unet" and ".transformer.proj_" in key:
        return 4
    if key.endswith(".weight") and network == "vae" and module in ("to_q", "to_k", "to_v", "to_out"):
        return {"compvis": 4, "diffusers": 2}[spelling]
    return dims


TEXT_LAYER = [
    "layer_norm1",
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
]


def text_names(config: TextConfig) -> list[Row]:
    """Every module of the text encoder; the spellings on disk differ from ours, and each other's, by prefix alone."""
    rows = _same(
        *(f"encoder.layers.{i}.{name}" for i in range(config.layers) for name in TEXT_LAYER), "final_layer_norm"
    )
    rows += [
        row._replace(leaves=WEIGHT) for row in _same("embeddings.token_embedding", "embeddings.position_embedding")
    ]
    return [row._replace(ours=f"transformer.{row.ours}") for row in rows]


# Spellings of the VAE's attention that are read and never written, by the name they stand for in our table: CompVis's
# and diffusers' own, those of diffusers before 0.15, and mixtures that tools have made of them.
VAE_ATTENTION_ALIASES = {
    "norm": {"norm", "group_norm"},
    "to_q": {"q", "to_q", "query"},
    "to_k": {"k", "to_k", "key"},
    "to_v": {"v", "to_v", "value"},
    "to_out": {"proj_out", "to_out.0", "to_out", "proj_attn"},
}
VAE_ATTENTION_PLACES = {"compvis": "mid.attn_1", "diffusers": "mid_block.attentions.0"}


def vae_attention_name(name: str, spelling: str) -> str:
    """The table's own spelling of a VAE tensor whose attention may be spelled in another way."""
    half, found, rest = name.partition(f".{VAE_ATTENTION_PLACES[spelling]}.")
    module, _, leaf = rest.rpartition(".")
    for row in VAE_ATTENTION if found else ():
        if module in VAE_ATTENTION_ALIASES[row.ours]:
            return f"{half}{found}{getattr(row, spelling)}.{leaf}"
    return name
