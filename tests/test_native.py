"""The kernels for CPUs: against float64, in networks, and where there is no compiler."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHIPPED, TINY_UNET, relative_error

from ldm.checkpoint.load import load_unet, load_vae
from ldm.models import layers
from ldm.models.unet import UNet
from ldm.runtime import native, strips
from ldm.runtime.footprint import footprint

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++")
SHAPES = [  # batch, heads, queries, keys, size of a head
    (1, 1, 1, 1, 8),
    (2, 3, 50, 77, 40),
    (1, 2, 33, 257, 24),
    (2, 2, 64, 64, 160),
    (1, 1, 97, 513, 80),
    (1, 1, 31, 300, 256),
    (2, 2, 5, 33, 4),
    (1, 2, 70, 40, 20),
    (1, 1, 40, 70, 100),
    (1, 2, 9, 71, 33),
]

CAPABLE = sys.platform == "linux" and torch.backends.cpu.get_cpu_capability().startswith("AVX")

pytestmark = pytest.mark.skipif(COMPILER is None or not CAPABLE, reason="needs a C++ compiler and a CPU with AVX2")


@pytest.fixture(autouse=True, scope="module")
def loaded(tmp_path_factory):
    """The kernels of the source as it is, from a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv(native.SWITCH, raising=False)
        patch.setattr(native, "LOADED", {})
        native.load.__wrapped__()
        assert {f"{kernel}_float32" for kernel in native.KERNELS} | {"row_statistics_bfloat16"} <= native.LOADED.keys()
        yield


@pytest.fixture
def played_tiles(tmp_path_factory, monkeypatch):
    """Attention in bfloat16 with AMX's tiles played by plain loops, on any CPU."""
    library = tmp_path_factory.getbasetemp() / "played.so"
    if not library.exists():
        native.compile_to(library, COMPILER, "-DPLAY_AMX")
    monkeypatch.setattr(native, "LOADED", native.open_library(library, ["attention_bfloat16"]))


def heads_of(batch, heads, queries, keys, size, dtype=torch.float32, spread=1.0):
    """q, k and v as networks have them: strided views of (b, n, heads·d)."""
    generator = torch.Generator().manual_seed(queries)
    tokens = (torch.randn(batch, n, heads * size, generator=generator) * spread for n in (queries, keys, keys))
    return [layers.split_heads(each.to(dtype), heads) for each in tokens]


