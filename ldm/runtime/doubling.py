"""Maps that are enlarged and then convolved, for four ninths of the arithmetic.

Of the nine pixels that a 3×3 convolution sees of a map enlarged to twice its size, several are the same pixel: two by
two are different, and which are the same depends only on whether a row and a column are even. So each of the four kinds
of pixels is a 2×2 convolution of the map as it was, by sums of the weights. These are made anew at each call, which
costs little where there are pixels enough, and takes LoRAs and streamed weights as they come.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import layers
from ldm.models.layers import Upsample
from ldm.runtime.packing import Packed
from ldm.runtime.streaming import value_of

FEWEST = 256  # pixels that are worth the sums; half as many are not, and twice are, at 1280 channels


def use_in(network: nn.Module) -> None:
    """Let a network on the CPU enlarge its maps so."""
    for layer in network.modules():
        if isinstance(layer, Upsample):
            layer.doubled = doubled


def doubled(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """As `ldm.models.layers.doubled`."""
    batch, _, height, width = x.shape
    if batch * height * width < FEWEST or isinstance(conv.weight, Packed):
        return layers.doubled(conv, x)
    bias = None if conv.bias is None else conv.bias.repeat(4)
    kinds = F.conv2d(x, _two_by_two(value_of(conv.weight)), bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    size = (batch, conv.out_channels, 2 * height, 2 * width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for kind, (row, column) in zip(kinds.chunk(4, dim=1), PLACES, strict=True):
        out[..., row::2, column::2] = kind[..., row : row + height, column : column + width]
    return out


PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))  # of pixels, among the four that one becomes


def _two_by_two(weight: Tensor) -> Tensor:
    """Weights (o, i, 3, 3) → (4·o, i, 2, 2), of the kinds of pixels in the order of PLACES.

    Of an even row the first of the three rows that are seen is another's, of an odd row the last.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rows = [_summed(exact, parity, dim=2) for parity in (0, 1)]
    kinds = torch.cat([_summed(rows[row], column, dim=3) for row, column in PLACES])
    return kinds.to(weight.dtype, memory_format=torch.channels_last)


def _summed(weight: Tensor, parity: int, dim: int) -> Tensor:
    first, middle, last = weight.split(1, dim)
    return torch.cat([first + middle, last] if parity else [first, middle + last], dim)
