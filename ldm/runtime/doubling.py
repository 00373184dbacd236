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
from ldm.runtime import streaming

FEWEST = 256  # pixels that are worth the sums of weights: a quarter as many are not, at 1280 channels


def use_in(network: nn.Module) -> None:
    """Let a network on the CPU enlarge its maps so."""
    for layer in network.modules():
        if isinstance(layer, Upsample):
            layer.doubled = doubled


def doubled(conv: nn.Module, x: Tensor) -> Tensor:
    """As `ldm.models.layers.doubled`, where no gradient is asked for. Hooks on the convolution are passed over."""
    batch, _, height, width = x.shape
    pays = height * width >= FEWEST and x.device.type in ("cpu", "meta")  # where it only counts what is taken
    if torch.is_grad_enabled() or not pays or type(conv) not in (nn.Conv2d, streaming.Conv2d):
        return layers.doubled(conv, x)
    assert isinstance(conv, nn.Conv2d)
    weight = streaming.value_of(conv.weight)
    size = (batch, conv.out_channels, 2 * height, 2 * width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for row in (0, 1):
        rows = _summed(weight, row, dim=2)
        for column in (0, 1):
            kind = F.conv2d(
                x, _summed(rows, column, dim=3), conv.bias, (1, 1), (1, 1)
            )  # as `seamless` looks for padding
            out[..., row::2, column::2] = kind[..., row : row + height, column : column + width]
    return out


def _summed(weight: Tensor, parity: int, dim: int) -> Tensor:
    """Three rows of weights, or columns, → two, for pixels in a row, or column, that is even, 0, or odd, 1.

    Of the three that an even one sees the last two are one pixel's, of those that an odd one sees the first two.
    """
    first, middle, last = weight.split(1, dim)
    return torch.cat([first + middle, last] if parity else [first, middle + last], dim)
