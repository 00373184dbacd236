"""3×3 convolutions on CPUs, for less arithmetic: nothing is approximated, and rounding stays rounding.

By Winograd's algorithm where there is a kernel for it (`kernels/convolution.h`). Where there is none, maps that are
enlarged first still need no more than four ninths: of the nine pixels that a 3×3 convolution sees of a map enlarged to
twice its size, several are the same pixel: two by two are different, and which are the same depends only on whether a
row and a column are even. So each of the four kinds of pixels is a 2×2 convolution of the map as it was, by sums of the
weights. These are made anew at each call, as Winograd's transforms are, which costs little where there are pixels
enough, and takes LoRAs and streamed weights as they come.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import layers
from ldm.models.layers import ResBlock, Upsample
from ldm.runtime import native, streaming

FEWEST = 256  # pixels that are worth what is made of weights: a quarter as many are not, at 1280 channels
GEOMETRY = (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"


def use_in(network: nn.Module) -> None:
    """Let a network on the CPU convolve so."""
    for layer in network.modules():
        if isinstance(layer, ResBlock):
            layer.convolve = convolve
        elif isinstance(layer, Upsample):
            layer.doubled = doubled


def convolve(conv: nn.Module, x: Tensor, padding: tuple[int, int] | None = None) -> Tensor:
    """As `ldm.models.layers.convolve`."""
    if not _is_ours(conv, x) or not native.convolves(x, conv.weight, enlarged=False):
        return layers.convolve(conv, x, padding)
    return native.convolution(x, streaming.value_of(conv.weight), conv.bias, padding or (1, 1), enlarged=False)


def doubled(conv: nn.Module, x: Tensor) -> Tensor:
    """As `ldm.models.layers.doubled`."""
    if not _is_ours(conv, x):
        return layers.doubled(conv, x)
    weight = streaming.value_of(conv.weight)
    if native.convolves(x, conv.weight, enlarged=True):
        return native.convolution(x, weight, conv.bias, (1, 1), enlarged=True)
    batch, _, height, width = x.shape
    size = (batch, len(weight), 2 * height, 2 * width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for row in (0, 1):
        rows = _summed(weight, row, dim=2)
        for column in (0, 1):
            kind = F.conv2d(
                x, _summed(rows, column, dim=3), conv.bias, (1, 1), (1, 1)
            )  # as `seamless` looks for padding
            out[..., row::2, column::2] = kind[..., row : row + height, column : column + width]
    return out


def _is_ours(conv: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether that is a plain 3×3 convolution, of pixels enough, where nobody learns or looks on.

    How many are enough depends on no batch, or that would decide on the last digits of a picture.
    """
    if type(conv) not in (nn.Conv2d, streaming.Conv2d) or conv._forward_hooks or conv._forward_pre_hooks:
        return False
    assert isinstance(conv, nn.Conv2d)
    height, width = x.shape[-2:]
    here = x.device.type in ("cpu", "meta")  # where it only counts what is taken
    free = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return here and free and height * width >= FEWEST and geometry == GEOMETRY


def _summed(weight: Tensor, parity: int, dim: int) -> Tensor:
    """Three rows of weights, or columns, → two, for pixels in a row, or column, that is even, 0, or odd, 1.

    Of the three that an even one sees the last two are one pixel's, of those that an odd one sees the first two.
    """
    first, middle, last = weight.split(1, dim)
    return torch.cat([first + middle, last] if parity else [first, middle + last], dim)
