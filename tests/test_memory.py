"""Less memory, and the same pictures: strips of the VAE, streamed weights, and plans that tell what is needed."""

from __future__ import annotations

import copy
import gc
import math
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHIPPED, load_small, relative_error
from lora_files import lora, saved
from safetensors.torch import load_file, save_file
from synthetic import make_tensor
from torch import nn

from ldm import Request, StableDiffusion, VAEConfig
from ldm.checkpoint import load
from ldm.cli import main
from ldm.config import SD_V1
from ldm.errors import CheckpointError, RequestError
from ldm.models.layers import GroupNorm, row_statistics
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.runtime import strips
from ldm.runtime.footprint import footprint
from ldm.runtime.memory import KEEPING, control_group_limit, keep_freed, parse_memory
from ldm.runtime.plan import MIB, Job, Plan, fit
from ldm.runtime.streaming import Streamed, offload, resident, stream, streamable
from ldm.runtime.tiling import seamless


@pytest.fixture(scope="module")
def vae() -> VAE:
    vae = VAE(VAEConfig(channels=32))
    vae.load_state_dict({name: make_tensor(name, list(t.shape)) for name, t in vae.state_dict().items()})
    return vae.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("pixels", [1, 300, 1 << 14])
@pytest.mark.parametrize("tiling", ["none", "x"])
def test_strips_are_the_whole(vae, monkeypatch, pixels, tiling):
    """Of a row each, of some, and of as many as are used; the sides are odd, and the batch is two."""
    monkeypatch.setattr(strips, "STRIP_PIXELS", pixels)
    latents, images = make_tensor("x", [2, 4, 9, 5]), make_tensor("x", [2, 3, 72, 40])
    with seamless(tiling):
        assert relative_error(strips.decode(vae, latents), vae.decode(latents)) <= 1e-6
        assert relative_error(strips.encode(vae, images).mean, vae.encode(images).mean) <= 1e-6


def test_strips_in_half_precision_are_as_exact(vae):
    latents = make_tensor("x", [1, 4, 16, 16])
    half, expected = copy.deepcopy(vae).bfloat16(), copy.deepcopy(vae).double().decode(latents.double())
    whole, in_strips = (relative_error(way(half, latents.bfloat16()), expected) for way in (VAE.decode, strips.decode))
    assert in_strips <= 1.2 * whole < 0.1


def test_parts_of_a_map_are_normalised_as_the_whole_is():
    """In half precision too, where a group's mean is large beside its deviation."""
    norm = GroupNorm(2, 8).bfloat16()
    norm.weight.uniform_(0.5, 2)
    x = (torch.randn(1, 8, 32, 32) + 30).bfloat16()
    expected = copy.deepcopy(norm).double()(x.double())
    normalise = norm.given(*row_statistics(x))
    ours = torch.cat([normalise(x[..., :5, :]), normalise(x[..., 5:, :])], dim=-2)
    assert relative_error(ours, expected) <= 1.2 * relative_error(norm(x), expected) < 1e-2


@pytest.mark.parametrize("size", [(128, 128), (64, 256)])
def test_large_pictures_have_no_seams(vae, size):
    """1024×1024 and 512×2048 pixels."""
    latents = make_tensor("latents", [1, 4, *size])
    assert relative_error(strips.decode(vae, latents), vae.decode(latents)) <= 1e-5


def test_strips_take_less_memory():
    with torch.device("meta"):
        vae, latents = VAE(SD_V1.vae), torch.empty(1, 4, 64, 64)
        whole, in_strips = (footprint(lambda way=way: way(vae, latents)) for way in (VAE.decode, strips.decode))
    maps = 128 * 512 * 512 * 4  # bytes of the widest map at full size is two of these
    assert 3 * maps <= in_strips <= 3.5 * maps
    assert whole > 1.7 * in_strips


def test_footprints_count_what_is_alive_at_once():
    x = torch.empty(1000, device="meta")

    def run():
        a = x + 1  # 4000 bytes
        b = a.double()  # and 8000
        del a
        c = b.view(10, 100)[:5]  # a view
        d = c * 2  # 8000 and 4000
        return nn.functional.scaled_dot_product_attention(*[d.view(1, 1, 5, 100)] * 3)  # and 4000, no 5 × 5

    assert footprint(run) == 16000


@pytest.mark.parametrize(
    ("layer", "x"), [(nn.Linear(4, 3), torch.randn(2, 4)), (nn.Conv2d(4, 3, 3, padding=1), torch.randn(1, 4, 6, 6))]
)
def test_weights_are_read_when_their_layer_runs(layer, x):
    expected, weight, reads = layer(x), layer.weight.detach().clone(), []

    def read():
        reads.append(1)
        return weight

    layer.weight = Streamed(weight, read)
    stream(layer)
    for runner in (layer, copy.deepcopy(layer), layer):
        assert torch.equal(runner(x), expected)
    assert len(reads) == 3
    assert layer.weight.is_meta
    layer.weight = nn.Parameter(weight)  # one that stays is used as it is
    assert torch.equal(layer(x), expected)
    assert len(reads) == 3


