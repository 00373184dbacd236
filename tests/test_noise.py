"""Noise against the libraries and formulas it is to equal."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torchsde

from ldm.diffusion import Level
from ldm.errors import RequestError
from ldm.request import NOISE_SOURCES
from ldm.runtime.noise import SOURCES, brownian_noise, cuda_randn, philox_4x32, seeded_noise, slerp

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
SETTINGS = [
    {},
    {"source": "cuda"},
    {"variation_strength": 0.3},
    {"seed_shape": (4, 6, 11)},
    {"source": "cuda", "variation_strength": 0.3, "seed_shape": (4, 12, 6)},
]


def torch_randn(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors drawn one after the other from torch's CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_sources_are_those_a_request_offers():
    assert tuple(SOURCES) == NOISE_SOURCES
    with pytest.raises(RequestError, match="noise is 'tpu': use one of cpu, cuda"):
        seeded_noise([1], SHAPE, CPU, source="tpu")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_noise_is_the_same_in_any_batch(settings):
    """Seed 7 alone, in a batch, and at another place in it, over several draws: bit for bit."""
    alone, batch, shuffled = (
        seeded_noise(seeds, SHAPE, CPU, **settings, variation_seeds=[seed + 100 for seed in seeds])
        for seeds in ([7], [5, 6, 7, 8], [9, 7])
    )
    for _ in range(3):
        a, b, c = alone(), batch(), shuffled()
        assert a.shape == (1, *SHAPE)
        assert a.dtype == torch.float32
        assert torch.equal(a[0], b[2])
        assert torch.equal(a[0], c[1])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_noise_is_standard_normal(settings):
    noise = seeded_noise([3], (4, 128, 128), CPU, **settings, variation_seeds=[4])
    for _ in range(2):
        drawn = noise()
        assert abs(drawn.mean()) < 0.02
        assert abs(drawn.std() - 1) < 0.02


@pytest.mark.parametrize("settings", SETTINGS[2:], ids=str)
def test_only_the_first_draw_is_varied_or_resized(settings):
    plain = seeded_noise([7], SHAPE, CPU, source=settings.get("source", "cpu"))
    changed = seeded_noise([7], SHAPE, CPU, **settings, variation_seeds=[9])
    assert not torch.equal(plain(), changed())
    for _ in range(3):
        assert torch.equal(plain(), changed())


# Random123's tests/kat_vectors (Salmon et al. 2011): counter, key, result of philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, expected):
    words, (low, high) = ([int(word, 16) for word in text.split()] for text in (counter, key))
    result = philox_4x32(np.array([words, words], dtype=np.uint64).T, (low, high))
    for column in result.T:
        assert " ".join(f"{int(word):08x}" for word in column) == expected


def test_cuda_noise_is_what_is_documented_of_it():
    """torch.randn(3, 4, device="cuda") of seed 0, as AUTOMATIC1111's modules/rng_philox.py has it in its docstring."""
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    drawn = seeded_noise([0], (1, 3, 4), CPU, source="cuda")()[0, 0]
    assert (drawn - torch.tensor(expected)).abs().max() < 5e-7  # a GPU's sine and logarithm are approximations


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (42, 3), (2**64 - 1, 1), (2**33 + 5, 0)])
def test_cuda_noise_against_the_formula_in_whole_numbers_and_float64(seed, offset):
    """Philox word by word in Python's integers; Box–Muller in float64, of which float32 is the rounding."""
    expected = []
    for index in range(50):
        words, keys = [offset, 0, index, 0], [seed % 2**32, seed // 2**32]
        for _ in range(10):
            a, b = divmod(0xD2511F53 * words[0], 2**32), divmod(0xCD9E8D57 * words[2], 2**32)
            words = [b[0] ^ words[1] ^ keys[0], b[1], a[0] ^ words[3] ^ keys[1], a[1]]
            keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
        u, v = ((word + 0.5) / 2**32 for word in words[:2])
        expected.append(np.sqrt(-2 * np.log(u)) * np.sin(v * 2 * np.pi))
    assert np.abs(cuda_randn(seed, offset, 50) - expected).max() < 1e-6  # of which cuRAND's π in float32 makes 3e-7


def test_draws_of_cuda_noise_are_numbered():
    noise = seeded_noise([5], SHAPE, CPU, source="cuda")
    for offset in range(3):
        assert torch.equal(noise().flatten(), torch.from_numpy(cuda_randn(5, offset, 256)))


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, 1.0])
def test_slerp_against_the_formula_in_float64(strength):
    start, end = torch_randn(1, SHAPE, SHAPE)
    a, b = start.double().numpy(), end.double().numpy()
    expected = np.empty_like(a)
    for c in range(4):
        for x in range(8):
            p, q = a[c, :, x], b[c, :, x]  # columns, as in AUTOMATIC1111
            angle = np.arccos(p @ q / np.linalg.norm(p) / np.linalg.norm(q))
            expected[c, :, x] = (np.sin((1 - strength) * angle) * p + np.sin(strength * angle) * q) / np.sin(angle)
    assert np.abs(slerp(strength, start, end).numpy() - expected).max() < 1e-5


