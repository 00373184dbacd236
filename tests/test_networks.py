"""U-Net and VAE against the reference implementation's outputs, and against the properties they promise."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_parity, relative_error
from synthetic import make_tensor
from torch import nn

from ldm import UNetConfig, VAEConfig
from ldm.models.layers import GroupNorm, row_statistics, to_map, to_tokens
from ldm.models.unet import UNet, sinusoidal_embedding
from ldm.models.vae import VAE, DiagonalGaussian

SMALL = UNetConfig(channels=32, channel_mult=(1, 2), blocks_per_level=1, attention_levels=(0,), heads=2, context_dim=16)


def test_unet_equals_reference(tiny_unet, golden):
    eps = tiny_unet(golden["unet.x"], golden["unet.t"], golden["unet.context"])
    assert_parity("tiny U-Net, reference", eps, golden["unet.eps"], 1e-5)


def test_vae_encoder_equals_reference(tiny_vae, golden):
    posterior = tiny_vae.encode(golden["vae.image"])
    assert_parity("tiny VAE mean, reference", posterior.mean, golden["vae.mean"], 1e-5)
    assert_parity("tiny VAE logvar, reference", posterior.logvar, golden["vae.logvar"], 1e-5)


def test_vae_decoder_equals_reference(tiny_vae, golden):
    assert_parity("tiny VAE decoded, reference", tiny_vae.decode(golden["vae.latent"]), golden["vae.decoded"], 1e-5)


def test_forward_is_the_three_functions_in_a_row(tiny_unet, golden):
    x, t, context = golden["unet.x"], golden["unet.t"], golden["unet.context"]
    shifts = tiny_unet.embed_time(t)
    keys_values = tiny_unet.embed_context(context)
    assert torch.equal(tiny_unet.predict(x, shifts, keys_values), tiny_unet(x, t, context))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (9, 15), (2, 3), (64, 8)])
def test_unet_takes_any_latent_size(tiny_unet, height, width):
    x = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))
    eps = tiny_unet(x, torch.tensor([500]), torch.zeros(1, 77, 48))
    assert eps.shape == x.shape
    assert eps.isfinite().all()


@pytest.mark.parametrize("in_channels", [4, 8, 9])
def test_unet_input_channels(in_channels):
    unet = UNet(UNetConfig(in_channels=in_channels, channels=32, channel_mult=(1,), heads=2, context_dim=8))
    assert unet(torch.randn(1, in_channels, 8, 8), torch.tensor([1]), torch.randn(1, 3, 8)).shape == (1, 4, 8, 8)


def test_time_embedding_against_the_formula():
    t = torch.tensor([0.0, 1.0, 500.5, 999.0])
    frequencies = 10_000.0 ** (-torch.arange(160, dtype=torch.float64) / 160)
    angles = t.double()[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert (sinusoidal_embedding(t, 320) - expected).abs().max() < 1e-4  # float32 angles of up to 1000


def watch_layouts(network: nn.Module) -> dict[str, bool]:
    """Record, for every layer with a feature map as output, whether it came out in channels_last memory."""
    seen: dict[str, bool] = {}

    def hook(name):
        def record(module, args, output):
            if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[1:]) > 1:
                seen[name] = output.is_contiguous(memory_format=torch.channels_last)

        return record

    for name, module in network.named_modules():
        module.register_forward_hook(hook(name))
    return seen


def test_unet_stays_channels_last():
    unet = UNet(SMALL).to(memory_format=torch.channels_last)
    seen = watch_layouts(unet)
    unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 5, 16))
    assert len(seen) > 20
    assert all(seen.values()), [name for name, last in seen.items() if not last]


def test_vae_stays_channels_last():
    vae = VAE(VAEConfig(channels=32, channel_mult=(1, 2), blocks_per_level=1)).to(memory_format=torch.channels_last)
    seen = watch_layouts(vae)
    vae.decode(vae.encode(torch.randn(1, 3, 16, 16)).mode())
    assert len(seen) > 20
    assert all(seen.values()), [name for name, last in seen.items() if not last]


def test_tokens_are_views_of_feature_maps():
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    tokens = to_tokens(x)
    assert tokens.data_ptr() == x.data_ptr()
    assert tokens.is_contiguous()
    assert to_map(tokens, like=x).data_ptr() == x.data_ptr()
    assert torch.equal(to_map(tokens, like=x), x)


def test_gaussian_kl_against_torch_distributions():
    g = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 4, generator=g).double(), torch.randn(2, 3, 4, 4, generator=g).double()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(DiagonalGaussian(mean, logvar).kl(), expected)


def test_gaussian_samples():
    posterior = DiagonalGaussian(torch.full((1, 4, 64, 64), 3.0), torch.full((1, 4, 64, 64), 2.0).log() * 2)
    draw = posterior.sample(torch.Generator().manual_seed(0))
    assert torch.equal(draw, posterior.sample(torch.Generator().manual_seed(0)))
    assert draw.mean().item() == pytest.approx(3.0, abs=0.1)
    assert draw.std().item() == pytest.approx(2.0, abs=0.1)
    assert torch.equal(posterior.mode(), posterior.mean)
    clamped = DiagonalGaussian(torch.zeros(2), torch.tensor([-99.0, 99.0])).logvar
    assert clamped.tolist() == [-30, 20]  # the reference's limits


@pytest.mark.parametrize("size", [(2, 64, 8, 8), (1, 64, 65, 80), (1, 32, 300, 300)])
@pytest.mark.parametrize(("mean", "bound"), [(0.7, 2e-7), (10, 1e-6), (100, 1e-5)])
def test_group_norms_are_exact(size, mean, bound):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(size, generator=g) * 1.5 + mean).to(memory_format=torch.channels_last)
    norm = GroupNorm(32, size[1], eps=1e-6)
    norm.weight.normal_(generator=g)
    norm.bias.normal_(generator=g)
    y = norm(x)
    expected = nn.functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), 1e-6)
    assert relative_error(y, expected) < bound
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_group_norms_of_flat_colours_and_in_half_precision():
    x = torch.full((1, 32, 65, 65), 100.1)
    assert GroupNorm(32, 32)(x).abs().max() < 1e-2
    noisy = torch.randn(1, 32, 8, 8)
    expected = nn.functional.group_norm(noisy, 32)
    assert relative_error(GroupNorm(32, 32).bfloat16()(noisy.bfloat16()), expected) < 1e-2


def test_group_norms_train():
    norm, exact = GroupNorm(2, 4).double(), nn.GroupNorm(2, 4).double()
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        ours, theirs = norm.given(*row_statistics(x))(x).sin().sum(), exact(x).sin().sum()
        assert torch.allclose(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0])


@pytest.mark.parametrize("attention_levels", [(0, 1), (1,), ()])
def test_pictures_meet_several_prompts(attention_levels):
    """What they share until then is computed once: two pictures, three prompts each, the pictures in turn."""
    config = UNetConfig(
        channels=32, channel_mult=(1, 2), attention_levels=attention_levels, heads=2, context_dim=16, norm_groups=8
    )
    unet = UNet(config)
    unet.load_state_dict({name: make_tensor(name, list(t.shape)) for name, t in unet.state_dict().items()})
    x, context = make_tensor("x", [2, 4, 8, 12]), make_tensor("context", [6, 5, 16])
    shifts, keys_values = unet.embed_time(torch.tensor([500])), unet.embed_context(context)
    expected = unet.predict(torch.cat([x, x, x]), shifts, keys_values)
    assert relative_error(unet.predict(x, shifts, keys_values), expected) <= 1e-6
