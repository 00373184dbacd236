"""The perceptual distance and the adversarial losses against float64 formulas and finite differences."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_parity, relative_error
from PIL import Image, ImageDraw, ImageFilter
from scipy.signal import correlate2d
from torch import Tensor, nn

from ldm.errors import RequestError
from ldm.images import to_tensor
from ldm.train.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from ldm.train.perceptual import FilterBank, PerceptualDistance, morlet_wavelets


def drawn(side: int = 64) -> Image.Image:
    """Edges, a flat ground, and fine lines."""
    picture = Image.new("RGB", (side, side), "navy")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((side // 8, side // 4, side // 2, side * 3 // 4), fill="gold")
    for x in range(side * 5 // 8, side - 4, 3):
        draw.line((x, 6, x, side - 6), fill="white")
    return picture


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected_wavelets() -> np.ndarray:
    """(8, 7, 7): real parts for angles 0, 45, 90 and 135 degrees, then imaginary parts, of Morlet wavelets."""
    y, x = np.mgrid[-3:4, -3:4].astype(np.float64)
    window = np.exp(-(x**2 + y**2) / (2 * 0.8**2))
    found = []
    for i in range(4):
        wave = np.exp(0.75j * np.pi * (x * np.cos(i * np.pi / 4) + y * np.sin(i * np.pi / 4)))
        wavelet = window * (wave - np.sum(window * wave) / np.sum(window))
        found.append(wavelet)
    parts = [w.real for w in found] + [w.imag for w in found]
    return np.stack([part / np.sqrt(np.sum(part**2)) for part in parts])


def expected_maps(image: np.ndarray) -> list[np.ndarray]:
    """The filter bank's maps of one (3, h, w) picture, in float64, one channel after the other."""
    red, green, blue = image
    level = [(red + green + blue) / 3**0.5, (red - green) / 2**0.5, (red + green - 2 * blue) / 6**0.5]
    binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    maps = []
    for _ in range(4):
        edged = [np.pad(channel, 3, mode="edge") for channel in level]
        maps.append(np.stack([correlate2d(c, w, mode="valid") for c in edged for w in expected_wavelets()]))
        level = [correlate2d(np.pad(c, 2, mode="edge"), binomial, mode="valid")[::2, ::2] for c in level]
    return [*maps, 0.1 * np.stack(level)]


def expected_distance(first: list[np.ndarray], second: list[np.ndarray], saturation: float) -> float:
    layers = []
    for x, y in zip(first, second, strict=True):
        x, y = (f / np.sqrt(np.sum(f**2, axis=0) + saturation**2) for f in (x, y))
        layers.append(np.mean(np.sum((x - y) ** 2, axis=0)))
    return float(np.mean(layers))


def test_wavelets_are_the_formula_and_blind_to_constants():
    wavelets = morlet_wavelets()
    assert relative_error(wavelets, torch.from_numpy(expected_wavelets())) < 1e-14
    assert wavelets.sum(dim=(1, 2)).abs().max() < 1e-14
    overlap = wavelets.flatten(1) @ wavelets.flatten(1).T
    assert (overlap[:4, 4:].abs() < 1e-14).all()  # even and odd parts see different things
    assert (overlap - torch.eye(8)).abs().max() < 0.9  # and no two filters are nearly the same