def exact_attention(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("spread", [1.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_as_exact_as_torchs(shape, spread):
    q, k, v = heads_of(*shape, spread=spread)
    expected = exact_attention(q, k, v)
    ours, torchs = (relative_error(attend(q, k, v), expected) for attend in (native.attention, layers.attention))
    assert ours <= 2 * torchs + 1e-7


@pytest.mark.parametrize("spread", [1.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiled_attention_is_as_exact_as_torchs(shape, spread, played_tiles):
    q, k, v = heads_of(*shape, torch.bfloat16, spread)
    expected = exact_attention(q, k, v)
    ours, torchs = (relative_error(attend(q, k, v), expected) for attend in (native.attention, layers.attention))
    assert ours <= 1.1 * torchs + 1e-4


@pytest.mark.parametrize("keys", [200, 600])
def test_attention_where_a_later_key_counts_a_thousand_times_more(keys):
    """The maximum that weights are relative to grows from tile to tile, and what was summed up fades."""
    q, k, v = heads_of(1, 1, 50, keys, 16)
    k = k * torch.linspace(0.01, 20, keys)[:, None]
    assert relative_error(native.attention(q, k, v), exact_attention(q, k, v)) < 3e-6


def test_attention_passes_on_what_is_not_a_number():
    q, k, v = heads_of(1, 2, 50, 77, 40)
    q[0, 1, 3, 5] = torch.nan
    out = native.attention(q, k, v).unflatten(2, (2, 40))
    assert out[0, 3, 1].isnan().all()
    assert out.isnan().sum() == 40


MAPS = [  # batch, height, width, channels, outputs
    (1, 1, 1, 16, 16),
    (2, 5, 7, 16, 48),
    (1, 16, 17, 48, 32),
    (3, 9, 8, 32, 80),
    (1, 49, 47, 528, 16),  # more channels, and more tiles, than are taken at once
    (1, 9, 8, 528, 48),
]


def summed(x, weight, bias):
    """A 3×3 convolution without padding, in float32, one product after the other: torch's depend on the CPU."""
    height, width = x.shape[2] - 2, x.shape[3] - 2
    out = bias[:, None, None].repeat(len(x), 1, height, width)
    for channel, row, column in itertools.product(range(x.shape[1]), range(3), range(3)):
        seen = x[:, channel, None, row : row + height, column : column + width]
        out += seen * weight[:, channel, row, column, None, None]
    return out


def convolved(shape, padding, enlarged):
    """By the kernel, by a plain sum, and in float64."""
    batch, height, width, channels, outputs = shape
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(batch, channels, height, width, generator=generator).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, channels, 3, 3, generator=generator), torch.randn(outputs, generator=generator)
    enlarge = partial(torch.repeat_interleave, repeats=1 + enlarged)
    seen = enlarge(enlarge(F.pad(x, [padding[1]] * 2 + [padding[0]] * 2), dim=2), dim=3)
    if enlarged:  # all that a pixel of x becomes has what is around it
        seen = seen[..., 1:-1, 1:-1]
    plain, exact = summed(seen, weight, bias), F.conv2d(seen.double(), weight.double(), bias.double())
    return native.convolution(x, weight, bias, padding, enlarged), plain, exact


@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize(("enlarged", "allowed"), [(False, 2.5), (True, 1)])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_convolutions_are_as_exact_as_a_plain_sum(shape, padding, enlarged, allowed):
    if min(shape[1] + 2 * padding[0], shape[2] + 2 * padding[1]) < 3:
        pytest.skip("nothing is left of such a map")
    ours, plain, exact = convolved(shape, padding, enlarged)
    assert ours.shape == exact.shape and ours.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(ours, exact) <= allowed * relative_error(plain, exact) + 2e-7


@pytest.mark.parametrize("enlarged", [False, True])
def test_a_map_in_a_batch_is_convolved_to_the_same_bits(enlarged):
    x, weight = torch.randn(3, 64, 19, 18), torch.randn(32, 64, 3, 3)
    together = native.convolution(x, weight, None, (1, 1), enlarged)
    assert torch.equal(native.convolution(x[1:2], weight, None, (1, 1), enlarged), together[1:2])


@pytest.mark.parametrize("enlarged", [False, True])
def test_convolutions_pass_on_what_is_not_a_number(enlarged):
    x, weight = torch.randn(1, 16, 20, 20), torch.randn(16, 16, 3, 3)
    x[0, 3, 10, 10] = torch.nan
    out = native.convolution(x, weight, None, (1, 1), enlarged)
    seen = F.conv2d(F.interpolate(x, scale_factor=2.0) if enlarged else x, weight, None, padding=1).isnan()
    assert (out.isnan() | ~seen).all()
    assert out.isnan().float().mean() < 0.3  # tiles that see it, and no others


def test_what_is_no_plain_convolution_is_not_the_kernels():
    x = torch.randn(1, 32, 16, 16)
    conv = torch.nn.Conv2d(32, 32, 3, padding=1)
    assert native.convolves(x, conv.weight, enlarged=False)
    assert not native.convolves(x.double(), conv.weight, enlarged=False)
    assert not native.convolves(x, conv.weight.double(), enlarged=False)
    assert not native.convolves(x[:, :16], conv.weight, enlarged=False)
    assert not native.convolves(x, torch.nn.Conv2d(32, 32, 3, groups=2).weight, enlarged=False)
    assert not native.convolves(x, torch.nn.Conv2d(32, 32, 1).weight, enlarged=False)
    with pytest.raises(RuntimeError, match="a map on cpu is to be convolved with weights on meta"):
        native.convolution(x, conv.weight.to("meta"), None, (1, 1), False)


@pytest.mark.parametrize("enlarged", [False, True])
def test_wide_vectors(tmp_path, monkeypatch, enlarged):
    """Those of AVX-512, of which 48 outputs are no whole number of panels, by what the compiler has in their place."""
    native.compile_to(tmp_path / "wide.so", COMPILER, "-D__AVX512F__", "-Wno-psabi")
    monkeypatch.setattr(
        native,
        "LOADED",
        native.open_library(tmp_path / "wide.so", ["convolution_float32", "enlarged_convolution_float32"]),
    )
    ours, _, exact = convolved((2, 9, 8, 32, 48), (1, 1), enlarged)
    assert relative_error(ours, exact) < 2e-6


def test_threads_change_nothing():
    q, k, v = heads_of(2, 3, 130, 77, 40)
    together, maps = native.attention(q, k, v), [convolved(MAPS[-2], (1, 1), enlarged)[0] for enlarged in (False, True)]
    threads = torch.get_num_threads()
    for other in (1, 7):
        torch.set_num_threads(other)
        try:
            assert torch.equal(native.attention(q, k, v), together)
            for enlarged, expected in enumerate(maps):
                assert torch.equal(convolved(MAPS[-2], (1, 1), bool(enlarged))[0], expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_of_rows(dtype, offset):
    x = (torch.randn(2, 48, 7, 33) + offset).to(dtype, memory_format=torch.channels_last)
    mean, variance = native.row_statistics(x)
    pixels = x.double().permute(0, 2, 3, 1)
    assert torch.allclose(mean, pixels.mean(dim=2, keepdim=True), rtol=1e-12, atol=1e-12)
    assert torch.allclose(variance, pixels.var(dim=2, keepdim=True, correction=0), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_scale_and_shift(dtype, bound, silu):
    x = torch.linspace(-200, 200, 2 * 48 * 5 * 7).view(2, 48, 5, 7).to(dtype, memory_format=torch.channels_last)
    scale, shift = torch.randn(2, 2, 48, 1, 1)
    out = native.scale_and_shift(x, scale, shift, silu)
    expected = x.double() * scale.double() + shift.double()
    if silu:
        expected = expected * expected.sigmoid()
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(out, expected) < bound
    x[1, 5, 2, 3] = torch.nan
    assert native.scale_and_shift(x, scale, shift, silu).isnan().sum() == 1


@pytest.mark.parametrize(("size", "mean"), [((2, 64, 9, 8), 0.7), ((1, 64, 65, 80), 10), ((1, 32, 300, 300), 100)])
def test_group_norms_are_exact(size, mean):
    x = (torch.randn(size) * 1.5 + mean).contiguous(memory_format=torch.channels_last)
    norm = layers.GroupNorm(32, size[1], eps=1e-6, silu=True)
    native.use_in(norm)
    expected = F.silu(F.group_norm(x.double(), 32, eps=1e-6))
    assert relative_error(norm(x), expected) < 1e-7 * max(mean, 2)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.bfloat16, 4e-3)], ids=str)
def test_gated_gelu(dtype, bound):
    gates = torch.linspace(-20, 20, 3 * 5 * 48).view(3, 5, 48)
    x = torch.cat([torch.randn(3, 5, 48), gates], dim=-1).to(dtype)
    values, gates = x.double().chunk(2, dim=-1)
    assert relative_error(native.gated_gelu(x), values * F.gelu(gates)) < bound
    low = torch.cat([torch.ones(1, 1, 48), torch.linspace(-5, -1, 48).view(1, 1, 48)], dim=-1)  # where 1 + erf cancels
    assert relative_error(native.gated_gelu(low), F.gelu(low[..., 48:].double())) < 1e-6
    x[1, 2, 50] = torch.nan
    assert native.gated_gelu(x).isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_unet_computes_the_same(dtype):
    torch.manual_seed(0)
    plain = UNet(TINY_UNET).eval()
    x, t, context = torch.randn(2, 4, 16, 24), torch.tensor([3.0, 500.0]), torch.randn(2, 77, 48)
    expected = plain.double()(x.double(), t, context.double())
    plain = plain.to(dtype)
    quick = deepcopy(plain)
    native.use_in(quick)
    ours, torchs = (relative_error(unet(x.to(dtype), t, context.to(dtype)), expected) for unet in (quick, plain))
    assert ours <= (1e-5 if dtype == torch.float32 else 2 * torchs)


def test_the_shipped_networks_compute_the_same():
    plain_unet, plain_vae = load_unet(SHIPPED), load_vae(SHIPPED)
    unet, vae = deepcopy(plain_unet), deepcopy(plain_vae)
    native.use_in(unet)
    native.use_in(vae)
    z, context = torch.randn(1, 4, 16, 16), torch.randn(1, 32, unet.config.context_dim)
    t = torch.tensor([300.0])
    assert relative_error(unet(z, t, context), plain_unet(z, t, context)) < 1e-5
    assert relative_error(vae.decode(z), plain_vae.decode(z)) < 1e-5
    assert relative_error(strips.decode(vae, z), plain_vae.decode(z)) < 1e-5


def test_tensors_that_differ_are_torchs_matter():
    q, k, v = heads_of(2, 1, 5, 7, 8)
    for keys, values in (k[:1], v[:1]), (k, torch.cat([v, v], dim=-1)):
        assert torch.equal(native.attention(q, keys, values), layers.attention(q, keys, values))
    q, k, v = heads_of(1, 4, 5, 7, 8)
    assert torch.equal(native.attention(q, k[:, :1], v[:, :1]), layers.attention(q, k[:, :1], v[:, :1]))
    x = torch.randn(2, 48, 5, 5).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(2, 1, 48, 1, 1)
    ours, theirs = (way.scale_and_shift(x, scale, shift, False) for way in (native, layers))
    assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="dtype"):
        native.attention(q, k.bfloat16(), v.bfloat16())


def test_group_norms_in_float16_are_torchs():
    x = torch.randn(1, 48, 8, 8).half().contiguous(memory_format=torch.channels_last)
    plain = layers.GroupNorm(16, 48).half()
    norm = deepcopy(plain)
    native.use_in(norm)
    assert torch.equal(norm(x), plain(x))


def test_networks_that_learn_do_without():
    x = torch.randn(1, 48, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.enable_grad():
        mean, _ = native.row_statistics(x)
        q, k, v = heads_of(1, 1, 5, 5, 8)
        shifted = native.scale_and_shift(x.detach(), torch.ones(1, 48, 1, 1).requires_grad_(), x.new_zeros(1), False)
        outs = [native.attention(*(t.detach().requires_grad_(t is one) for t in (q, k, v))) for one in (q, k, v)]
    assert all(t.requires_grad for t in (mean, shifted, *outs))


def test_what_is_taken_is_counted():
    """On tensors without data the kernels take what they take on those with."""
    q, k, v = (t.to("meta") for t in heads_of(1, 8, 64, 4096, 40))
    copies = 2 * 8 * 4096 * 64 * 4  # of keys and values, whose 40 numbers are padded
    assert footprint(lambda: native.attention(q, k, v)) == q.nbytes + copies


def kernels_of_a_process(cache, cwd=None, **env):
    """How many a program that draws has; what it tells; and the libraries in its cache."""
    program = cache.parent / "program" / "draw.py"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        "import ldm, logging; logging.basicConfig(level=20); from ldm.runtime import native\n"
        "ldm.StableDiffusion.load(device='cpu').txt2img('a red circle', steps=1, width=64, height=64)\n"
        "print(len(native.LOADED))"
    )
    env = {"XDG_CACHE_HOME": str(cache), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)} | env
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, env=env, cwd=cwd, check=True)
    return int(run.stdout), run.stderr, list(cache.rglob("*.so"))


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"CXX": "no-such-compiler"}, "there is no C++ compiler"),
        ({"CXX": "false"}, "kernels cannot be compiled"),
        ({"CXX": "c++ --no-such-option"}, "no-such-option"),
        ({native.SWITCH: "0"}, ""),
        ({"XDG_CACHE_HOME": "/proc/none"}, "kernels cannot be made or loaded"),
    ],
    ids=str,
)
def test_where_there_are_no_kernels_torch_does_it(tmp_path, env, told):
    number, log, libraries = kernels_of_a_process(tmp_path / "cache", **env)
    assert (number, libraries) == (0, [])
    assert told in log


