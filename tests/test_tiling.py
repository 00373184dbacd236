"""Networks that know of no border: what is shifted at one side comes in at the other."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from synthetic import make_tensor
from torch import Tensor, nn

from ldm import VAEConfig
from ldm.errors import RequestError
from ldm.models.vae import VAE
from ldm.request import TILINGS
from ldm.runtime.tiling import AXES, seamless

BOUND = 2e-5  # relative: float32 sums in another order
BORDER = 0.02  # by which the same shifts differ, at the least, where there is a border


@pytest.fixture(scope="module")
def vae() -> VAE:
    """A small VAE with 4 levels, and so with latents of an eighth of the size."""
    vae = VAE(VAEConfig(channels=32))
    vae.load_state_dict({name: make_tensor(name, list(t.shape)) for name, t in vae.state_dict().items()})
    return vae.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def networks(vae, tiny_unet):
    """What to evaluate, on what, by how many pixels to shift it at least, and how far that shifts what comes out."""
    latent, image = make_tensor("latent", [1, 4, 16, 24]), make_tensor("image", [1, 3, 64, 128])
    context = make_tensor("context", [1, 7, 48])
    return {
        "decoder": (vae.decode, latent, 1, 8),
        "encoder": (lambda x: vae.encode(x).mean, image, 8, 1),
        "unet": (lambda x: tiny_unet(x, torch.tensor([500]), context), latent, 8, 8),  # it halves them three times
    }


def test_tilings_are_those_a_request_offers():
    assert tuple(AXES) == TILINGS
    with pytest.raises(RequestError, match="tiling is 'z': use one of none, both, x, y"):
        seamless("z")


@pytest.mark.parametrize("network", ["decoder", "encoder", "unet"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_shifts_along_tiled_axes_alone_pass_through(networks, network, tiling):
    evaluate, x, least, moved = networks[network]
    for axis in (-1, -2):
        for times in (1, 3 if least == 1 else 1):
            with seamless(tiling):
                shifted = evaluate(x.roll(times * least, axis))
                expected = evaluate(x).roll(times * moved, axis)
            error = relative_error(shifted, expected)
            if axis in AXES[tiling]:
                assert error <= BOUND
            else:
                assert error >= BORDER


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, (1, 0)), (1, 0), (1, 2)])
@pytest.mark.parametrize("tiling", ["both", "x", "y"])
def test_a_convolution_wraps_as_torchs_circular_padding(tiling, stride, padding):
    x = make_tensor("x", [2, 3, 8, 6])
    conv = nn.Conv2d(3, 5, 3, stride=stride, padding=padding)
    height, width = conv.padding
    modes = {axis: "circular" if axis in AXES[tiling] else "constant" for axis in (-1, -2)}
    wide = F.pad(x, (width, width, 0, 0), mode=modes[-1])
    expected = F.conv2d(F.pad(wide, (0, 0, height, height), mode=modes[-2]), conv.weight, conv.bias, stride)
    with seamless(tiling):
        assert torch.allclose(conv(x), expected, atol=1e-6)


def test_wrapping_keeps_channels_last(vae):
    seen: list[Tensor] = []
    handle = vae.decoder.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with seamless("both"):
        vae.decode(make_tensor("latent", [1, 4, 4, 4]))
    handle.remove()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_changed_outside(vae):
    """Afterwards, after an exception, and meanwhile in another thread: bit for bit, and no module is touched."""
    z, elsewhere = make_tensor("latent", [1, 4, 4, 4]), []
    weights, before = {name: t.clone() for name, t in vae.state_dict().items()}, vae.decode(z)

    def evaluate():
        with torch.no_grad():
            elsewhere.append(vae.decode(z))

    with pytest.raises(ZeroDivisionError), seamless("both"):
        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()
        assert not torch.equal(vae.decode(z), before)
        raise ZeroDivisionError
    assert torch.equal(elsewhere[0], before)
    assert torch.equal(vae.decode(z), before)
    assert all(torch.equal(t, weights[name]) for name, t in vae.state_dict().items())
    with seamless("none"):
        assert torch.equal(vae.decode(z), before)
