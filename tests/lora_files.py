"""Files of LoRAs for tests, and what the weights were before."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm import StableDiffusion
from ldm.checkpoint.names import text_names, unet_names

# Modules of the shipped model.
NARROW, WIDE, CONTEXT = 48, 96, 128  # the U-Net's first two levels, and what it attends to
LINEAR = "down.2.transformer.cross_attention.to_k"  # WIDE × CONTEXT
SQUARE = "down.2.transformer.self_attention.to_q"  # WIDE × WIDE
CONV = "down.2.resnet.conv1"  # WIDE × NARROW × 3 × 3
DOWN = "down.1.conv"  # a downsampler
TEXT = "transformer.encoder.layers.0.self_attn.q_proj"

FACTORS = {
    "up": "lora_up.weight",
    "down": "lora_down.weight",
    "mid": "lora_mid.weight",
    "magnitude": "lora_magnitude_vector",
}


def rand(*shape: int, scale: float = 0.2) -> Tensor:
    return torch.randn(shape) * scale


def kohya(sd: StableDiffusion, module: str) -> str:
    """The name in kohya's files of a module of ours."""
    unet = {row.ours: f"lora_unet_{row.diffusers}" for row in unet_names(sd.config.unet)}
    text = {row.ours: f"lora_te_text_model_{row.diffusers}" for row in text_names(sd.config.text)}
    return (unet | text)[module].replace(".", "_")


def of(sd: StableDiffusion, module: str, **parts: Tensor) -> dict[str, Tensor]:
    """Parts of a change under kohya's name of the module."""
    return {f"{kohya(sd, module)}.{FACTORS.get(part, part)}": tensor for part, tensor in parts.items()}


def lora(sd: StableDiffusion, modules=(SQUARE, LINEAR, CONV, TEXT), rank: int = 4, scale: float = 0.2):
    """A LoRA of a few modules, at half strength by its alpha."""
    tensors = {}
    for module in modules:
        network = sd.text if module.startswith("transformer.") else sd.unet
        out, *rest = network.get_parameter(f"{module}.weight").shape
        if ".transformer.proj_" in module:  # a 1×1 convolution on disk
            rest += [1, 1]
        down, up = rand(rank, *rest, scale=scale), rand(out, rank, *(1 for _ in rest[1:]), scale=scale)
        tensors |= of(sd, module, down=down, up=up, alpha=torch.tensor(rank / 2))
    return tensors


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "x.safetensors", **metadata: str) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata=metadata or None)
    return folder / name


def snapshot(sd: StableDiffusion) -> dict[str, tuple[Tensor, Tensor]]:
    """Each parameter, and what it held."""
    parameters = [*sd.unet.named_parameters("unet"), *sd.text.named_parameters("text")]
    return {name: (parameter, parameter.detach().clone()) for name, parameter in parameters}


def assert_restored(sd: StableDiffusion, before: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The parameters are the same objects, and hold the same bits."""
    after = snapshot(sd)
    assert after.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert after[name][0] is parameter, name
        assert torch.equal(after[name][1], value), name
