"""Weights in oneDNN's order: the same pictures, and LoRAs, gradients and seamless pictures as with torch's.

What is packed otherwise is bfloat16's, where the CPU computes it; here it is float32's too, which all do.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import SIDE, load_small, relative_error
from lora_files import lora, saved
from torch import nn

from ldm import Request, StableDiffusion
from ldm.checkpoint import load
from ldm.runtime import packing
from ldm.runtime.packing import Packed, can_pack, pack
from ldm.runtime.streaming import streamable
from ldm.runtime.tiling import seamless

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="torch has no oneDNN here")

LAYERS = {
    "linear": (nn.Linear(96, 64), (2, 7, 96)),
    "without bias": (nn.Linear(96, 64, bias=False), (2, 7, 96)),
    "convolution": (nn.Conv2d(48, 64, 3, padding=1), (2, 48, 9, 7)),
    "strided": (nn.Conv2d(48, 64, 3, stride=2, padding=1), (2, 48, 9, 7)),
    "pointwise": (nn.Conv2d(96, 64, 1), (1, 96, 5, 5)),
}


@pytest.fixture(scope="module")
def packed() -> StableDiffusion:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "PACKED", (torch.float32,))
        return load_small()


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(params=[(name, dtype) for name in LAYERS for dtype in TOLERANCE], ids=str)
def layers(request) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A layer, the same with a packed weight, and what it takes."""
    name, dtype = request.param
    if not can_pack(dtype):
        pytest.skip(f"this CPU does not compute {dtype}")
    plain, shape = LAYERS[name]
    plain = copy.deepcopy(plain).to(dtype, memory_format=torch.channels_last)
    layer = copy.deepcopy(plain)
    layer.weight = pack(layer, layer.weight)
    x = torch.randn(shape).to(dtype)
    return plain, layer, x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def test_layers_compute_the_same(layers):
    """At one size and at another, and then with the weight that they began with."""
    plain, layer, x = layers
    for each in (x, x[:1, ..., :5, :], x):
        result = layer(each)
        assert relative_error(result, plain(each)) <= TOLERANCE[x.dtype]
        assert x.ndim == 3 or result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(layer.weight.read(), plain.weight)
        assert torch.equal(copy.deepcopy(layer)(each), result)


REORDERS = """
import torch
from torch import nn
from ldm.runtime.packing import pack
for layer, shape in (nn.Conv2d(320, 320, 3, padding=1), (2, 320, 24, 24)), (nn.Linear(640, 320), (2, 77, 640)):
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
    layer = layer.to(memory_format=torch.channels_last)
    if {packed}:
        layer.weight = pack(layer, layer.weight)
    with torch.no_grad():
        layer(x)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            layer(x)
"""


@pytest.mark.parametrize("packed", [True, False])
def test_no_weight_is_reordered_twice(packed):
    """oneDNN tells all it does: without packing it reorders the convolution's weights at every call."""
    command = [sys.executable, "-c", REORDERS.format(packed=packed)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "convolution" in told
    assert ("exec,cpu,reorder" in told) is not packed


def test_nothing_keeps_a_layer():
    for plain, x in LAYERS.values():
        layer = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        weight = layer.weight
        layer.weight = pack(layer, weight)
        layer(torch.randn(x).to(memory_format=torch.channels_last if len(x) == 4 else torch.preserve_format))
        gone = weakref.ref(layer), weakref.ref(weight)
        gc.disable()
        del layer, weight
        left = [each() for each in gone]  # before a collection could take away what is left
        gc.enable()
        assert left == [None, None]


@pytest.mark.parametrize("of_bias", [False, True])
def test_gradients_pass_through(layers, of_bias):
    plain, layer, x = layers
    if of_bias and plain.bias is None:
        pytest.skip("it has no bias")
    grads = []
    for each in (layer, plain):
        each.requires_grad_(False)
        learning = (each.bias if of_bias else x).requires_grad_()
        with torch.enable_grad():
            grads += torch.autograd.grad(each(x).square().sum(), learning)
    assert relative_error(*grads) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("tiling", ["x", "y", "both"])
def test_padding_wraps_around(layers, tiling):
    plain, layer, x = layers
    with seamless(tiling):
        assert relative_error(layer(x), plain(x)) <= TOLERANCE[x.dtype]


def test_models_draw_the_same(shipped, packed):
    held = {name: weight for name, weight in packed.unet.named_parameters() if isinstance(weight, Packed)}
    assert held.keys() == streamable(shipped.unet).keys()
    assert not any(isinstance(weight, Packed) for net in (packed.vae, packed.text) for weight in net.parameters())
    request = Request("a red circle", seed=3, steps=4, width=SIDE, height=SIDE)
    ours, theirs = (np.asarray(model.generate(request)[0]).astype(int) for model in (packed, shipped))
    assert np.abs(ours - theirs).max() <= 1


def test_tokens_are_merged_all_the_same(shipped, packed):
    """Token merging meets a layer that is packed."""
    request = Request("a red circle", seed=3, steps=2, width=SIDE, height=SIDE, token_merging=0.5)
    ours, theirs = (np.asarray(model.generate(request)[0]).astype(int) for model in (packed, shipped))
    assert np.abs(ours - theirs).max() <= 1


def test_loras_are_packed_too(sd, packed, tmp_path):
    """Two of the same weights, the first of which goes first; then none is left."""
    path = saved(tmp_path, lora(sd))
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 32, sd.unet.config.context_dim)
    weights = dict(packed.unet.named_parameters())

    def eps() -> list[torch.Tensor]:
        return [model.unet(x, torch.tensor([300.0]), context) for model in (packed, sd)]

    plain = eps()[0]
    handles = [[model.load_lora(path, strength) for model in (packed, sd)] for strength in (0.5, 0.3)]
    changed = [now for name, now in packed.unet.named_parameters() if now is not weights[name]]
    assert changed
    assert all(isinstance(weight, Packed) for weight in changed)
    for removed in handles:
        ours, theirs = eps()
        assert relative_error(ours, theirs) <= 1e-5
        assert relative_error(ours, plain) > 1e-3
        for handle in removed:
            handle.remove()
    assert all(now is weights[name] for name, now in packed.unet.named_parameters())
    assert torch.equal(eps()[0], plain)


def test_weights_that_stay_in_the_file_are_not_packed(monkeypatch, shipped):
    monkeypatch.setattr(load, "PACKED", (torch.float32,))
    tight = StableDiffusion.load(device="cpu", dtype="float32", memory=1 << 20)
    kinds = [isinstance(weight, Packed) for weight in tight.unet.parameters()]
    assert tight.plan.streamed["unet"]
    assert not any(kinds)


@pytest.fixture
def not_yet_tried():
    can_pack.cache_clear()
    yield
    can_pack.cache_clear()


def test_what_is_not_right_is_not_packed(not_yet_tried, monkeypatch):
    monkeypatch.setattr(packing._Linear, "forward", lambda self, x: x[..., :32])
    assert not can_pack(torch.float32)
    can_pack.cache_clear()
    monkeypatch.setattr(packing, "ONEDNN", None)
    assert not can_pack(torch.float32)
    monkeypatch.undo()
    monkeypatch.setenv("LDM_NATIVE", "0")
    can_pack.cache_clear()
    assert not can_pack(torch.float32)


def test_to_try_draws_no_numbers(not_yet_tried):
    state = torch.get_rng_state()
    assert can_pack(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_is_left_alone(shipped):
    assert not any(isinstance(weight, Packed) for weight in shipped.unet.parameters())
