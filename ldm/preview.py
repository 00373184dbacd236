"""Pictures of latents for a fraction of the VAE's cost, to look at between the steps: a linear map, or TAESD."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.checkpoint.files import StoredTensor, open_tensors, read_json
from ldm.checkpoint.folders import PREVIEW, open_component
from ldm.checkpoint.header import FLOATS
from ldm.checkpoint.writing import is_finite
from ldm.config import VAEConfig
from ldm.errors import CheckpointError, printable
from ldm.images import to_image, to_tensor
from ldm.models.taesd import TAESD

log = logging.getLogger(__name__)

MOST = 100.0  # which no factor comes near: latents have about unit variance, and pixels are within ±1
RIDGE = 1e-2  # of the variance of latents, which is about 1


@dataclass(frozen=True, eq=False)
class Preview:
    """Red, green and blue in [-1, 1] as linear functions of a scaled latent pixel, and of the mean of all."""

    factors: Tensor  # (channels, 3), float32
    mean_factors: Tensor  # (channels, 3): what a latent means depends on the others, of which normalisations know
    bias: Tensor  # (3,)

    def project(self, latents: Tensor) -> Image.Image:
        """Scaled latents (channels, h, w), on any device → a picture of w×h pixels, an eighth of the final size."""
        z = rearrange(latents.float().cpu(), "c h w -> h w c")
        rgb = z @ self.factors + (z.mean(dim=(0, 1)) @ self.mean_factors + self.bias)
        return to_image(rearrange(rgb, "h w c -> c h w"))

    def to_json(self) -> str:
        """What `find_preview` reads from a model's preview.json."""
        return json.dumps({f.name: getattr(self, f.name).double().round(decimals=4).tolist() for f in fields(self)})


# ComfyUI's for SD v1 (comfy/latent_formats.py, SD15), which has nothing but factors.
SD_V1 = Preview(
    torch.tensor(
        [[0.3512, 0.2297, 0.3227], [0.3250, 0.4974, 0.2350], [-0.2829, 0.1762, 0.2721], [-0.2120, -0.2616, -0.7177]]
    ),
    torch.zeros(4, 3),
    torch.zeros(3),
)


def find_preview(model: str | Path, vae: VAEConfig) -> Preview | None:
    """The linear preview of a model: its folder's preview.json, or SD v1's where its latents are on SD v1's scale.

    None where there is neither: `fit_preview` makes one. Raises CheckpointError for a file that is not as it should be.
    """
    path = Path(model) / PREVIEW
    if path.is_file():
        return _read_preview(path, vae.latent_channels)
    on_scale = (vae.latent_channels, vae.scale_factor) == (VAEConfig.latent_channels, VAEConfig.scale_factor)
    return SD_V1 if on_scale else None


def _read_preview(path: Path, channels: int) -> Preview:
    content = {"mean_factors": torch.zeros(channels, 3).tolist(), **read_json(path)}
    shapes = {"factors": (channels, 3), "mean_factors": (channels, 3), "bias": (3,)}
    if content.keys() != shapes.keys() or not all(_has_shape(content[name], shapes[name]) for name in shapes):
        raise CheckpointError(
            f"{path}: expected factors and, if any, mean_factors of {channels}×3 numbers and a bias of 3, all within "
            f"±{MOST:g}; fit it anew with ldm.preview.fit_preview"
        )
    return Preview(**{name: torch.tensor(content[name], dtype=torch.float32) for name in shapes})


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether `value` is numbers in lists of this shape, none of them NaN or beyond MOST."""
    if not shape:
        return type(value) in (int, float) and abs(value) <= MOST
    return isinstance(value, list) and len(value) == shape[0] and all(_has_shape(each, shape[1:]) for each in value)


def fit_preview(encode: Callable[[Image.Image], Tensor], pictures: Iterable[Image.Image]) -> Preview:
    """The linear map that makes of the latents of some pictures the pictures made smaller, by ridge regression.

    encode: RGB picture → scaled latents (1, channels, height/8, width/8), such as StableDiffusion.encode. A hundred
    pictures, of different colours, are enough. Without the ridge, what hardly varies among them would be exaggerated
    in latents that are still half noise.
    """
    latents, pixels = [], []
    for picture in pictures:
        z = encode(picture).cpu().double()
        small = F.adaptive_avg_pool2d(to_tensor(picture).double(), (z.shape[-2], z.shape[-1]))
        z = torch.cat([z, z.mean(dim=(2, 3), keepdim=True).expand_as(z)], dim=1)
        latents.append(rearrange(z, "1 c h w -> (h w) c"))
        pixels.append(rearrange(small, "1 c h w -> (h w) c"))
    z, rgb = torch.cat(latents), torch.cat(pixels)
    centred = z - z.mean(dim=0)
    ridge = RIDGE * len(z) * torch.eye(z.shape[1], dtype=z.dtype)
    factors = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ rgb)
    bias = rgb.mean(dim=0) - z.mean(dim=0) @ factors
    channels = len(factors) // 2
    return Preview(factors[:channels].float(), factors[channels:].float(), bias.float())


def load_taesd(path: str | Path) -> TAESD:
    """TAESD's decoder in float32, from its own taesd_decoder file, or a file or folder of diffusers' AutoencoderTiny.

    Raises CheckpointError for a tensor that is missing, surplus, misshapen or not of finite numbers.
    """
    path = Path(path)
    file = open_component(path) if path.is_dir() else open_tensors(path)
    stored = {_own_name(name): tensor for name, tensor in file.tensors.items() if not name.startswith("encoder.")}
    if left_out := len(file.tensors) - len(stored):
        log.info("%s: left out, not needed: the encoder (%d tensors)", path, left_out)
    network = TAESD()
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(expected.keys() | stored.keys()):
        if fault := _fault(stored.get(name), expected.get(name)):
            raise CheckpointError(f"{path}: not TAESD's decoder for SD v1: {printable(name)} {fault}")
    tensors = {name: tensor.load().float() for name, tensor in stored.items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity: download the file again")
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def _own_name(name: str) -> str:
    """diffusers' decoder has no layer for the clamp, the first of TAESD's, so that its numbers are one less."""
    found = re.fullmatch(r"decoder\.layers\.(\d{1,2})\.(.*)", name)
    return f"{int(found[1]) + 1}.{found[2]}" if found else name


def _fault(stored: StoredTensor | None, shape: tuple[int, ...] | None) -> str | None:
    if stored is None:
        return "is missing"
    if shape is None:
        return "has no place in it"
    if stored.shape != shape:
        return f"has the shape {list(stored.shape)}, expected {list(shape)}"
    return None if stored.dtype in FLOATS else f"holds {stored.dtype}, expected floating-point numbers"