def test_the_cache(tmp_path):
    """Made once, whatever modules lie about; not used where others may write to it, or where it is damaged."""
    cwd, cache = tmp_path / "cwd", tmp_path / "cache"
    (cwd / "ldm").mkdir(parents=True)
    (cwd / "ldm" / "__init__.py").write_text("raise SystemExit('foreign code')")
    number, log, [library] = kernels_of_a_process(cache, cwd)
    assert number >= 9 and "compiling" in log
    number, log, _ = kernels_of_a_process(cache, cwd)
    assert number >= 9 and "compiling" not in log
    assert library.parent.stat().st_mode & 0o777 == 0o700
    for path in library, library.parent, library.parent.parent:
        path.chmod(0o777)
        number, log, _ = kernels_of_a_process(cache, cwd)
        assert number == 0 and "others may write to it" in log
        path.chmod(0o700)
    (library.parent / native.TRUSTED).write_text("")
    number, log, _ = kernels_of_a_process(cache, cwd)
    assert number == 0 and "these kernels crash or are wrong here" in log
    library.write_bytes(b"damaged")
    number, log, _ = kernels_of_a_process(cache, cwd)
    assert number == 0 and "kernels cannot be made or loaded" in log


def test_a_cache_that_others_write_to_is_left_alone(tmp_path):
    """Before anything is compiled in it, and run."""
    (tmp_path / "cache" / "ldm").mkdir(parents=True)
    (tmp_path / "cache" / "ldm").chmod(0o777)
    number, log, libraries = kernels_of_a_process(tmp_path / "cache")
    assert (number, libraries) == (0, [])
    assert "others may write to it" in log


