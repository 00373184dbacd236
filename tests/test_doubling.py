"""Enlarging and convolving in one: the same numbers for less arithmetic, whatever the weights are held as."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import relative_error
from synthetic import make_tensor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.models import layers
from ldm.models.layers import Upsample
from ldm.runtime import doubling
from ldm.runtime.doubling import FEWEST, doubled
from ldm.runtime.packing import can_pack, pack
from ldm.runtime.quantization import quantize
from ldm.runtime.streaming import Streamed, stream
from ldm.runtime.tiling import seamless

SHAPES = [(1, 16, 16), (2, 17, 9), (1, 1, FEWEST), (3, 40, 5)]  # of maps: batch, height, width


@pytest.fixture
def conv() -> nn.Conv2d:
    conv = nn.Conv2d(6, 5, 3, padding=1)
    conv.load_state_dict({name: make_tensor(name, list(t.shape)) for name, t in conv.state_dict().items()})
    return conv.to(memory_format=torch.channels_last)


def a_map(shape: tuple[int, int, int]) -> Tensor:
    batch, height, width = shape
    return make_tensor("x", [batch, 6, height, width]).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tiling", ["none", "x", "y", "both"])
def test_numbers_are_those_of_the_formula(conv, shape, tiling):
    x = a_map(shape)
    with seamless(tiling):
        expected = layers.doubled(copy.deepcopy(conv).double(), x.double())
        ours, plain = doubled(conv, x), layers.doubled(conv, x)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(ours, expected) <= max(2 * relative_error(plain, expected), 1e-7)


def test_half_precision_is_as_exact(conv):
    conv, x = conv.bfloat16(), a_map((1, 32, 32)).bfloat16()
    expected = layers.doubled(copy.deepcopy(conv).double(), x.double())
    assert relative_error(doubled(conv, x), expected) <= 2 * relative_error(layers.doubled(conv, x), expected) < 1e-2


def test_any_kind_of_weight(conv):
    x = a_map((1, 16, 16))
    expected = layers.doubled(conv, x)
    read, rounded = copy.deepcopy(conv), copy.deepcopy(conv)
    stream(read)
    read.weight = Streamed(conv.weight, lambda: conv.weight)
    assert relative_error(doubled(read, x), expected) <= 1e-6
    rounded.weight = quantize(rounded, conv.weight)
    assert relative_error(doubled(rounded, x), layers.doubled(rounded, x)) <= 1e-6
    conv.bias = None
    assert relative_error(doubled(conv, x), layers.doubled(conv, x)) <= 1e-6


@pytest.mark.parametrize("held", ["few pixels", "packed"])
def test_where_it_does_not_pay_all_is_as_ever(conv, held):
    if held == "packed":
        assert can_pack(torch.float32)
        conv.weight = pack(conv, conv.weight)
    x = a_map((1, 16, 16) if held == "packed" else (1, 15, 17))
    assert torch.equal(doubled(conv, x), layers.doubled(conv, x))


def test_four_ninths_of_the_arithmetic():
    layer = Upsample(8)
    counted = []
    for way in (layers.doubled, doubled):
        layer.doubled = way
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, 8, 63, 63))
        counted.append(counter.get_total_flops())
    assert counted[1] / counted[0] == pytest.approx(4 / 9 * (64 / 63) ** 2)  # its maps have a row and a column more


def test_other_sizes_are_enlarged_as_ever():
    layer, x = Upsample(8), torch.randn(1, 8, 20, 20)
    expected = layer(x, size=torch.Size((39, 40)))
    doubling.use_in(layer)
    assert torch.equal(layer(x, size=torch.Size((39, 40))), expected)
    assert relative_error(layer(x, size=torch.Size((40, 40))), layer(x)) == 0


def test_models_on_the_cpu_use_it(shipped):
    enlarging = [
        layer for network in (shipped.unet, shipped.vae) for layer in network.modules() if isinstance(layer, Upsample)
    ]
    assert enlarging
    assert all(layer.doubled is doubled for layer in enlarging)
