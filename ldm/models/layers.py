"""Building blocks shared by the U-Net and the autoencoder.

Feature maps are `b c h w` in channels_last memory, so that tokens `b (h w) c` are views of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn


def to_tokens(x: Tensor) -> Tensor:
    """Feature map (b, c, h, w) → tokens (b, h·w, c): a view where `x` is channels_last."""
    return rearrange(x, "b c h w -> b (h w) c")


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens (b, h·w, c) → channels_last feature map (b, c, h, w) of the height of `like`: a view."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=like.shape[-2])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, n, heads·d) → (b, heads, n, d)."""
    return rearrange(x, "b n (heads d) -> b heads n d", heads=heads)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v over (b, heads, n, d); the heads come back joined, (b, n, heads·d)."""
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")


class GroupNorm(nn.GroupNorm):
    """Group normalisation that stays exact on large float32 maps.

    torch's CPU kernel for channels_last adds up each group's pixels one after the other in float32: at 512×512 that
    alone costs 1.5e-5 of relative error, a hundred times NCHW's. Here rows are summed first, their sums in float64.
    """

    exact_below = 64 * 64  # pixels up to which torch's kernel is as good

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[-2] * x.shape[-1] > self.exact_below:
            return self._from_row_sums(x)
        return super().forward(x)

    def _from_row_sums(self, x: Tensor) -> Tensor:
        pixels = rearrange(x, "b c h w -> b h w c")
        mean, square = (
            reduce(moment.double() / x.shape[-1], "b h (g c) -> b g 1", "mean", g=self.num_groups)
            for moment in (pixels.sum(dim=2), torch.linalg.vector_norm(pixels, dim=2).square())
        )
        scale = (square - mean.square() + self.eps).rsqrt() * rearrange(self.weight, "(g c) -> g c", g=self.num_groups)
        shift = rearrange(self.bias, "(g c) -> g c", g=self.num_groups) - mean * scale
        scale, shift = (rearrange(t.float(), "b g c -> b 1 1 (g c)") for t in (scale, shift))
        return rearrange(torch.addcmul(shift, pixels, scale), "b h w c -> b c h w")


class ResBlock(nn.Module):
    """Two normalised convolutions beside a residual path; `shift` (b, out_channels, 1, 1) is added between them."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, norm_eps: float):
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if shift is not None:
            h = h + shift
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Upsample(nn.Module):
    """Enlarge to `size` (height, width) by nearest neighbour, twice the input's where none is given, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        enlarged = F.interpolate(x, size=size) if size else F.interpolate(x, scale_factor=2.0)
        return self.conv(enlarged)
