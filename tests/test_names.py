"""The name tables: complete, and bijections."""

from __future__ import annotations

import diffusers
import pytest
import torch
from conftest import TINY_UNET
from synthetic import shapes

from ldm import TextConfig, UNetConfig, VAEConfig
from ldm.checkpoint.names import text_names, unet_names, vae_names
from ldm.models.unet import UNet
from ldm.models.vae import VAE

ODD_UNET = UNetConfig(channel_mult=(1, 2, 3), blocks_per_level=1, attention_levels=(1,), channels=64)
CASES = [
    (UNet, UNetConfig(), unet_names, "sd-v1-keys.json", "model.diffusion_model."),
    (UNet, TINY_UNET, unet_names, "tiny-keys.json", "model.diffusion_model."),
    (UNet, ODD_UNET, unet_names, None, None),
    (VAE, VAEConfig(), vae_names, "sd-v1-keys.json", "first_stage_model."),
    (VAE, VAEConfig(channels=32, channel_mult=(1, 2, 2, 4)), vae_names, "tiny-keys.json", "first_stage_model."),
    (VAE, VAEConfig(channel_mult=(1, 2), blocks_per_level=1), vae_names, None, None),
]


def keys(rows, spelling: str) -> set[str]:
    return {key for row in rows for key in row.keys(spelling)}


@pytest.mark.parametrize(("network", "config", "table", "manifest", "prefix"), CASES)
def test_tables_are_bijections_over_every_tensor(network, config, table, manifest, prefix):
    rows = table(config)
    for spelling in ("ours", "compvis", "diffusers"):
        assert len({getattr(row, spelling) for row in rows}) == len(rows)
    with torch.device("meta"):
        assert keys(rows, "ours") == network(config).state_dict().keys()


@pytest.mark.parametrize(("network", "config", "table", "manifest", "prefix"), [c for c in CASES if c[3]])
def test_compvis_names_are_those_of_the_reference(network, config, table, manifest, prefix):
    with torch.device("meta"):
        state = network(config).state_dict()
    renamed = {
        prefix + theirs: state[ours].numel()
        for row in table(config)
        for theirs, ours in zip(row.keys("compvis"), row.keys("ours"), strict=True)
    }
    expected = {key: torch.Size(shape).numel() for key, shape in shapes(manifest, [prefix]).items()}
    assert renamed == expected


def diffusers_unet(config: UNetConfig):
    down = [
        "CrossAttnDownBlock2D" if level in config.attention_levels else "DownBlock2D"
        for level in range(len(config.channel_mult))
    ]
    return diffusers.UNet2DConditionModel(
        block_out_channels=[config.channels * mult for mult in config.channel_mult],
        layers_per_block=config.blocks_per_level,
        down_block_types=down,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
        attention_head_dim=config.heads,
        cross_attention_dim=config.context_dim,
    )


def diffusers_vae(config: VAEConfig):
    levels = len(config.channel_mult)
    return diffusers.AutoencoderKL(
        block_out_channels=[config.channels * mult for mult in config.channel_mult],
        layers_per_block=config.blocks_per_level,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=config.latent_channels,
    )


@pytest.mark.parametrize(("network", "config", "table", "manifest", "prefix"), CASES)
def test_diffusers_names_are_those_of_diffusers(network, config, table, manifest, prefix):
    with torch.device("meta"):
        theirs = (diffusers_unet if network is UNet else diffusers_vae)(config).state_dict()
    assert keys(table(config), "diffusers") == theirs.keys()


def test_text_names():
    rows = text_names(TextConfig())
    prefix = "cond_stage_model.transformer.text_model."
    expected = {key.removeprefix(prefix) for key in shapes("sd-v1-keys.json", [prefix])} - {"embeddings.position_ids"}
    assert keys(rows, "compvis") == keys(rows, "diffusers") == expected
    assert keys(rows, "ours") == {f"transformer.{key}" for key in expected}
