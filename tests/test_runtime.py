from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm import Request, StableDiffusion
from ldm.canvas import Fitted
from ldm.diffusion import samplers
from ldm.engine import Engine
from ldm.errors import RequestError
from ldm.models.unet import UNet
from ldm.runtime import device as devices
from ldm.runtime.memory import first_that_fits
from ldm.runtime.noise import seeded_noise
from ldm.runtime.streaming import Streamed, resident, stream

CPU = torch.device("cpu")


def test_noise_is_the_same_in_any_batch():
    """Seed 7 alone, in a batch of four, and at another place in it, over several draws: bit for bit."""
    shape = (4, 8, 8)
    alone, batch, shuffled = (seeded_noise(seeds, shape, CPU) for seeds in ([7], [5, 6, 7, 8], [7, 3, 9, 1]))
    for _ in range(5):
        a, b, c = alone(), batch(), shuffled()
        assert torch.equal(a[0], b[2])
        assert torch.equal(a[0], c[0])
        assert a.dtype == torch.float32


def test_noise_is_torchs_own():
    expected = torch.randn(
        1, 4, 8, 8, generator=torch.Generator().manual_seed(42)
    )  # what a seed means in A1111 on a CPU
    assert torch.equal(seeded_noise([42], (4, 8, 8), CPU)(), expected)


def test_largest_seed():
    assert seeded_noise([2**64 - 1], (4, 8, 8), CPU)().isfinite().all()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_moves_on_to_the_next_plan_for_good(caplog, error):
    calls = []

    def plan(name, fits):
        def run(x):
            calls.append(name)
            if not fits:
                raise error
            return x + 1

        return run

    run = first_that_fits({"a": plan("a", False), "b": plan("b", False), "c": plan("c", True)})
    assert run(1) == 2
    assert run(2) == 3
    assert calls == ["a", "b", "c", "c"]
    assert caplog.text.count("out of memory") == 2
    with pytest.raises(type(error)):
        first_that_fits({"a": plan("a", False)})(1)


def test_threads_run_out_of_memory_together(caplog):
    """The slower ones of those that fail at the first plan find it gone already."""
    all_have_begun = threading.Barrier(4)

    def large(x):
        all_have_begun.wait(10)
        raise MemoryError

    run = first_that_fits({"large": large, "small": lambda x: x + 1})
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [1, 2, 3, 4]
    assert caplog.text.count("out of memory") == 1


def test_other_errors_are_not_taken_for_short_memory():
    def broken(x):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        first_that_fits({"a": broken, "b": lambda x: x})(1)


def test_devices(monkeypatch):
    assert devices.pick_device("cpu") == CPU
    with pytest.raises(RequestError, match="device is 'tpu': this machine has"):
        devices.pick_device("tpu")
    with pytest.raises(RequestError, match="device is 'cpu:7'"):
        devices.pick_device("cpu:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.pick_device("auto").type == "cuda"
    assert devices.pick_device(torch.device("cuda:1")).index == 1
    with pytest.raises(RequestError, match="device is 'cuda:2': this machine has cuda, cuda:1, "):
        devices.pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RequestError, match="device is 'cuda'"):
        devices.pick_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device("auto").type == "mps"


def test_dtypes(monkeypatch):
    for computes, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(devices, "cpu_computes_bfloat16", lambda computes=computes: computes)
        assert devices.pick_dtype("auto", CPU) == expected
    assert devices.pick_dtype("auto", torch.device("cuda")) == torch.float16
    assert devices.pick_dtype("auto", torch.device("mps")) == torch.float16
    assert devices.pick_dtype("bf16", CPU) == torch.bfloat16
    assert devices.pick_dtype(torch.float16, CPU) == torch.float16
    with pytest.raises(RequestError, match="dtype is 'int8': use auto or one of float32"):
        devices.pick_dtype("int8", CPU)


