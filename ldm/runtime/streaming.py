"""Weights that are read when their layer runs and are gone when it has: for networks that memory has no room for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.runtime.device import send

LEAST = 1 << 12  # numbers in a weight that is worth it: those of layers hold nearly all of a network's

Self = TypeVar("Self", bound="Streamed")


class Streamed(nn.Parameter):
    """A weight without data; `read` answers with it, from wherever it is kept."""

    read: Callable[[], Tensor]

    def __new__(cls: type[Self], like: Tensor, read: Callable[[], Tensor]) -> Self:
        parameter = super().__new__(cls, torch.empty(like.shape, dtype=like.dtype, device="meta"), requires_grad=False)
        parameter.read = read
        return parameter

    def changed(self, change: Callable[[Tensor], Tensor]) -> Streamed:
        """One that `change` makes of this one; what it raises is raised now."""
        result = Streamed(self, lambda: change(self.read()))
        result.read()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Streamed:
        twin = Streamed.__new__(type(self), self, self.read)
        twin.__dict__.update(self.__dict__)  # nobody writes into what it is read from
        return twin


def value_of(weight: Tensor) -> Tensor:
    """What a layer is to compute with."""
    return weight.read() if isinstance(weight, Streamed) else weight


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, value_of(self.weight), self.bias)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, value_of(self.weight), self.bias)


# What a layer becomes, by what it is; one that streams already stays so.
STREAMING: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear, nn.Conv2d: Conv2d, Linear: Linear, Conv2d: Conv2d,
}  # fmt: skip


def stream(layer: nn.Module) -> None:
    """Let a layer that is called, and whose weight nobody else looks into, have one that is `Streamed`, or not."""
    layer.__class__ = STREAMING[type(layer)]


def offload(network: nn.Module) -> None:
    """Keep in main memory what weights of layers a GPU has, to send each when its layer runs."""
    for name in resident(network):
        layer, weight = network.get_submodule(name.removesuffix(".weight")), network.get_parameter(name)
        kept = Streamed(weight, partial(send, weight.detach().cpu(), weight.device))
        stream(layer)
        layer.weight = kept


def resident(network: nn.Module) -> list[str]:
    """Those of the weights that can be streamed which are not: they have data, on the network's device."""
    return [name for name in streamable(network) if not isinstance(network.get_parameter(name), Streamed)]


def streamable(network: nn.Module) -> dict[str, int]:
    """The weights of a network that can be streamed, by name, with how many numbers they have, the largest first."""
    sizes = {
        f"{name}.weight": layer.weight.numel() for name, layer in network.named_modules() if type(layer) in STREAMING
    }
    return {name: size for name, size in sorted(sizes.items(), key=lambda item: -item[1]) if size >= LEAST}