def test_a_variation_goes_from_one_seeds_noise_to_the_others():
    [[seed], [other]] = torch_randn(7, (1, *SHAPE)), torch_randn(9, (1, *SHAPE))
    for strength, expected in [(0.0, seed[0]), (0.4, slerp(0.4, seed[0], other[0])), (1.0, other[0])]:
        noise = seeded_noise([7], SHAPE, CPU, variation_seeds=[9], variation_strength=strength)
        assert torch.allclose(noise()[0], expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 1, 9), (4, 9, 1)])
@pytest.mark.parametrize("variation_seed", [7, 8])
def test_columns_without_an_angle_between_them_are_mixed_too(shape, variation_seed):
    noise = seeded_noise([7], shape, CPU, variation_seeds=[variation_seed], variation_strength=0.5)()
    assert noise.isfinite().all()
    assert noise.abs().max() < 6
    if variation_seed == 7:
        assert torch.allclose(noise, seeded_noise([7], shape, CPU)(), atol=1e-6)


# Side of the seed, of the picture → first pixel there, first pixel here, how many: AUTOMATIC1111's rounding.
SIDES = [
    (8, 8, 0, 0, 8), (4, 8, 0, 2, 4), (5, 8, 0, 1, 5), (8, 4, 2, 0, 4), (8, 5, 2, 0, 4), (2, 1, 1, 0, 0),
    (1, 2, 0, 0, 1),
]  # fmt: skip


@pytest.mark.parametrize(("seed_side", "side", "there", "here", "length"), SIDES)
def test_a_resized_seed_keeps_its_middle(seed_side, side, there, here, length):
    """Along x; along y, where both are of one size, nothing moves."""
    seed_shape, shape = (4, 6, seed_side), (4, 6, side)
    [composition], [expected] = torch_randn(7, seed_shape), torch_randn(7, shape)
    expected[:, :, here : here + length] = composition[:, :, there : there + length]
    drawn = seeded_noise([7], shape, CPU, seed_shape=seed_shape)()[0]
    assert torch.equal(drawn, expected)
    turned = seeded_noise([7], (4, side, 6), CPU, seed_shape=(4, seed_side, 6))()[0]
    [composition], [expected] = torch_randn(7, (4, seed_side, 6)), torch_randn(7, (4, side, 6))
    expected[:, here : here + length] = composition[:, there : there + length]
    assert torch.equal(turned, expected)


def level(ratio: float) -> Level:
    return Level.from_ratio(0, ratio)


def test_brownian_noise_is_torchsdes():
    """As k-diffusion's BrownianTreeNoiseSampler asks for it: downwards, so against the path's direction."""
    increment = brownian_noise([5, 6], SHAPE, CPU, 0.03, 14.6)
    trees = [torchsde.BrownianTree(0.03, torch.zeros(SHAPE), 14.6, entropy=seed) for seed in (5, 6)]
    for start, end in [(14.6, 9.0), (9.0, 3.0), (3.0, 3.5), (3.5, 0.03)]:
        moved = torch.stack([tree(min(start, end), max(start, end)) for tree in trees])
        expected = moved * (1 if start < end else -1) / abs(end - start) ** 0.5
        assert (increment(level(start), level(end)) - expected).abs().max() < 1e-6


def test_brownian_noise_of_a_step_is_that_of_its_parts():
    increment = brownian_noise([5], SHAPE, CPU, 0.03, 14.6)
    whole = increment(level(9.0), level(2.0)) * 7**0.5
    parts = increment(level(9.0), level(4.0)) * 5**0.5 + increment(level(4.0), level(2.0)) * 2**0.5
    assert torch.allclose(whole, parts, atol=1e-4)


def test_brownian_noise_is_standard_normal_and_the_same_in_any_batch():
    alone, batch = (brownian_noise(seeds, (4, 64, 64), CPU, 0.03, 14.6) for seeds in ([7], [8, 7]))
    for start, end in [(14.6, 5.0), (5.0, 0.5), (0.5, 0.03)]:
        drawn = alone(level(start), level(end))
        assert torch.equal(drawn[0], batch(level(start), level(end))[1])
        assert abs(drawn.mean()) < 0.03
        assert abs(drawn.std() - 1) < 0.03


def test_brownian_noise_reaches_from_pure_noise_to_a_clean_image(recwarn):
    increment = brownian_noise([7], SHAPE, CPU, 0.03, 4096.0)
    for start, end in [(Level(999, 0.0, 1.0), level(14.6)), (level(14.6), level(0.03)), (level(1.0), level(0.0))]:
        assert increment(start, end).isfinite().all()
    assert not recwarn.list


def test_brownian_noise_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(RequestError, match=r"pip install -e '\.\[brownian\]'"):
        brownian_noise([7], SHAPE, CPU, 0.03, 14.6)