@pytest.fixture(scope="module")
def streamed() -> StableDiffusion:
    sd = StableDiffusion.load(device="cpu", dtype="float32", memory=1 << 20)
    yield replace(sd, config=replace(sd.config, image_size=load_small().config.image_size))
    keep_freed("all")


def test_streamed_models_draw_the_same(shipped, streamed):
    assert streamed.plan.tight
    assert all(p.is_meta for n, p in streamed.unet.named_parameters() if n in streamable(streamed.unet))
    assert not streamed.unet.conv_in.weight.is_meta
    request = Request("a red circle", seed=3, steps=4, cfg_scale=3)
    ours, theirs = (np.asarray(model.generate(request)[0]).astype(int) for model in (streamed, shipped))
    assert np.abs(ours - theirs).max() <= 1  # one evaluates two prompts at once
    assert copy.deepcopy(streamed.unet).middle[0].resnet.conv1.weight.read is not None


def test_loras_change_streamed_weights(sd, streamed, tmp_path):
    """Two of the same weights, the first of which goes first; then none is left."""
    path = saved(tmp_path, lora(sd))
    request = Request("a red circle", seed=3, steps=3, cfg_scale=3)
    weights = dict(streamed.unet.named_parameters())

    def pictures() -> list[np.ndarray]:
        return [np.asarray(model.generate(request)[0]).astype(int) for model in (streamed, sd)]

    plain = pictures()[0]
    handles = [[model.load_lora(path, strength) for model in (streamed, sd)] for strength in (0.5, 0.3)]
    changed = {name for name, now in streamed.unet.named_parameters() if now is not weights[name]}
    assert changed & set(streamable(streamed.unet))
    for removed in handles:
        ours, theirs = pictures()
        assert np.abs(ours - theirs).max() <= 1  # one evaluates two prompts at once
        assert np.abs(ours - plain).max() > 1
        for handle in removed:
            handle.remove()
    assert all(now is weights[name] for name, now in streamed.unet.named_parameters())
    assert np.array_equal(pictures()[0], plain)


def test_weights_leave_a_gpu_for_main_memory(sd, tmp_path):
    """Before a LoRA comes, and while one is there; here both are the same memory."""
    request = Request("a red circle", seed=3, steps=3, cfg_scale=3)
    path = saved(tmp_path, lora(sd))

    def picture() -> np.ndarray:
        return np.asarray(sd.generate(request)[0]).astype(int)

    plain = picture()
    before = dict(sd.unet.named_parameters())
    with sd.load_lora(path):
        changed = picture()
        merged = [weakref.ref(now) for name, now in sd.unet.named_parameters() if now is not before[name]]
        offload(sd.unet)
        assert not resident(sd.unet)
        assert np.array_equal(picture(), changed)
    gc.collect()
    assert merged
    assert not any(weight() is not None and not weight().is_meta for weight in merged)
    assert np.array_equal(picture(), plain)
    with sd.load_lora(path):
        assert np.array_equal(picture(), changed)
    assert np.array_equal(picture(), plain)
    weights = dict(sd.unet.named_parameters())
    offload(sd.unet)
    assert all(now is weights[name] for name, now in sd.unet.named_parameters())


@pytest.fixture(scope="module")
def hollow():
    """Stable Diffusion v1's networks without weights; the text encoder's are stood in for."""
    with torch.device("meta"):
        text = nn.Sequential(nn.Embedding(49408, 768), *(nn.Linear(768, 3072) for _ in range(36)))
        return {"unet": UNet(SD_V1.unet), "vae": VAE(SD_V1.vae), "text": text}


