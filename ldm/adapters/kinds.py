"""The kinds of change: how files factor the difference that a training made to a weight.

A weight (out, in, height, width), or (out, in), counts here as a matrix of `out` rows. Each kind is a table of
products, in the letters of einsum. Sources: LoRA, arXiv:2106.09685; LoHa, arXiv:2108.06098; LoKr, arXiv:2309.14859,
which also tells of the Tucker forms; DoRA, arXiv:2402.09353; file formats, LyCORIS's and ComfyUI's weight_adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.files import StoredTensor
from ldm.checkpoint.header import FLOATS

MAX_RANK = 4096  # four times that of any file known; it bounds what a product costs

Size = tuple[int, int]


class Product(NamedTuple):
    """A matrix as a product. The last axis of a factor stands for all axes that its tensor has left."""

    factors: Mapping[str, str]  # the tensor's part in the change: its axes
    result: str

    def sizes(self, tensors: Mapping[str, StoredTensor], kernel: int) -> dict[str, int]:
        """How long each axis is, where `s` is the pixels of the weight's kernel. Raises ValueError."""
        sizes = {"s": kernel}
        for part, axes in self.factors.items():
            shape, name = tensors[part].shape, tensors[part].name
            if len(shape) < len(axes) - 1:
                raise ValueError(f"{name!r:.150} has the shape {list(shape)}; expected {len(axes)} axes")
            for axis, size in zip(axes, _fold(shape, len(axes)), strict=True):
                if sizes.setdefault(axis, size) != size:
                    raise ValueError(
                        f"{name!r:.150} has the shape {list(shape)}, whose {size} is {sizes[axis]} in what is beside it"
                    )
                if size < 1 or (axis not in self.result and size > MAX_RANK):
                    raise ValueError(f"{name!r:.150} has the rank {size}; 1 to {MAX_RANK} are allowed")
        return sizes

    def matrix(self, tensors: Mapping[str, StoredTensor], device: torch.device) -> Tensor:
        """The product in float32, as a matrix."""
        loaded = [
            tensors[part].load().to(device, torch.float32).reshape(_fold(tensors[part].shape, len(axes)))
            for part, axes in self.factors.items()
        ]
        return torch.einsum(",".join(self.factors.values()) + "->" + self.result, *loaded).flatten(1)


def _fold(shape: Sequence[int], axes: int) -> tuple[int, ...]:
    """A shape with so many axes: the last ones made one, or a one put at the end."""
    return *shape[: axes - 1], math.prod(shape[axes - 1 :])


class Kind(NamedTuple):
    """How a change is made of matrices, each of which may be stored in any of several ways."""

    matrices: tuple[tuple[Product, ...], ...]
    join: Callable[..., Tensor] = lambda matrix: matrix
    size: Callable[..., Size | None] = lambda size: size  # that of the joined matrix; None if they do not join
    ranked: tuple[int, ...] = ()  # the matrices whose rank divides alpha: the first of them that has one
    leaf: str = "weight"  # what is changed

    @property
    def parts(self) -> set[str]:
        return {part for ways in self.matrices for way in ways for part in way.factors}


def _plain(name: str) -> Product:
    return Product({name: "ok"}, "ok")


def _pair(a: str, b: str) -> Product:
    return Product({a: "or", b: "rk"}, "ok")


def _tucker(a: str, core: str, b: str) -> Product:
    return Product({a: "ro", core: "rqs", b: "qi"}, "ois")


KINDS = {
    "LoRA": Kind(
        ((_pair("up", "down"), Product({"up": "or", "mid": "rqs", "down": "qi"}, "ois")),),
        ranked=(0,),
    ),
    "LoHa": Kind(
        (
            (_pair("hada_w1_a", "hada_w1_b"), _tucker("hada_w1_a", "hada_t1", "hada_w1_b")),
            (_pair("hada_w2_a", "hada_w2_b"), _tucker("hada_w2_a", "hada_t2", "hada_w2_b")),
        ),
        torch.mul,
        lambda first, second: first if first == second else None,
        ranked=(0,),
    ),
    "LoKr": Kind(
        (
            (_plain("lokr_w1"), _pair("lokr_w1_a", "lokr_w1_b")),
            (
                _plain("lokr_w2"),
                _pair("lokr_w2_a", "lokr_w2_b"),
                _tucker("lokr_w2_a", "lokr_t2", "lokr_w2_b"),
            ),
        ),
        torch.kron,
        lambda first, second: (first[0] * second[0], first[1] * second[1]),
        ranked=(1, 0),
    ),
    "difference": Kind(((_plain("diff"),),)),
    "difference of biases": Kind(((_plain("diff_b"),),), leaf="bias"),
    "difference of gains": Kind(((_plain("w_norm"),),)),
    "difference of shifts": Kind(((_plain("b_norm"),),), leaf="bias"),
}


