"""Convolutions for less arithmetic: the same numbers, whatever their weights are held as.

With channels that the kernels take, where there are kernels, and with others, for which there are none.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TINY_UNET, assert_parity, relative_error
from synthetic import make_tensor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.checkpoint import load_unet, load_vae
from ldm.models import layers
from ldm.models.layers import ResBlock, Upsample
from ldm.runtime import convolving, native, strips
from ldm.runtime.convolving import FEWEST, convolve, doubled
from ldm.runtime.footprint import footprint
from ldm.runtime.packing import can_pack, pack
from ldm.runtime.quantization import quantize
from ldm.runtime.streaming import Streamed, stream
from ldm.runtime.tiling import seamless
from ldm.train.lora import LoRALayer

WAYS = [(convolve, layers.convolve), (doubled, layers.doubled)]  # ours, and torch's
SHAPES = [(1, 16, 16), (2, 17, 9), (1, 1, FEWEST), (3, 52, 5)]  # of maps: batch, height, width


@pytest.fixture(autouse=True, scope="module")
def kernels():
    native.load()


@pytest.fixture(params=[(6, 5), (32, 48)], ids=str)
def conv(request) -> nn.Conv2d:
    conv = nn.Conv2d(*request.param, 3, padding=1)
    conv.load_state_dict({name: make_tensor(name, list(t.shape)) for name, t in conv.state_dict().items()})
    return conv.to(memory_format=torch.channels_last)


def a_map(conv: nn.Conv2d, shape: tuple[int, int, int]) -> Tensor:
    batch, height, width = shape
    return make_tensor("x", [batch, conv.in_channels, height, width]).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("ours", "torchs"), WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tiling", ["none", "x", "y", "both"])
def test_numbers_are_those_of_the_formula(conv, ours, torchs, shape, tiling):
    x = a_map(conv, shape)
    with seamless(tiling):
        expected = torchs(copy.deepcopy(conv).double(), x.double())
        made, plain = ours(conv, x), torchs(conv, x)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(made, expected) <= max(2 * relative_error(plain, expected), 5e-7)


@pytest.mark.parametrize(("ours", "torchs"), WAYS)
def test_half_precision_is_as_exact(conv, ours, torchs):
    conv = conv.bfloat16()
    x = a_map(conv, (1, 32, 32)).bfloat16()
    expected = torchs(copy.deepcopy(conv).double(), x.double())
    assert relative_error(ours(conv, x), expected) <= 2 * relative_error(torchs(conv, x), expected) < 1e-2


@pytest.mark.parametrize(("ours", "torchs"), WAYS)
def test_any_kind_of_weight(conv, ours, torchs):
    x = a_map(conv, (1, 16, 16))
    expected = torchs(conv, x)
    read, rounded, plain = (copy.deepcopy(conv) for _ in range(3))
    stream(read)
    read.weight = Streamed(conv.weight, lambda: conv.weight.contiguous())
    assert relative_error(ours(read, x), expected) <= 1e-6
    rounded.weight = quantize(rounded, conv.weight)
    assert relative_error(ours(rounded, x), torchs(rounded, x)) <= 1e-6
    plain.bias = None
    assert relative_error(ours(plain, x), torchs(plain, x)) <= 1e-6


@pytest.mark.parametrize(("ours", "torchs"), WAYS)
def test_few_pixels_are_convolved_as_ever(conv, ours, torchs):
    """In any batch, or it would decide on the last digits of a picture."""
    x = a_map(conv, (5, 15, 17))
    assert torch.equal(ours(conv, x), torchs(conv, x))


@pytest.mark.parametrize(("ours", "torchs"), WAYS)
def test_convolutions_of_other_kinds_do_their_own(conv, ours, torchs):
    """Packed ones, and what stands in for one while a LoRA is learning."""
    x = a_map(conv, (1, 16, 16))
    learning = LoRALayer(conv, 2, 2.0, torch.Generator())
    learning.up.weight.fill_(0.1)
    assert torch.equal(ours(learning, x), torchs(learning, x))
    assert can_pack(torch.float32)
    conv.weight = pack(conv, conv.weight)
    assert torch.equal(ours(conv, x), torchs(conv, x))


@pytest.mark.parametrize("ways", WAYS)
def test_gradients_are_torchs(conv, ways):
    gradients = []
    for way in ways:
        x = a_map(conv, (1, 16, 16)).requires_grad_()
        with torch.enable_grad():
            way(conv, x).square().sum().backward()
        gradients += [x.grad, conv.weight.grad.clone()]
        conv.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(gradients[:2], gradients[2:], strict=True))


@pytest.mark.parametrize(("ours", "torchs"), WAYS)
def test_kernels_are_used_and_counted(conv, ours, torchs, monkeypatch):
    """With channels that they take; without data, too, where they take what they take for themselves."""
    if not native.LOADED:
        pytest.skip("there are no kernels")
    x = a_map(conv, (1, 32, 32))
    conv.to("meta")
    expected = torchs(conv, x.to("meta"))
    asked = []
    kernel = native.convolution
    monkeypatch.setattr(native, "convolution", lambda *args, **kwargs: asked.append(args) or kernel(*args, **kwargs))
    taken = footprint(lambda: ours(conv, x.to("meta")))
    assert ours(conv, x.to("meta")).shape == expected.shape
    assert bool(asked) == (conv.in_channels == 32)
    if asked:
        assert taken > expected.nbytes + 36 * 64 * conv.in_channels  # 64 tiles of 6×6 or more, in float32


@pytest.mark.parametrize(("ours", "torchs"), WAYS)
@pytest.mark.parametrize(
    "change",
    [{"padding_mode": "circular"}, {"dilation": 2, "padding": 2}, {"groups": 2}, {"kernel_size": 1, "padding": 0}],
    ids=str,
)
def test_other_geometries_are_torchs(ours, torchs, change):
    other = nn.Conv2d(32, 48, **({"kernel_size": 3, "padding": 1} | change))
    x = torch.randn(1, 32, 16, 16)
    assert torch.equal(ours(other, x), torchs(other, x))


@pytest.mark.parametrize(("ours", "torchs"), WAYS)
def test_who_looks_on_is_called(conv, ours, torchs):
    seen = []
    conv.register_forward_hook(lambda *args: seen.append(args))
    ours(conv, a_map(conv, (1, 16, 16)))
    assert len(seen) == 1


@pytest.mark.parametrize(("ours", "torchs"), WAYS)
def test_autocast_has_its_way(conv, ours, torchs):
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(conv, a_map(conv, (1, 16, 16))).dtype == torch.bfloat16


@pytest.fixture
def convolving_all(monkeypatch):
    monkeypatch.setattr(convolving, "FEWEST", 1)


def test_networks_equal_the_reference(tiny_path, golden, convolving_all):
    unet, vae = load_unet(tiny_path, TINY_UNET), load_vae(tiny_path)
    for network in (unet, vae):
        convolving.use_in(network)
    eps = unet(golden["unet.x"], golden["unet.t"], golden["unet.context"])
    assert_parity("tiny U-Net convolving for less, reference", eps, golden["unet.eps"], 1e-5)
    for name, decode in (("whole", vae.decode), ("in strips", lambda z: strips.decode(vae, z))):
        assert_parity(
            f"tiny VAE convolving for less, {name}", decode(golden["vae.latent"]), golden["vae.decoded"], 1e-5
        )


@pytest.mark.parametrize("pixels", [1, 100, 1000])
@pytest.mark.parametrize("tiling", ["none", "x"])
def test_strips_are_the_whole(tiny_path, monkeypatch, convolving_all, pixels, tiling):
    vae, latents = load_vae(tiny_path), make_tensor("x", [2, 4, 9, 5])
    with seamless(tiling):
        expected = vae.decode(latents)
        convolving.use_in(vae)
        monkeypatch.setattr(strips, "STRIP_PIXELS", pixels)
        assert relative_error(strips.decode(vae, latents), expected) <= 1e-5


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
    convolving.use_in(layer)
    assert torch.equal(layer(x, size=torch.Size((39, 40))), expected)
    assert relative_error(layer(x, size=torch.Size((40, 40))), layer(x)) == 0


def test_models_on_the_cpu_use_it(shipped):
    layers_of = [layer for network in (shipped.unet, shipped.vae) for layer in network.modules()]
    for kind, way in (ResBlock, "convolve"), (Upsample, "doubled"):
        ways = [getattr(layer, way) for layer in layers_of if isinstance(layer, kind)]
        assert ways
        assert set(ways) == {getattr(convolving, way)}