def test_a_compiler_with_options(tmp_path):
    number, _, _ = kernels_of_a_process(tmp_path / "cache", CXX="c++ -fno-math-errno")
    assert number >= 9


def trusted_of(folder, monkeypatch, file, **changes):
    """The kernels that are used of changed sources."""
    sources = shutil.copytree(native.SOURCES, folder / "kernels")
    text = (sources / file).read_text()
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    (sources / file).write_text(text)
    monkeypatch.setattr(native, "SOURCES", sources)
    native.make(folder / "made", COMPILER)
    return (folder / "made" / native.TRUSTED).read_text().split()


def test_kernels_that_crash_are_not_used(tmp_path, monkeypatch):
    """Whatever the check prints before it dies is what is trusted."""
    crash = "int allow_tiles() {", "int allow_tiles() { __builtin_trap();"
    assert trusted_of(tmp_path, monkeypatch, "kernels.cpp", crash=crash) == []


def test_attention_that_is_wrong_is_not_used(tmp_path, monkeypatch):
    slack = "SLACK = 8.f", "SLACK = 1e9f"
    scale = "* scale - most[r]", "* 1.1f * scale - most[r]"
    trusted = trusted_of(tmp_path, monkeypatch, "attention.h", slack=slack, scale=scale)
    assert "row_statistics_float32" in trusted
    assert "attention_float32" not in trusted


def test_convolutions_that_are_wrong_are_not_used(tmp_path, monkeypatch):
    trusted = trusted_of(tmp_path, monkeypatch, "convolution.h", sum=("to[1] = s[1] + s[2];", "to[1] = s[1];"))
    assert "convolution_float32" in trusted
    assert "enlarged_convolution_float32" not in trusted