@dataclass(frozen=True)
class Change:
    """The change of one weight, as it is stored. `delta` is what to add to the weight at full strength."""

    kind: Kind
    products: tuple[Product, ...]
    tensors: Mapping[str, StoredTensor]
    rank: int | None = None
    scale: float = 1.0
    magnitude: Magnitude | None = None

    def delta(self, weight: Tensor) -> Tensor:
        """float32, of the shape of `weight`, which is float32 too."""
        matrices = [product.matrix(self.tensors, weight.device) for product in self.products]
        delta = self.kind.join(*matrices).reshape(weight.shape) * self.scale
        return delta if self.magnitude is None else self.magnitude.rescale(weight + delta) - weight


@dataclass(frozen=True)
class Magnitude:
    """DoRA's lengths of a weight's rows (axis 0) or of its columns (axis 1), which merging gives them back."""

    tensor: StoredTensor
    axis: int
    eps: float  # added to the present lengths, as the file's tool does

    def rescale(self, weight: Tensor) -> Tensor:
        others = [axis for axis in range(weight.ndim) if axis != self.axis]
        length = torch.linalg.vector_norm(weight, dim=others, keepdim=True) + self.eps
        wanted = self.tensor.load().to(weight.device, torch.float32).reshape(length.shape)
        return weight * (wanted / length.clamp_min(torch.finfo(torch.float32).tiny))


LYCORIS_EPS = torch.finfo(torch.float32).eps


def read_magnitude(tensors: Mapping[str, StoredTensor], shape: Sequence[int]) -> Magnitude | None:
    """Along which axis a DoRA's lengths run: PEFT's along rows, LyCORIS's as their shape tells. Raises ValueError."""
    stored = tensors.get("magnitude") or tensors.get("dora_scale")
    if stored is None:
        return None
    of_rows = "magnitude" in tensors or len(stored.shape) < 2 or stored.shape[0] == shape[0]
    axis = 0 if of_rows else 1
    if len(shape) <= axis or stored.numel != shape[axis] or max(stored.shape, default=1) != stored.numel:
        raise ValueError(f"{stored.name!r:.150} has the shape {list(stored.shape)}, the weight {list(shape)}")
    return Magnitude(stored, axis, 0.0 if "magnitude" in tensors else LYCORIS_EPS)


def read_change(kind: Kind, tensors: Mapping[str, StoredTensor], shape: Sequence[int]) -> Change:
    """The change that tensors of a kind make to a weight of a shape. Raises ValueError, before any product."""
    present = kind.parts & tensors.keys()
    for part in present:
        if tensors[part].dtype not in FLOATS:
            raise ValueError(f"{tensors[part].name!r:.150} is of the type {tensors[part].dtype}; expected a float")
    products = tuple(_choose(ways, present, tensors) for ways in kind.matrices)
    kernel = math.prod(shape[2:])
    sizes = [product.sizes(tensors, kernel) for product in products]
    matrices = [
        (size[product.result[0]], math.prod(size[axis] for axis in product.result[1:]))
        for product, size in zip(products, sizes, strict=True)
    ]
    size, wanted = kind.size(*matrices), (shape[0], math.prod(shape[1:]))
    if size != wanted:
        culprit = list(products[-1].factors)[0 if size and size[0] != wanted[0] else -1]
        made = f"{size[0]}×{size[1]}" if size else " and ".join(f"{rows}×{columns}" for rows, columns in matrices)
        raise ValueError(
            f"{tensors[culprit].name!r:.150} is of a change of {made}, the model's weight has {wanted[0]}×{wanted[1]}: "
            "the file is for another kind of model"
        )
    ranks = [_rank(products[i], sizes[i]) for i in kind.ranked]
    return Change(kind, products, tensors, next((rank for rank in ranks if rank), None))


def _choose(ways: Iterable[Product], present: set[str], tensors: Mapping[str, StoredTensor]) -> Product:
    """The way in which a matrix is stored: the one that has all of its factors. Raises ValueError."""
    ways = list(ways)
    here = present & {part for way in ways for part in way.factors}
    for way in ways:
        if here == set(way.factors):
            return way
    nearest = min(ways, key=lambda way: (len(here - set(way.factors)), len(set(way.factors) - here)))
    missing, name = sorted(set(nearest.factors) - here), tensors[min(here or present)].name
    raise ValueError(
        f"{name!r:.150} has no {' or '.join(missing)} beside it" if missing else f"{name!r:.150} is there in two forms"
    )


def _rank(product: Product, sizes: Mapping[str, int]) -> int | None:
    """What alpha is divided by: the rows of the last factor, where there is more than one factor."""
    return sizes[list(product.factors.values())[-1][0]] if len(product.factors) > 1 else None
