"""Weights in eight bits: as near as eight bits are, in a quarter of the memory, with LoRAs and plans as ever."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import SHIPPED, SMALL, load_small, relative_error
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from lora_files import lora, saved
from torch import nn

from ldm import StableDiffusion
from ldm.cli import main
from ldm.runtime.plan import Job
from ldm.runtime.quantization import Quantized, quantize
from ldm.runtime.streaming import Streamed, streamable


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(-1e6, 1e6, width=32)))
def test_weights_are_within_half_a_level(weight):
    """Of 127 on each side of zero, in each row; the largest, and zeros, are exact."""
    rows = torch.from_numpy(weight).flatten(1).double()
    held = Quantized(torch.from_numpy(weight)).read().flatten(1).double()
    largest = rows.abs().amax(dim=1, keepdim=True)
    assert ((held - rows).abs() <= largest * (0.5 / 127 + 1e-6) + 1e-37).all()
    assert (held[rows == 0] == 0).all()
    assert torch.allclose(held.abs().amax(dim=1, keepdim=True), largest, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_compute_with_what_is_read(dtype):
    for plain, x in [(nn.Linear(96, 64), torch.randn(3, 96)), (nn.Conv2d(48, 64, 3), torch.randn(1, 48, 6, 5))]:
        layer = copy.deepcopy(plain.to(dtype, memory_format=torch.channels_last))
        layer.weight = quantize(layer, layer.weight)
        assert layer.weight.is_meta  # there is no second copy
        value = layer.weight.read()
        assert value.dtype == dtype
        assert 0 < relative_error(value, plain.weight) < 0.01
        assert value.stride() == plain.weight.stride()
        plain.weight = nn.Parameter(value)
        assert torch.equal(layer(x.to(dtype)), plain(x.to(dtype)))
        assert torch.equal(copy.deepcopy(layer)(x.to(dtype)), layer(x.to(dtype)))


@pytest.fixture(scope="module")
def small() -> StableDiffusion:
    return StableDiffusion.load(device="cpu", dtype="float32", int8=True)


def eps(sd: StableDiffusion) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(size, generator=generator) for size in ((1, 4, 8, 8), (1, 32, 128)))
    return sd.unet(x, torch.tensor([300.0]), context)


def test_a_model_is_a_little_off(shipped, small):
    held = {name for name, weight in small.unet.named_parameters() if isinstance(weight, Quantized)}
    assert held == streamable(shipped.unet).keys()
    assert not any(isinstance(weight, Streamed) for net in (small.vae, small.text) for weight in net.parameters())
    assert 1e-4 < relative_error(eps(small), eps(shipped)) < 0.03


def test_loras_come_and_go(sd, small, tmp_path):
    path = saved(tmp_path, lora(sd))
    weights, before, plain = dict(small.unet.named_parameters()), eps(small), eps(sd)
    with small.load_lora(path), sd.load_lora(path):
        changes = eps(small) - before, eps(sd) - plain
    assert 0 < relative_error(*changes) < 0.3
    assert all(now is weights[name] for name, now in small.unet.named_parameters())
    assert torch.equal(eps(small), before)


def test_plans_count_a_byte_each():
    from ldm.checkpoint.load import plan_model

    plain, small = (plan_model(SHIPPED, Job(1 << 34, int8=int8), dtype=torch.float32) for int8 in (False, True))
    layers = sum(streamable(load_small().unet).values())
    assert plain.weights["unet"] - small.weights["unet"] == 3 * layers
    assert {**plain.weights, "unet": 0} == {**small.weights, "unet": 0}


def test_weights_that_stay_in_the_file_are_exact(shipped):
    tight = StableDiffusion.load(device="cpu", dtype="float32", int8=True, memory=1 << 20)
    assert tight.plan.streamed["unet"]
    assert torch.equal(tight.unet.middle[0].resnet.conv1.weight.read(), shipped.unet.middle[0].resnet.conv1.weight)


def test_the_flag(tmp_path, capsys):
    for flags in ([], ["--int8"]):
        assert main(["txt2img", "-p", "a red circle", "-s", "2", *SMALL, "--outdir", str(tmp_path), *flags]) == 0
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 2
    assert main(["plan", "--int8", "--memory", "4G"]) == 0
    assert "guidance" in capsys.readouterr().out