def on_meta(sd: StableDiffusion) -> Engine:
    """With the U-Net on `meta`, another device than the text encoder's."""
    return replace(sd._engine, unet=copy.deepcopy(sd.unet).to("meta"), device=torch.device("meta"))


def test_the_unet_leaves_a_gpu_whose_memory_runs_out(shipped, monkeypatch, caplog):
    """In the middle of a picture, which goes on where it was."""
    engine, evaluated, offloaded = on_meta(shipped), [], []
    predict = UNet.predict

    def cramped(self, x, shifts, keys_values):
        if len(evaluated) >= 3 and not offloaded:
            raise torch.OutOfMemoryError("CUDA out of memory")
        evaluated.append(len(keys_values[0][0]))
        return predict(self, x, shifts, keys_values)

    monkeypatch.setattr(UNet, "predict", cramped)
    monkeypatch.setattr("ldm.sampling.offload", offloaded.append)
    walk = engine.walk(shipped.resolve(Request("a red circle", seed=0, steps=5)), Fitted(None))
    assert len(list(walk)) == 5
    assert evaluated == [2, 2, 2, 1, 1, 1, 1]
    assert set(offloaded) == {engine.unet}
    assert [record.message.split(", ")[1] for record in caplog.records] == [
        "going on with an evaluation for each prompt",
        "going on with the U-Net's weights in main memory",
    ]


def test_weights_leave_only_where_they_may_and_there_are_any(shipped, monkeypatch):
    """Not those of a network that is learning; and prompts of unlike lengths come to it, too."""

    def full(self, x, shifts, keys_values):
        raise torch.OutOfMemoryError("CUDA out of memory")

    offloaded = []
    monkeypatch.setattr(UNet, "predict", full)
    monkeypatch.setattr("ldm.sampling.offload", offloaded.append)
    request = shipped.resolve(Request("a red circle " * 40, seed=0, steps=5))
    engine = on_meta(shipped)
    away = on_meta(shipped)
    for name in resident(away.unet):
        layer, weight = away.unet.get_submodule(name.removesuffix(".weight")), away.unet.get_parameter(name)
        stream(layer)
        layer.weight = Streamed(weight, weight.detach)
    for expected, cramped in ((1, engine), (0, replace(engine, may_offload=False)), (0, away)):
        offloaded.clear()
        with pytest.raises(torch.OutOfMemoryError):
            list(cramped.walk(request, Fitted(None)))
        assert len(offloaded) == expected


def test_what_is_sent_is_not_waited_for():
    sent = []

    class Tensor:
        def to(self, device, non_blocking):
            sent.append((device.type, non_blocking))

    for device in ("cuda", "mps", "cpu"):
        devices.send(Tensor(), torch.device(device))
    assert sent == [("cuda", True), ("mps", False), ("cpu", False)]


def _on_cpu(value) -> bool:
    return isinstance(value, Tensor) and value.device == CPU


class Sent(TorchDispatchMode):
    """Collects the shapes of what goes from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device != CPU and any(_on_cpu(each) for each in args):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("sampler", samplers.NAMES)
def test_a_gpu_is_never_waited_for(shipped, sampler):
    """`meta` stands in for it, whose tensors nobody can look into: reading a number of one is an error."""
    engine = on_meta(shipped)
    extras = {"guidance_rescale": 0.7, "dynamic_threshold": 0.9, "token_merging": 0.5, "deep_cache": 2}
    request = shipped.resolve(Request("a red circle", sampler=sampler, steps=4, seed=0, **extras))
    walk = engine.walk(request, Fitted(None))
    first = next(walk)
    assert first.x.is_meta
    with Sent() as sent:
        assert len(list(walk)) == len(shipped.levels(request)) - 2
    method = samplers.SAMPLERS[sampler]
    noise = {tuple(first.x.shape)} if method.eta or sampler in ("ddpm", "lcm") else set()
    timestep = {(1,)} if method.between else set()  # one that is not of the grid
    assert set(sent.shapes) <= noise | timestep
