"""Weights in oneDNN's order: the same pictures, and LoRAs, gradients and seamless pictures as with torch's.

What is packed otherwise is bfloat16's, where the CPU computes it; here it is float32, which all do.
"""

from __future__ import annotations

import copy

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


@pytest.fixture(params=LAYERS)
def layers(request) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A layer, the same with a packed weight, and what it takes."""
    plain, shape = LAYERS[request.param]
    layer = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    layer.weight = pack(layer, layer.weight)
    x = torch.randn(shape)
    return plain, layer, x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def test_layers_compute_the_same(layers):
    plain, layer, x = layers
    assert layer.weight.is_meta  # there is no second copy
    assert torch.equal(layer.weight.read(), plain.weight)
    result = layer(x)
    assert relative_error(result, plain(x)) <= 1e-6
    assert x.ndim == 3 or result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(copy.deepcopy(layer)(x), result)


def test_gradients_pass_through(layers):
    plain, layer, x = layers
    x.requires_grad_()
    with torch.enable_grad():
        ours, theirs = (torch.autograd.grad(each(x).square().sum(), x)[0] for each in (layer, plain))
    assert relative_error(ours, theirs) <= 1e-6


@pytest.mark.parametrize("tiling", ["x", "y", "both"])
def test_padding_wraps_around(layers, tiling):
    plain, layer, x = layers
    with seamless(tiling):
        assert relative_error(layer(x), plain(x)) <= 1e-6


def test_models_draw_the_same(shipped, packed):
    held = {name: weight for name, weight in packed.unet.named_parameters() if isinstance(weight, Packed)}
    assert held.keys() == streamable(shipped.unet).keys()
    assert not any(isinstance(weight, Packed) for net in (packed.vae, packed.text) for weight in net.parameters())
    request = Request("a red circle", seed=3, steps=4, width=SIDE, height=SIDE)
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


def test_what_is_not_right_is_not_packed(monkeypatch):
    can_pack.cache_clear()
    monkeypatch.setattr(packing._Linear, "forward", lambda self, x: x[..., :32])
    assert not can_pack(torch.float32)
    can_pack.cache_clear()
    monkeypatch.setattr(packing, "ONEDNN", None)
    assert not can_pack(torch.float32)
    monkeypatch.undo()
    monkeypatch.setenv("LDM_NATIVE", "0")
    can_pack.cache_clear()
    assert not can_pack(torch.float32)
    can_pack.cache_clear()


def test_float32_is_left_alone(shipped):
    assert not any(isinstance(weight, Packed) for weight in shipped.unet.parameters())
