"""Weights in eight bits: as near as eight bits are, in a quarter of the memory, with LoRAs and plans as ever."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
from conftest import SHIPPED, SMALL, load_small, relative_error
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from lora_files import lora, saved
from PIL import Image
from torch import nn

from ldm import StableDiffusion
from ldm.cli import main
from ldm.runtime.plan import Job
from ldm.runtime.quantization import Quantized, quantize
from ldm.runtime.streaming import Streamed, streamable


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(-1e6, 1e6, width=32)))
def test_weights_are_within_half_a_level(weight):
    """Of 127 on each side of zero, in each row; the largest, and zeros, are exact; levels are normal numbers."""
    rows = torch.from_numpy(weight).flatten(1).double()
    held = Quantized(torch.from_numpy(weight)).read().flatten(1).double()
    largest = rows.abs().amax(dim=1, keepdim=True)
    level = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    assert ((held - rows).abs() <= level * 0.5001).all()
    assert (held[rows == 0] == 0).all()
    kept = level > torch.finfo(torch.float32).tiny
    assert torch.allclose(held.abs().amax(dim=1, keepdim=True)[kept], largest[kept], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_compute_with_what_is_read(dtype):
    for plain, x in [(nn.Linear(96, 64), torch.randn(3, 96)), (nn.Conv2d(48, 64, 3), torch.randn(1, 48, 6, 5))]:
        layer = copy.deepcopy(plain.to(dtype, memory_format=torch.channels_last))
        layer.weight = quantize(layer, layer.weight)
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
    """A weak one too, whose changes are less than what separates two levels."""
    path = saved(tmp_path, lora(sd))
    weights, before, plain = dict(small.unet.named_parameters()), eps(small), eps(sd)
    for strength in (1.0, 0.01):
        with small.load_lora(path, strength), sd.load_lora(path, strength):
            changes = eps(small) - before, eps(sd) - plain
        assert relative_error(*changes) < 0.1
    assert all(now is weights[name] for name, now in small.unet.named_parameters())
    assert torch.equal(eps(small), before)


def test_plans_count_a_byte_each():
    from ldm.checkpoint.load import plan_model

    plain, small = (plan_model(SHIPPED, Job(1 << 34, int8=int8), dtype=torch.float32) for int8 in (False, True))
    layers = sum(streamable(load_small().unet).values())
    assert plain.weights["unet"] - small.weights["unet"] == 3 * layers
    assert {**plain.weights, "unet": 0} == {**small.weights, "unet": 0}


def test_weights_that_stay_in_the_file_are_the_same(small):
    tight = StableDiffusion.load(device="cpu", dtype="float32", int8=True, memory=1 << 20)
    assert tight.plan.streamed["unet"]
    assert torch.equal(eps(tight), eps(small))


def test_nothing_else_is_kept():
    weight = torch.randn(64, 96)
    base = weakref.ref(weight)
    held = Quantized(weight)
    del weight
    assert base() is None
    assert held.is_meta


def test_the_flag(tmp_path, capsys):
    pictures, planned = set(), []
    for number, flags in enumerate(([], ["--int8"], ["--int8"])):
        out = tmp_path / str(number)
        call = ["txt2img", "-p", "a red circle", "--seed", "3", "-s", "2", *SMALL, "--outdir", str(out), *flags]
        assert main(call) == 0
        pictures.add(Image.open(next(out.iterdir())).tobytes())
        capsys.readouterr()
        assert main(["plan", "--memory", "99G", *flags]) == 0  # more than this process has taken
        [row] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("U-Net")]
        planned.append(int(row[1]))
    assert len(pictures) == 2
    assert planned[0] > 3 * planned[1] > 0
