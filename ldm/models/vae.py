"""The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.1).

It speaks unscaled latents: whoever feeds them to the U-Net multiplies by `config.scale_factor`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import VAEConfig
from ldm.models.layers import GroupNorm, ResBlock, Upsample, attention, split_heads, to_map, to_tokens

NORM_EPS = 1e-6


class DiagonalGaussian:
    """The encoder's posterior q(z|x) = N(mean, exp(logvar)), independent in every element."""

    def __init__(self, mean: Tensor, logvar: Tensor):
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw; the noise is float32 on the CPU, so that a seed means the same on every device."""
        return self.at(torch.randn(self.mean.shape, generator=generator))

    def at(self, noise: Tensor) -> Tensor:
        """The draw that standard normal noise of the mean's shape stands for."""
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL(q ‖ N(0, 1)) in nats, summed over each latent: (b,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class PixelAttention(nn.Module):
    """Single-headed self-attention over the pixels of a feature map, with a residual path."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(self.norm(x))
        q, k, v = (split_heads(proj(tokens), heads=1) for proj in (self.to_q, self.to_k, self.to_v))
        return x + to_map(self.to_out(attention(q, k, v)), like=x)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution, padded right and below only, as the weights were trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def res_blocks(in_channels: int, out_channels: int, count: int, norm_groups: int) -> list[nn.Module]:
    widths = [in_channels] + [out_channels] * count
    return [ResBlock(i, o, norm_groups, NORM_EPS) for i, o in pairwise(widths)]


def middle(channels: int, norm_groups: int) -> nn.Sequential:
    """The bottleneck, the same in encoder and decoder."""
    first, second = res_blocks(channels, channels, 2, norm_groups)
    return nn.Sequential(first, PixelAttention(channels, norm_groups), second)


class Encoder(nn.Module):
    """Image (b, 3, h, w) → moments (b, 2·latent_channels, h/8, w/8)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        width = config.channels
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.down = nn.Sequential()
        for level, out_width in enumerate(widths):
            self.down.extend(res_blocks(width, out_width, config.blocks_per_level, config.norm_groups))
            width = out_width
            if level != len(widths) - 1:
                self.down.append(Downsample(width))
        self.middle = middle(width, config.norm_groups)
        self.norm_out = GroupNorm(config.norm_groups, width, eps=NORM_EPS, silu=True)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.down(self.conv_in(x)))
        return self.conv_out(self.norm_out(h))


class Decoder(nn.Module):
    """Latents (b, latent_channels, h, w) → image (b, 3, 8·h, 8·w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        width = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.middle = middle(width, config.norm_groups)
        self.up = nn.Sequential()
        for level, out_width in reversed(list(enumerate(widths))):
            self.up.extend(res_blocks(width, out_width, config.blocks_per_level + 1, config.norm_groups))
            width = out_width
            if level != 0:
                self.up.append(Upsample(width))
        self.norm_out = GroupNorm(config.norm_groups, width, eps=NORM_EPS, silu=True)
        self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.up(self.middle(self.conv_in(z)))
        return self.conv_out(self.norm_out(h))


class VAE(nn.Module):
    """Images in [-1, 1] ↔ latents of an eighth of their height and width."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Image (b, 3, h, w) in [-1, 1], sides a multiple of 8 → the posterior over unscaled latents."""
        image = image.contiguous(memory_format=torch.channels_last)
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar)

    def decode(self, latent: Tensor) -> Tensor:
        """Unscaled latents (b, latent_channels, h, w) → image (b, 3, 8·h, 8·w), about [-1, 1], not clamped."""
        latent = latent.contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(latent))

    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """The reconstruction through one posterior draw, and the posterior: what training needs."""
        posterior = self.encode(image)
        return self.decode(posterior.sample(generator)), posterior
