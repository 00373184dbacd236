"""The decoder of TAESD, a tiny autoencoder distilled from Stable Diffusion's (github.com/madebyollin/taesd)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 64


class Clamp(nn.Module):
    """Latents kept within ±3, softly."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class Block(nn.Module):
    """Three convolutions beside a residual path."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


def _enlarging() -> list[nn.Module]:
    upsampling = [nn.Upsample(scale_factor=2), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)]
    return [Block(), Block(), Block(), *upsampling]


class TAESD(nn.Sequential):
    """Scaled latents (b, 4, h, w), of unit variance → image (b, 3, 8·h, 8·w), about [-1, 1], not clamped.

    The places in the sequence are the names of TAESD's own files.
    """

    def __init__(self, latent_channels: int = 4) -> None:
        super().__init__(
            Clamp(),
            nn.Conv2d(latent_channels, CHANNELS, 3, padding=1),
            nn.ReLU(),
            *(layer for _ in range(3) for layer in _enlarging()),
            Block(),
            nn.Conv2d(CHANNELS, 3, 3, padding=1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return 2 * super().forward(latents) - 1
