"""Weights in eight bits: a quarter of the memory of float32, for weights that are a little off.

Each row of a weight, which makes one of the outputs, has a scale of its own (vector-wise absmax quantization, Dettmers
et al. 2022, arXiv:2208.07339). Layers compute as ever, with the weight that they are given when they run. LoRAs are
added to that weight then, because rounded with it they would be lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.runtime.streaming import Streamed, stream


class Quantized(Streamed):
    """A weight in int8, and nowhere else; `read` answers with what that stands for."""

    def __new__(cls, weight: Tensor) -> Quantized:
        exact, dtype = weight.detach().float(), weight.dtype
        scale = exact.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True) / 127
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # of rows of zeros
        levels = (exact / scale).round().to(torch.int8)
        return super().__new__(cls, weight, lambda: levels.float().mul_(scale).to(dtype))


def rounded(read: Callable[[], Tensor]) -> Tensor:
    """What a weight is once it has been quantized: where it is read from a file each time, it is to be the same."""
    return Quantized(read()).read()


def quantize(layer: nn.Module, weight: Tensor) -> Quantized:
    """What `weight` is to become in a layer that is called, and whose weight nobody else looks into."""
    stream(layer)
    return Quantized(weight)
