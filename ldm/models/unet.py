"""The cross-attention U-Net of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.3).

Used as three functions, so that nothing constant is computed twice:

    shifts = unet.embed_time(t)              # every step's timestep in one matmul, before the loop
    keys_values = unet.embed_context(c)      # once a prompt
    eps = unet.predict(x, shifts, keys_values)

`unet(x, t, context)` is the three in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import UNetConfig
from ldm.models.layers import GroupNorm, ResBlock, Upsample, attention, gated_gelu, split_heads, to_map, to_tokens

KeyValue = tuple[Tensor, Tensor]  # (b, heads, n, d) each
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Timesteps (b,) → (b, dim) float32: cosines, then sines, at geometrically spaced frequencies."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attend: Attention = attention  # a runtime may have a faster one
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.attend(q, k, v))


class CrossAttention(nn.Module):
    """Attention to the prompt, whose keys and values are made once (`embed`) and used at every step (`forward`)."""

    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__()
        self.heads = heads
        self.attend: Attention = attention  # a runtime may have a faster one
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def embed(self, context: Tensor) -> KeyValue:
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)

    def forward(self, x: Tensor, key_value: KeyValue) -> Tensor:
        return self.to_out(self.attend(split_heads(self.to_q(x), self.heads), *key_value))


class GEGLU(nn.Module):
    """Feed-forward with a gated GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, expansion: int = 4):
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * expansion * dim)
        self.proj_out = nn.Linear(expansion * dim, dim)
        self.gate = gated_gelu  # a runtime may have a faster one

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.gate(self.proj_in(x)))


def for_each_prompt(x: Tensor, like: Tensor) -> Tensor:
    """Repeat (b, …) to the batch of `like`, n·b: until pictures meet their n prompts, these have all in common."""
    return x if len(x) == len(like) else torch.cat([x] * (len(like) // len(x)))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map: they attend to each other, then to the prompt."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm = GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = SelfAttention(channels, config.heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(channels, config.heads, config.context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = GEGLU(channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, key_value: KeyValue) -> Tensor:
        h = self.proj_in(to_tokens(self.norm(x)))
        h = h + self.self_attention(self.norm1(h))
        h, x = (for_each_prompt(each, key_value[0]) for each in (h, x))
        h = h + self.cross_attention(self.norm2(h), key_value)
        h = h + self.feed_forward(self.norm3(h))
        return x + to_map(self.proj_out(h), like=x)


class Downsample(nn.Module):
    """Halve height and width (rounding up) with a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Stage(nn.Module):
    """One block of the U: a ResBlock shifted by the timestep and, at the levels that attend, a transformer."""

    def __init__(self, in_channels: int, out_channels: int, attends: bool, config: UNetConfig):
        super().__init__()
        self.time_proj = nn.Linear(4 * config.channels, out_channels)
        self.resnet = ResBlock(in_channels, out_channels, config.norm_groups, norm_eps=1e-5)
        self.transformer = SpatialTransformer(out_channels, config) if attends else None

    def forward(self, x: Tensor, shifts: Iterator[Tensor], keys_values: Iterator[KeyValue]) -> Tensor:
        """Takes the next shift, and the next keys and values, from the iterators: one each for each layer, in order."""
        x = self.resnet(x, next(shifts))
        return self.transformer(x, next(keys_values)) if self.transformer else x


class UNet(nn.Module):
    """Predicts the noise (or v) in latents; accepts latents of any height and width."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = [config.channels * mult for mult in config.channel_mult]
        levels = range(len(widths))

        self.time_mlp = nn.Sequential(
            nn.Linear(config.channels, 4 * config.channels),
            nn.SiLU(),
            nn.Linear(4 * config.channels, 4 * config.channels),
        )
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)

        # Every module's output on the way down is also a skip connection; `skips` tracks their widths.
        self.down = nn.ModuleList()
        width, skips = config.channels, [config.channels]
        for level in levels:
            for _ in range(config.blocks_per_level):
                self.down.append(Stage(width, widths[level], level in config.attention_levels, config))
                width = widths[level]
                skips.append(width)
            if level != levels[-1]:
                self.down.append(Downsample(width))
                skips.append(width)

        self.middle = nn.ModuleList([Stage(width, width, True, config), Stage(width, width, False, config)])

        self.up = nn.ModuleList()
        for level in reversed(levels):
            for _ in range(config.blocks_per_level + 1):
                self.up.append(Stage(width + skips.pop(), widths[level], level in config.attention_levels, config))
                width = widths[level]
            if level != 0:
                self.up.append(Upsample(width))

        self.norm_out = GroupNorm(config.norm_groups, width, eps=1e-5, silu=True)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    @property
    def stages(self) -> list[Stage]:
        """The stages in the order in which they run."""
        return [layer for part in (self.down, self.middle, self.up) for layer in part if isinstance(layer, Stage)]

    def embed_time(self, t: Tensor) -> list[Tensor]:
        """Timesteps (b,) → one shift (b, channels, 1, 1) per ResBlock, in running order. Fractional t is allowed."""
        embedding = sinusoidal_embedding(t, self.config.channels).to(self.conv_in.weight.dtype)
        embedding = F.silu(self.time_mlp(embedding))
        return [stage.time_proj(embedding)[..., None, None] for stage in self.stages]

    def embed_context(self, context: Tensor) -> list[KeyValue]:
        """Text states (b, n, context_dim) → keys and values for each cross-attention, in running order."""
        return [stage.transformer.cross_attention.embed(context) for stage in self.stages if stage.transformer]

    def predict(self, x: Tensor, shifts: Sequence[Tensor], keys_values: Sequence[KeyValue]) -> Tensor:
        """Latents (b, in_channels, h, w) → eps or v (b, out_channels, h, w).

        Keys and values may be of n·b prompts, the first of each picture before the second of any: so is the answer.
        """
        outer = self.enter(x)
        return self.leave(outer, self.deep(outer, shifts, keys_values), shifts, keys_values)

    def enter(self, x: Tensor) -> Tensor:
        """The first layer of `predict`: latents (b, in_channels, h, w) → (b, channels, h, w)."""
        return self.conv_in(x.contiguous(memory_format=torch.channels_last))

    def deep(self, outer: Tensor, shifts: Sequence[Tensor], keys_values: Sequence[KeyValue]) -> Tensor:
        """All layers of `predict` between `enter` and `leave`: what the last stage sees beside the first layer's."""
        shift, key_value = iter(shifts), iter(keys_values)
        h, skips = outer, [outer]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else layer(h, shift, key_value)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, shift, key_value)
        for layer in list(self.up)[:-1]:
            if isinstance(layer, Upsample):
                h = layer(h, size=skips[-1].shape[-2:])  # odd sizes round up on the way down
            else:
                h = layer(torch.cat([h, for_each_prompt(skips.pop(), h)], dim=1), shift, key_value)
        return h

    def leave(self, outer: Tensor, deep: Tensor, shifts: Sequence[Tensor], keys_values: Sequence[KeyValue]) -> Tensor:
        """The last layers of `predict`, on the first's output and what the others made of it, or of one before."""
        h = torch.cat([deep, for_each_prompt(outer, deep)], dim=1)
        h = self.up[-1](h, iter(shifts[-1:]), iter(keys_values[-1:]))
        return self.conv_out(self.norm_out(h))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x (b, in_channels, h, w), t (b,), context (b, n, context_dim) → eps or v (b, out_channels, h, w)."""
        return self.predict(x, self.embed_time(t), self.embed_context(context))