@pytest.mark.parametrize("size", [(32, 32), (37, 22)])
def test_the_distance_is_the_formula(size):
    a, b = (0.5 * noise(seed, 2, 3, *size) for seed in (0, 1))
    expected = [
        expected_distance(expected_maps(x), expected_maps(y), 0.1)
        for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    found = PerceptualDistance()(a, b)
    assert found.shape == (2,)
    assert_parity(f"perceptual distance, {size[0]}×{size[1]}", found, torch.tensor(expected), 1e-6)


def test_a_distance():
    a, b = (0.5 * noise(seed, 3, 3, 32, 32) for seed in (0, 1))
    distance = PerceptualDistance()
    assert (distance(a, a) == 0).all()
    assert torch.equal(distance(a, b), distance(b, a))
    assert (distance(a, -a) <= 4).all()
    assert (distance(a, b) > 1).all()  # unrelated noise: about 2
    assert relative_error(distance(a[:1], b[:1]), distance(a, b)[:1]) < 1e-6  # each picture for itself
    assert torch.equal(distance(a, b), PerceptualDistance()(a, b))  # nothing is drawn


def test_it_grows_with_noise():
    clean = to_tensor(drawn())
    found = [PerceptualDistance()(clean + s * noise(0, 1, 3, 64, 64), clean).item() for s in (0, 0.01, 0.03, 0.1, 0.3)]
    assert found[0] == 0
    assert all(1.5 * less < more for less, more in pairwise(found[1:]))


def test_it_grows_with_blur():
    picture = drawn()
    clean = to_tensor(picture)
    blurred = [to_tensor(picture.filter(ImageFilter.GaussianBlur(radius))) for radius in (0.4, 0.7, 1, 2, 4)]
    found = [PerceptualDistance()(x, clean).item() for x in blurred]
    assert all(1.3 * less < more for less, more in pairwise(found))
    assert found[0] > 0.01


def test_blur_counts_more_than_a_change_of_brightness_that_is_as_large():
    picture = drawn()
    clean, blurred = to_tensor(picture), to_tensor(picture.filter(ImageFilter.GaussianBlur(2)))
    brighter = clean + (blurred - clean).square().mean().sqrt()
    distance = PerceptualDistance()
    assert distance(blurred, clean) > 3 * distance(brighter, clean)


def test_noise_that_cannot_be_seen_hardly_counts():
    flat = torch.zeros(1, 3, 64, 64)
    assert PerceptualDistance()(flat + noise(0, 1, 3, 64, 64) / 255, flat) < 0.02  # half a level of 255
    assert PerceptualDistance(saturation=1e-10)(flat + noise(0, 1, 3, 64, 64) / 255, flat) > 0.5  # without saturation


def test_flat_colours_differ_and_tiny_pictures_have_a_distance():
    distance = PerceptualDistance()
    grey = torch.zeros(1, 3, 16, 16)
    assert distance(grey, grey + 0.5) > 0.05
    assert distance(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)) > 0.1


def test_its_gradient_is_that_of_finite_differences():
    with torch.enable_grad():
        a, b = (noise(seed, 1, 3, 6, 5).double().requires_grad_() for seed in (0, 1))
        assert torch.autograd.gradcheck(PerceptualDistance().double(), (a, b))


def test_its_gradient_is_finite_where_pictures_are_equal_or_flat():
    with torch.enable_grad():
        for picture in (noise(0, 1, 3, 16, 16), torch.zeros(1, 3, 16, 16)):
            x = picture.clone().requires_grad_()
            PerceptualDistance()(x, picture).sum().backward()
            assert torch.equal(x.grad, torch.zeros_like(x))


def test_descending_it_finds_the_picture():
    clean = to_tensor(drawn(24))
    distance = PerceptualDistance()
    with torch.enable_grad():
        x = (0.3 * noise(0, 1, 3, 24, 24)).requires_grad_()
        adam = torch.optim.Adam([x], lr=0.1)
        before = distance(x, clean).item(), F.mse_loss(x, clean).item()
        for _ in range(100):
            adam.zero_grad()
            distance(x, clean).sum().backward()
            adam.step()
    assert distance(x, clean) < 0.12 * before[0]
    assert F.mse_loss(x, clean) < 0.12 * before[1]


