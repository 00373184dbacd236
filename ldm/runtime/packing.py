"""Weights in the order that oneDNN computes in, which it otherwise makes of them anew at every call.

Where few pixels meet many channels, as at the bottom of the U-Net, that takes longer than what is computed. The order
depends on the size of what is convolved, so weights get it when their layer runs, and another when the size changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.runtime import streaming
from ldm.runtime.native import SWITCH
from ldm.runtime.streaming import Streamed

ONEDNN = torch.ops.mkldnn
PLAIN: tuple[Any, ...] = ("none", [], "")  # what else oneDNN could do to a result: nothing
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative, of a result that was to be another's

Order = Callable[[Tensor, torch.Size], Tensor]  # a weight, and the shape of what its layer gets → the weight, packed


class _Held:
    """A weight's one copy: first in torch's order, then in that for the shape that was last seen."""

    def __init__(self, weight: Tensor, order: Order):
        self.order = order
        self.state: tuple[torch.Size | None, Tensor] = None, weight.detach()

    def __call__(self) -> Tensor:
        return self.state[1].to_dense()

    def packed(self, shape: torch.Size) -> Tensor:
        seen, copy = self.state
        if seen != shape:
            copy = self.order(copy.to_dense(), shape)
            self.state = shape, copy
        return copy


class Packed(Streamed):
    """A weight whose layer alone has its data; `read` answers with it in torch's order, equal to the bit."""

    read: _Held

    def __new__(cls, weight: Tensor, order: Order) -> Packed:
        return super().__new__(cls, weight, _Held(weight, order))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Packed:
        return Packed(change(self.read()), self.read.order)


class _Linear(streaming.Linear):
    weight: Packed

    def order(self) -> Order:
        return _order_linear

    def forward(self, x: Tensor) -> Tensor:
        if _learns(x, self.bias):
            return super().forward(x)
        # One order does for any number of rows.
        return ONEDNN._linear_pointwise(x, self.weight.read.packed(x.shape[-1:]), self.bias, *PLAIN)


class _Conv2d(streaming.Conv2d):
    weight: Packed

    def order(self) -> Order:
        return partial(_order_convolution, self._geometry())

    def forward(self, x: Tensor) -> Tensor:
        if _learns(x, self.bias):
            return super().forward(x)
        packed = self.weight.read.packed(x.shape)
        return ONEDNN._convolution_pointwise(x, packed, self.bias, *self._geometry(), *PLAIN)

    def _geometry(self) -> tuple[Any, ...]:
        return self.padding, self.stride, self.dilation, self.groups


PACKING: dict[type[nn.Module], type[_Linear | _Conv2d]] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}


def _order_linear(weight: Tensor, shape: torch.Size) -> Tensor:
    return ONEDNN._reorder_linear_weight(weight)


def _order_convolution(geometry: tuple[Any, ...], weight: Tensor, shape: torch.Size) -> Tensor:
    return ONEDNN._reorder_convolution_weight(weight, *geometry, shape)


def _learns(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient is asked for, which oneDNN's operators have none of."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def pack(layer: nn.Module, weight: Tensor) -> Packed:
    """What `weight` is to become in a layer that is called, and whose weight nobody else looks into."""
    layer.__class__ = PACKING[type(layer)]
    assert isinstance(layer, _Linear | _Conv2d)
    return Packed(weight, layer.order())


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU computes rightly with packed weights of a type; not where LDM_NATIVE=0 says so."""
    if os.environ.get(SWITCH) == "0":
        return False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            tried = [
                (nn.Linear(48, 32), torch.randn(2, 9, 48)),
                (nn.Conv2d(48, 32, 3, padding=1), torch.randn(2, 48, 9, 7).to(memory_format=torch.channels_last)),
            ]
            return all(_agrees(layer.to(dtype), x.to(dtype)) for layer, x in tried)
    except (AttributeError, RuntimeError):  # there is no such operator, or none for this type and CPU
        return False


def _agrees(layer: nn.Module, x: Tensor) -> bool:
    plain = layer(x).double()
    layer.weight = pack(layer, layer.get_parameter("weight"))
    return bool(torch.dist(layer(x).double(), plain) <= TOLERANCE[x.dtype] * plain.norm())
