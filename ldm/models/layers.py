"""Building blocks shared by the U-Net and the autoencoder.

Feature maps are `b c h w` in channels_last memory, so that tokens `b (h w) c` are views of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
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


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v over (b, heads, n, d); the heads come back joined, (b, n, heads·d).

    causal: whether tokens see those before them and themselves alone.
    """
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal), "b heads n d -> b n (heads d)")


def gated_gelu(x: Tensor) -> Tensor:
    """Values and gates (…, 2·c) → values · GELU(gates) (…, c)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class GroupNorm(nn.GroupNorm):
    """Group normalisation, and SiLU after it with `silu`, as exact on channels_last maps as torch's is on NCHW.

    torch's CPU kernel for channels_last adds up a group's pixels and their squares one after the other in float32. At
    512×512 that costs 1.5e-5 of relative error, 300 times NCHW's, and all of it where the mean is large beside the
    deviation. Here each row has its own mean and centred squares, and float64 combines the rows. Training, which
    needs the gradient too, is faster with torch's, and of small pictures as exact.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, silu: bool = False):
        super().__init__(num_groups, num_channels, eps)
        self.silu = silu
        self.row_statistics, self.scale_and_shift = row_statistics, scale_and_shift  # a runtime may have faster ones

    def forward(self, x: Tensor) -> Tensor:
        learning = self.training and torch.is_grad_enabled()
        fast = x.dtype == torch.bfloat16 and self.row_statistics is not row_statistics
        if (fast or x.dtype == torch.float32) and x.device.type == "cpu" and not learning:
            return self.given(*self.row_statistics(x))(x)
        h = super().forward(x)
        return F.silu(h) if self.silu else h

    def given(self, mean: Tensor, var: Tensor) -> Callable[[Tensor], Tensor]:
        """`forward` for any part of a map whose `row_statistics` these are."""
        # The law of total variance: within rows and channels, and between them.
        place = torch.device("cpu") if mean.device.type == "mps" else mean.device  # MPS has no float64
        mean, var, weight, bias = (t.to(place, torch.float64) for t in (mean, var, self.weight, self.bias))
        mean, var = (rearrange(t, "b h 1 (g c) -> b g (h c)", g=self.num_groups) for t in (mean, var))
        var = var.mean(dim=2) + mean.var(dim=2, correction=0)
        scale = (var + self.eps).rsqrt()[..., None] * rearrange(weight, "(g c) -> g c", g=self.num_groups)
        shift = rearrange(bias, "(g c) -> g c", g=self.num_groups) - mean.mean(dim=2, keepdim=True) * scale
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        scale, shift = (rearrange(t.to(self.weight.device, dtype), "b g c -> b (g c) 1 1") for t in (scale, shift))
        return lambda x: self.scale_and_shift(x, scale, shift, self.silu)


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each row and channel of (b, c, h, w): (b, h, 1, c) each, in float32 or better."""
    pixels = rearrange(x, "b c h w -> b h w c")
    if x.dtype.itemsize < 4:
        pixels = pixels.float()
    mean = pixels.mean(dim=2, keepdim=True)
    return mean, (pixels - mean).square().mean(dim=2, keepdim=True)


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    """x · scale + shift, and SiLU of it with `silu`, in the dtype of scale and shift; the result is in that of x."""
    y = torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)
    return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


def convolve(conv: nn.Module, x: Tensor, padding: tuple[int, int] | None = None) -> Tensor:
    """A convolution of a map, with as many rows and columns of zeros around it as `padding` has where it is given."""
    if padding is None:
        return conv(x)
    assert isinstance(conv, nn.Conv2d)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


class ResBlock(nn.Module):
    """Two normalised convolutions beside a residual path; `shift` (b, out_channels, 1, 1) is added between them."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, norm_eps: float):
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=norm_eps, silu=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=norm_eps, silu=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.convolve = convolve  # a runtime may have a faster one

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        h = self.convolve(self.conv1, self.norm1(x))
        if shift is not None:
            h = h + shift
        return self.skip(x) + self.convolve(self.conv2, self.norm2(h))


def doubled(conv: nn.Module, x: Tensor) -> Tensor:
    """A map enlarged to twice its height and width by nearest neighbour, then convolved."""
    return conv(F.interpolate(x, scale_factor=2.0))


class Upsample(nn.Module):
    """Enlarge to `size` (height, width) by nearest neighbour, twice the input's where none is given, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.doubled = doubled  # a runtime may have a faster one

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        height, width = x.shape[-2:]
        if size is None or size == (2 * height, 2 * width):
            return self.doubled(self.conv, x)
        return self.conv(F.interpolate(x, size=size))
