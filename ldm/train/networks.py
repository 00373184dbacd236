"""The networks a run starts with: those of a model, or new ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ldm.checkpoint import Model, load_model, load_vae
from ldm.config import SD_V1, ModelConfig
from ldm.errors import RequestError
from ldm.models.layers import ResBlock
from ldm.models.text import TextEncoder
from ldm.models.tokenizer import Tokenizer, shipped_vocabulary
from ldm.models.unet import SpatialTransformer, UNet
from ldm.models.vae import VAE, PixelAttention
from ldm.train.vocabulary import learn_vocabulary

RECOMPUTED = (ResBlock, SpatialTransformer, PixelAttention)  # where gradient checkpointing keeps inputs alone


def new_vae(config: ModelConfig) -> VAE:
    return _channels_last(VAE(config.vae))


def new_model(config: ModelConfig, vae: Path, captions: Iterable[str], seed: int) -> Model:
    """A new U-Net and text encoder for the latents of a finished VAE.

    A vocabulary that is not of CLIP's size is learned from the captions. Raises CheckpointError, and RequestError for
    captions that do not have as many words, and for latents of other channels than the U-Net.
    """
    trained = load_vae(vae)
    try:
        config = replace(config, vae=trained.config)
    except ValueError as error:
        raise RequestError(f"networks do not fit {vae}: {error}") from error
    size = config.text.vocab_size
    tables = shipped_vocabulary() if size == SD_V1.text.vocab_size else learn_vocabulary(captions, size)
    tokenizer = Tokenizer(*tables, config.text.max_length)
    torch.manual_seed(seed)
    unet = _channels_last(UNet(config.unet))
    nn.init.zeros_(unet.conv_out.weight)  # so that it starts at the mean of what it is to predict, as the reference's
    return Model(unet, trained, TextEncoder(config.text, tokenizer), config)


def widen_for_inpainting(model: Model) -> Model:
    """A model whose U-Net also sees a mask and the masked picture, to which it starts blind: 4 channels become 9."""
    if model.config.inpaints:
        return model
    if model.config.unet.in_channels != model.config.vae.latent_channels:
        raise RequestError(
            f"diffusion.inpaint starts from a U-Net of {model.config.vae.latent_channels} input channels, "
            f"this model's has {model.config.unet.in_channels}"
        )
    config = replace(model.config.unet, in_channels=2 * model.config.vae.latent_channels + 1)
    unet = _channels_last(UNet(config))
    state = model.unet.state_dict()
    weight = torch.zeros_like(unet.conv_in.weight)
    weight[:, : model.config.unet.in_channels] = state["conv_in.weight"]
    unet.load_state_dict({**state, "conv_in.weight": weight})
    return replace(model, unet=unet, config=replace(model.config, unet=config))


def start_model(path: Path, prediction_type: str | None, zero_terminal_snr: bool | None) -> Model:
    """The model of a checkpoint, in float32, that is to predict something else if so told. Raises CheckpointError."""
    model = load_model(path)
    schedule = model.config.schedule
    schedule = replace(
        schedule,
        prediction_type=prediction_type or schedule.prediction_type,
        zero_terminal_snr=schedule.zero_terminal_snr if zero_terminal_snr is None else zero_terminal_snr,
    )
    return replace(model, config=replace(model.config, schedule=schedule))


Network = TypeVar("Network", bound=nn.Module)


def _channels_last(network: Network) -> Network:
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def checkpoint_gradients(network: nn.Module) -> None:
    """Keep only the inputs of each block for the backward pass, and compute the rest again (arXiv:1604.06174)."""
    from torch.utils.checkpoint import checkpoint

    for module in network.modules():
        if isinstance(module, RECOMPUTED):
            forward = module.forward
            module.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)  # type: ignore[method-assign]