def test_plans_give_up_what_costs_least_first(hollow):
    def plan(mib: int, dtype=torch.float32, **job) -> Plan:
        return fit(hollow, Job(**{"memory": mib * MIB, "width": 512, "height": 512} | job), 400 * MIB, dtype)

    roomy, *others = plans = [plan(mib) for mib in (8000, 4900, 1500)]
    assert roomy.peak > sum(roomy.weights.values()) > 4000 * MIB
    assert [bool(p.streamed["text"]) for p in plans] == [False, True, True]
    assert [p.apart for p in plans] == [False, False, True]
    assert [bool(p.streamed["unet"]) for p in plans] == [False, False, True]
    assert [p.keeps for p in plans] == [True, False, False]
    frugal = plan(roomy.peak // MIB - 10)  # there is room for all of it, and none for what is freed
    assert not frugal.tight and not frugal.keeps and frugal.peak < roomy.peak - 50 * MIB
    assert all(0.9 * p.memory <= p.peak <= p.memory for p in others)
    hopeless, large = plan(100), plan(100, torch.bfloat16, width=768, batch_size=4)
    assert hopeless.excess == hopeless.peak - 100 * MIB > 0
    assert 2 * large.weights["unet"] == hopeless.weights["unet"]
    assert large.work["a step"] > hopeless.work["a step"]
    wide = plan(2500, width=1024, height=1024)
    assert wide.work["decoding"] > wide.work["a step"]
    assert not wide.apart  # it would gain nothing


@pytest.mark.parametrize("text", ["4G", "1.5g", "1500M", "2GiB", " 8GB "])
def test_sizes_of_memory(text):
    number, unit = text.strip().upper().rstrip("IBGM"), 1 if "M" in text else 1024
    assert parse_memory(text) == float(number) * unit * MIB


@pytest.mark.parametrize("text", ["", "4", "0G", "-1G", "4T", "1e3M", "9" * 30 + "G"])
def test_sizes_that_are_none(text):
    with pytest.raises(RequestError, match="use a size such as 4G or 1500M"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("groups", "limits", "allowed"),
    [
        ("", {}, math.inf),
        ("0::/\n", {"memory.max": "max\n"}, math.inf),
        ("0::/\n", {"memory.max": "3000\n"}, 3000),  # as in a container
        ("0::/user/me\n", {"user/memory.max": "2000", "user/me/memory.max": "max"}, 2000),
        ("9:cpu:/a\n4:memory:/jobs/7\n", {"memory/jobs/7/memory.limit_in_bytes": "700", "memory/x": "1"}, 700),
        ("4:memory,hugetlb:/caf\xe9\n", {"memory/memory.limit_in_bytes": "800"}, 800),
        ("4:memory:/elsewhere\n", {"memory/memory.limit_in_bytes": "900"}, 900),
        ("0::/../other\n", {"memory.max": "600"}, 600),
    ],
)
def test_control_groups_limit_what_there_is(tmp_path, groups, limits, allowed):
    own, every = tmp_path / "cgroup", tmp_path / "every"
    own.write_text(groups, encoding="latin-1")
    for name, text in limits.items():
        (every / name).parent.mkdir(parents=True, exist_ok=True)
        (every / name).write_text(text)
    assert control_group_limit(own, every) == allowed


def test_no_control_groups_are_no_limit(tmp_path):
    assert control_group_limit(tmp_path / "none", tmp_path) == math.inf


def test_a_model_that_is_refused_leaves_freed_memory_kept(tmp_path, monkeypatch):
    broken = shutil.copytree(SHIPPED, tmp_path / "broken")
    [file] = (broken / "unet").glob("*.safetensors")
    save_file({name: t * float("nan") for name, t in load_file(file).items()}, file)
    modes = []
    monkeypatch.setattr(load, "keep_freed", modes.append)
    with pytest.raises(CheckpointError):
        StableDiffusion.load(broken, device="cpu", dtype="float32", int8=True, memory="8G")
    assert modes == ["none", "all"]


@pytest.mark.parametrize("memory", [0, -1, True, 1.5, float("nan")])
def test_amounts_that_are_none(memory):
    with pytest.raises(RequestError, match="use a whole number, 1 or more"):
        Job(memory)


def test_plans_are_printed(capsys):
    assert main(["plan", "--model", str(SHIPPED), "--memory", "64G", "--dtype", "float32"]) == 0
    table = capsys.readouterr().out
    assert "of 65536\nguidance: one evaluation for both prompts\n" in table
    program, unet, vae, text, step, decoding, margin, peak = map(
        int, re.findall(r"^\D+?(\d+)", table, re.MULTILINE)[:8]
    )
    assert abs(program + unet + vae + text + max(step, decoding) + margin - peak) <= 6  # of rounding down
    assert main(["plan", "--model", str(SHIPPED), "--memory", "5M", "--dtype", "float32"]) == 2
    [least] = re.findall(r"(\d+) MiB of memory are needed, not 5: use a smaller", capsys.readouterr().err)
    enough = f"{int(least) + 200}M"  # as the program itself grows
    assert main(["plan", "--model", str(SHIPPED), "--dtype", "float32", "--memory", enough]) == 0
    assert main(["plan", "--memory", "lots"]) == 2
    assert main(["plan", "--width", "77"]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="what is tested is glibc's")
@pytest.mark.parametrize("which", KEEPING)
def test_freed_memory_is_kept_or_given_back(which):
    program = f"""
import torch
from ldm.runtime.memory import keep_freed, taken, trim
CPU = torch.device("cpu")
keep_freed({which!r})
before = taken(CPU)
for tensor in [torch.ones(10 << 20) for _ in range(4)]:  # of 40 MiB
    del tensor
grown = taken(CPU) - before
trim()
left = taken(CPU) - before
several = [torch.ones(1 << 20) for _ in range(4)]  # of 4 MiB
del several
print(grown >> 20, left >> 20, taken(CPU) - before - left >> 20)
"""
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    grown, left, small = map(int, told.split())
    assert grown >= 120 if which == "all" else grown < 40
    assert left < 40
    assert small < 4 if which == "none" else small >= 12