class Stages(nn.Module):
    """Two stages, as a VGG has them, with what changes in training."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Conv2d(6, 9, 3, stride=2), nn.ReLU())

    def forward(self, image: Tensor) -> list[Tensor]:
        first = self.first(image)
        return [first, self.second(first)]


def test_a_given_network_is_frozen_and_compared_by_the_same_formula():
    torch.manual_seed(0)
    network = Stages().train()
    distance = PerceptualDistance(network, saturation=1e-10)
    around = nn.ModuleList([distance]).train()
    assert not any(module.training for module in around[0].modules())
    assert not any(p.requires_grad for p in network.parameters())
    a, b = (noise(seed, 1, 3, 9, 9) for seed in (0, 1))
    maps = [[f[0].double().numpy() for f in network(x)] for x in (a, b)]
    expected = expected_distance(maps[0], maps[1], 1e-10)
    assert abs(distance(a, b).item() / expected - 1) < 1e-5
    assert torch.equal(distance(a, b), distance(a, b))
    with torch.enable_grad():
        x = a.clone().requires_grad_()
        distance(x, b).sum().backward()
    assert x.grad.norm() > 0


def test_any_function_will_do():
    distance = PerceptualDistance(lambda image: [image], saturation=1e-10)
    red, green = torch.zeros(2, 1, 3, 4, 4)
    red[:, 0], green[:, 1] = 0.3, 0.9
    assert distance(red, green).item() == pytest.approx(2)  # orthogonal, whatever their sizes


def test_autocast_does_not_change_it():
    a = 0.5 * noise(0, 1, 3, 32, 32)
    b = a + 0.001 * noise(1, 1, 3, 32, 32)
    expected = PerceptualDistance()(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PerceptualDistance()(a, b), expected)
    assert PerceptualDistance()(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_it_leaves_nothing_in_a_checkpoint():
    assert not PerceptualDistance().state_dict()
    assert not list(FilterBank().parameters())


# The discriminator


@pytest.fixture(scope="module")
def reference_size() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator()


def test_the_discriminator_has_the_size_of_the_reference(reference_size):
    """pix2pix prints 2.769 M for its own, whose first convolution has three channels more."""
    parameters = sum(p.numel() for p in reference_size.parameters())
    assert parameters + 3 * 64 * 4 * 4 == 2_768_705
    assert reference_size(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert reference_size(torch.zeros(2, 3, 64, 96)).shape == (2, 1, 6, 10)


def test_a_logit_sees_70_pixels():
    torch.manual_seed(0)
    network = PatchDiscriminator(width=8)
    for i, layer in enumerate(network.layers):
        if isinstance(layer, nn.GroupNorm):  # through which all pixels touch all logits, by mean and variance alone
            network.layers[i] = nn.Identity()
    with torch.enable_grad():
        image = noise(0, 1, 3, 160, 160).requires_grad_()
        logits = network(image)
        logits[0, 0, 9, 9].backward()
    rows, columns = (image.grad[0].abs().sum(dim=(0, axis)).nonzero() for axis in (2, 1))
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 70


def test_a_logit_depends_on_its_own_picture_alone(reference_size):
    images = noise(0, 4, 3, 64, 64)
    together = reference_size(images)
    alone = torch.cat([reference_size(image[None]) for image in images])
    assert relative_error(alone, together) < 1e-5


def test_initial_weights(reference_size):
    for layer in reference_size.layers:
        if isinstance(layer, nn.Conv2d):
            assert abs(layer.weight.std() / 0.02 - 1) < 0.05
        if isinstance(layer, nn.GroupNorm):
            assert abs(layer.weight.mean() - 1) < 0.01
            assert 0.01 < layer.weight.std() < 0.03
            assert (layer.bias == 0).all()


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_picture(layers):
    network = PatchDiscriminator(width=4, layers=layers)
    side = 3 * 2**layers
    assert network(torch.zeros(1, 3, side, side + 1)).shape == (1, 1, 1, 1)
    with pytest.raises(RequestError, match=f"at least {side} pixels a side, got {side}×{side - 1}"):
        network(torch.zeros(1, 3, side - 1, side))


def test_it_learns_to_tell_pictures_from_blurred_ones():
    torch.manual_seed(0)
    network = PatchDiscriminator(width=8, layers=2)
    real = to_tensor(drawn(32)) + 0.05 * noise(1, 8, 3, 32, 32)
    fake = to_tensor(drawn(32).filter(ImageFilter.GaussianBlur(1))) + 0.05 * noise(2, 8, 3, 32, 32)
    adam = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.9))
    with torch.enable_grad():
        first = discriminator_loss(network(real), network(fake)).item()
        for _ in range(30):
            adam.zero_grad()
            loss = discriminator_loss(network(real), network(fake))
            loss.backward()
            adam.step()
    assert abs(first - 1) < 0.2  # of one that knows nothing
    assert loss < 0.2
    assert network(real).mean() > 0.5 > -0.5 > network(fake).mean()


def test_hinge_losses_are_their_formulas():
    real, fake = (2 * noise(seed, 4, 1, 6, 6) for seed in (0, 1))
    r, f = real.double().numpy(), fake.double().numpy()
    expected = 0.5 * (np.mean(np.maximum(0, 1 - r)) + np.mean(np.maximum(0, 1 + f)))
    assert abs(discriminator_loss(real, fake).item() / expected - 1) < 1e-6
    assert abs(generator_loss(fake).item() / -np.mean(f) - 1) < 1e-5
    assert discriminator_loss(torch.tensor([1.5, 1.0]), torch.tensor([-1.0, -3.0])) == 0
    assert discriminator_loss(torch.zeros(3), torch.zeros(5)) == 1


def test_hinge_losses_push_where_they_should():
    with torch.enable_grad():
        real, fake = torch.tensor([-2.0, 0.5, 2.0]).requires_grad_(), torch.tensor([-2.0, -0.5, 2.0]).requires_grad_()
        discriminator_loss(real, fake).backward()
        assert torch.allclose(real.grad, torch.tensor([-1.0, -1.0, 0.0]) / 6)
        assert torch.allclose(fake.grad, torch.tensor([0.0, 1.0, 1.0]) / 6)
        fake.grad = None
        generator_loss(fake).backward()
        assert torch.allclose(fake.grad, torch.full((3,), -1 / 3))


def losses(last: Tensor, features: Tensor, target: Tensor, network: PatchDiscriminator) -> tuple[Tensor, Tensor]:
    reconstruction = F.conv2d(features, last, padding=1)
    return (reconstruction - target).square().mean(), generator_loss(network(reconstruction))


def test_the_adaptive_weight_is_the_ratio_of_gradients_by_finite_differences():
    torch.manual_seed(0)
    network = PatchDiscriminator(width=4, layers=1).double()
    last = 0.1 * noise(0, 3, 2, 3, 3).double()
    features, target = noise(1, 2, 2, 12, 12).double(), noise(2, 2, 3, 12, 12).double()

    gradients = torch.zeros(2, last.numel(), dtype=torch.float64)
    for i in range(last.numel()):
        step = torch.zeros(last.numel(), dtype=torch.float64)
        step[i] = 1e-6
        up, down = (losses(last + sign * step.view_as(last), features, target, network) for sign in (1, -1))
        gradients[:, i] = (torch.stack(up) - torch.stack(down)) / 2e-6
    reconstruction, generator = gradients.norm(dim=1).tolist()

    with torch.enable_grad():
        last.requires_grad_()
        found = losses(last, features, target, network)
        weight = adaptive_weight(*found, last)
        assert not weight.requires_grad
        assert weight.shape == ()
        assert abs(weight.item() / (reconstruction / (generator + 1e-4)) - 1) < 1e-6
        assert adaptive_weight(*found, last, most=0.5 * weight.item()).item() == pytest.approx(0.5 * weight.item())
        (found[0] + weight * found[1]).backward()  # the graphs are still there
    assert last.grad.norm() > 0


@pytest.mark.parametrize(
    ("reconstruction", "generator", "expected"),
    [(2.0, 4.0, 2 / 4.0001), (0.0, 4.0, 0.0), (1e-5, 0.0, 0.1), (2.0, 0.0, 1e4), (0.0, 0.0, 0.0)],
)
def test_the_adaptive_weight_has_bounds(reconstruction, generator, expected):
    with torch.enable_grad():
        w = torch.tensor([1.0], requires_grad=True)
        weight = adaptive_weight((reconstruction * w).sum(), (-generator * w).sum(), w)
    assert math.isclose(weight.item(), expected, rel_tol=1e-6)
