"""Weights in the order that oneDNN computes in, which it otherwise makes of them anew at every call.

Where few pixels meet many channels, as at the bottom of the U-Net, that takes longer than what is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.runtime import streaming
from ldm.runtime.native import SWITCH
from ldm.runtime.streaming import Streamed

ONEDNN = torch.ops.mkldnn
PLAIN: tuple[Any, ...] = ("none", [], "")  # what else oneDNN could do to a result: nothing
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative, of a result that was to be another's

Self = TypeVar("Self", bound="Packed")


class Packed(Streamed):
    """A weight in oneDNN's order, and nowhere else; `read` answers with it in torch's, equal to the bit."""

    pack: Callable[[Tensor], Tensor]
    packed: Tensor

    def __new__(cls: type[Self], weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Self:
        packed = pack(weight.detach())
        parameter = super().__new__(cls, weight, packed.to_dense)
        parameter.pack, parameter.packed = pack, packed
        return parameter

    def changed(self, change: Callable[[Tensor], Tensor]) -> Packed:
        return Packed(change(self.read()), self.pack)


class _Linear(streaming.Linear):
    weight: Packed

    def pack(self, weight: Tensor) -> Tensor:
        return ONEDNN._reorder_linear_weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        if _learns(x):
            return super().forward(x)
        return ONEDNN._linear_pointwise(x, self.weight.packed, self.bias, *PLAIN)


class _Conv2d(streaming.Conv2d):
    weight: Packed

    def pack(self, weight: Tensor) -> Tensor:
        return ONEDNN._reorder_convolution_weight(weight, *self._geometry())

    def forward(self, x: Tensor) -> Tensor:
        if _learns(x):
            return super().forward(x)
        return ONEDNN._convolution_pointwise(x, self.weight.packed, self.bias, *self._geometry(), *PLAIN)

    def _geometry(self) -> tuple[Any, ...]:
        return self.padding, self.stride, self.dilation, self.groups


PACKING: dict[type[nn.Module], type[_Linear | _Conv2d]] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}


def _learns(x: Tensor) -> bool:
    """Whether a gradient is asked for, which oneDNN's operators have none of."""
    return torch.is_grad_enabled() and x.requires_grad


def pack(layer: nn.Module, weight: Tensor) -> Packed:
    """What `weight` is to become in a layer that is called, and whose weight nobody else looks into."""
    layer.__class__ = PACKING[type(layer)]
    assert isinstance(layer, _Linear | _Conv2d)
    return Packed(weight, layer.pack)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU computes rightly with packed weights of a type; not where LDM_NATIVE=0 says so."""
    if os.environ.get(SWITCH) == "0":
        return False
    tried = [
        (nn.Linear(48, 32), torch.randn(2, 9, 48)),
        (nn.Conv2d(48, 32, 3, padding=1), torch.randn(2, 48, 9, 7).to(memory_format=torch.channels_last)),
    ]
    try:
        with torch.no_grad():
            return all(_agrees(layer.to(dtype), x.to(dtype)) for layer, x in tried)
    except (AttributeError, RuntimeError):  # there is no such operator, or none for this type and CPU
        return False


def _agrees(layer: nn.Module, x: Tensor) -> bool:
    plain = layer(x).double()
    layer.weight = pack(layer, layer.get_parameter("weight"))
    return bool(torch.dist(layer(x).double(), plain) <= TOLERANCE[x.dtype] * plain.norm())
