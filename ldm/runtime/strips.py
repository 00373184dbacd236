"""Running the autoencoder a strip of rows at a time: a part of the memory, and the same numbers to rounding.

A convolution needs one more row on each side. All else that a strip cannot see are the statistics of the group norms,
which are taken over all strips before the first is normalised, and the attention of the bottleneck, which is run whole:
it has a 64th of the pixels. So there are no seams to hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import GroupNorm, ResBlock, Upsample, convolve
from ldm.models.vae import VAE, DiagonalGaussian, Downsample

STRIP_PIXELS = 1 << 14  # of a map at once
TILE = 4  # rows of what Winograd's convolutions make at once, which strips are not to cut


class Rows(NamedTuple):
    """A map (b, c, height, width) whose rows are made when they are read, from one to before another."""

    height: int
    width: int
    read: Callable[[int, int], Tensor]

    def strips(self) -> Iterator[tuple[int, int]]:
        step = max(1, STRIP_PIXELS // self.width)
        step -= step % TILE if step > TILE else 0
        return ((start, min(start + step, self.height)) for start in range(0, self.height, step))


def decode(vae: VAE, latent: Tensor) -> Tensor:
    """`vae.decode` of unscaled latents (b, 4, h, w)."""
    decoder = vae.decoder
    latent = latent.contiguous(memory_format=torch.channels_last)
    x = _through(decoder.up, decoder.middle(decoder.conv_in(vae.post_quant_conv(latent))))
    return _whole(_convolved(decoder.conv_out, _activated(decoder.norm_out, x)))


def encode(vae: VAE, image: Tensor) -> DiagonalGaussian:
    """`vae.encode` of images (b, 3, h, w) in [-1, 1]."""
    encoder = vae.encoder
    image = image.contiguous(memory_format=torch.channels_last)
    h = encoder.middle(_through(encoder.down, _whole(_convolved(encoder.conv_in, _of(image)))))
    mean, logvar = vae.quant_conv(encoder.conv_out(encoder.norm_out(h))).chunk(2, dim=1)
    return DiagonalGaussian(mean, logvar)


def _through(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        x = STRIPWISE[type(layer)](layer, x)
    return x


def _res_block(block: ResBlock, x: Tensor) -> Tensor:
    h = _whole(_convolved(block.conv1, _activated(block.norm1, x), by=block.convolve))
    change = _convolved(block.conv2, _activated(block.norm2, h), by=block.convolve)
    return _whole(change._replace(read=lambda a, b: block.skip(x[..., a:b, :]) + change.read(a, b)), out=h)


def _upsample(layer: Upsample, x: Tensor) -> Tensor:
    height, width = x.shape[-2:]

    def read(start: int, stop: int) -> Tensor:
        first = max(start // 2 - 1, 0)
        made = layer.doubled(layer.conv, x[..., first : (stop + 1) // 2 + 1, :])
        return made[..., start - 2 * first : stop - 2 * first, :]

    return _whole(Rows(2 * height, 2 * width, read))


def _downsample(layer: Downsample, x: Tensor) -> Tensor:
    return _whole(_convolved(layer.conv, _of(x), padding=(0, 1)))


STRIPWISE: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    ResBlock: _res_block,
    Upsample: _upsample,
    Downsample: _downsample,
}


def _of(x: Tensor) -> Rows:
    return Rows(x.shape[-2], x.shape[-1], lambda start, stop: x[..., start:stop, :])


def _activated(norm: GroupNorm, x: Tensor) -> Rows:
    rows = _of(x)
    statistics = [norm.row_statistics(rows.read(*strip)) for strip in rows.strips()]
    mean, var = (torch.cat(parts, dim=1) for parts in zip(*statistics, strict=True))
    normalise = norm.given(mean, var)
    return rows._replace(read=lambda start, stop: normalise(rows.read(start, stop)))


def _convolved(
    conv: nn.Conv2d, rows: Rows, padding: tuple[int, int] = (1, 1), by: Callable[..., Tensor] = convolve
) -> Rows:
    """By a 3×3 convolution of a map that is enlarged by `padding` zeros, those before it and those behind it."""
    before, behind = padding
    stride = conv.stride[0]
    sides = before if before == behind else 0  # that the convolution adds by itself, without a copy

    def size(side: int) -> int:
        return (side + before + behind - 3) // stride + 1

    def read(start: int, stop: int) -> Tensor:
        first, last = start * stride - before, (stop - 1) * stride - before + 3
        seen = rows.read(max(first, 0), min(last, rows.height))
        missing = before - sides, behind - sides, max(-first, 0), max(last - rows.height, 0)
        if any(missing):
            seen = F.pad(seen, missing)
        return by(conv, seen, (0, sides))

    return Rows(size(rows.height), size(rows.width), read)


def _whole(rows: Rows, out: Tensor | None = None) -> Tensor:
    """All rows, written into `out` where it is given, which may be what they are made of.

    Each strip is written after the next one is made, which needs a row of those that it takes the place of.
    """
    strips = list(rows.strips())
    made = rows.read(*strips[0])
    if out is None:
        size = (*made.shape[:2], rows.height, rows.width)
        out = torch.empty(size, dtype=made.dtype, device=made.device, memory_format=torch.channels_last)
    for (start, stop), after in zip(strips, [*strips[1:], None], strict=True):
        coming = made if after is None else rows.read(*after)
        out[..., start:stop, :], made = made, coming
    return out
