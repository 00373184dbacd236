"""Noise that depends on the seed alone: not on the batch an image is part of, nor on the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion import Increment, Level, Noise
from ldm.errors import RequestError
from ldm.runtime.device import send

NO_SINE = 1e-3  # of the angle between directions too close to each other, or to opposites, for slerp in float32


def seeded_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    device: torch.device,
    *,
    source: str = "cpu",
    variation_seeds: Sequence[int] | None = None,
    variation_strength: float = 0.0,
    seed_shape: Sequence[int] | None = None,
) -> Noise:
    """A source of standard normal (len(seeds), *shape) float32 tensors; each image has a generator of its own.

    source: cpu, torch's CPU generator; or cuda, what torch.randn draws on NVIDIA's, computed here. The other settings
    are of the first draw, which decides on the composition, as in AUTOMATIC1111's modules/rng.py: variation_seeds, one
    an image, whose noise is mixed in by variation_strength, from 0 for none of it to 1; and seed_shape (c, h, w), the
    shape of the latents whose composition is to be kept, in the middle of `shape`. Raises RequestError.
    """
    if source not in SOURCES:
        raise RequestError(f"noise is {source!r}: use one of {', '.join(SOURCES)}")

    def draws(seed: int, variation_seed: int) -> Iterator[Tensor]:
        stream = SOURCES[source](seed, shape)
        composition = next(SOURCES[source](seed, seed_shape or shape))
        if variation_strength:
            variation = next(SOURCES[source](variation_seed, seed_shape or shape))
            composition = slerp(variation_strength, composition, variation)
        yield _paste_centre(composition, next(stream))
        yield from stream

    images = [draws(*pair) for pair in zip(seeds, variation_seeds or seeds, strict=True)]
    return lambda: send(torch.stack([next(image) for image in images]), device)


def _cpu(seed: int, shape: Sequence[int]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(*shape, generator=generator)


def _cuda(seed: int, shape: Sequence[int]) -> Iterator[Tensor]:
    for offset in count():
        yield torch.from_numpy(cuda_randn(seed, offset, math.prod(shape))).view(*shape)


SOURCES: dict[str, Callable[[int, Sequence[int]], Iterator[Tensor]]] = {"cpu": _cpu, "cuda": _cuda}


def cuda_randn(seed: int, offset: int, size: int) -> np.ndarray:
    """The float32 numbers of draw `offset` of a CUDA generator, as AUTOMATIC1111's modules/rng_philox.py has them.

    A thread of the GPU makes each: Philox keyed by the seed, and the first half of cuRAND's Box–Muller transform. On
    the GPU itself the last digits differ, for its logarithm and sine are approximations, and so does all beyond as
    many numbers as it has threads (a hundred thousand and more: latents of 1024×1024 pixels have 65536).
    """
    counter = np.zeros((4, size), dtype=np.uint64)
    counter[0], counter[2] = offset, np.arange(size)
    x, y, _, _ = philox_4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    two_pi = float(np.float32(2 * np.pi))  # cuRAND's constant
    radius = np.sqrt(-2 * np.log((x + 0.5) / 2**32))
    return (radius * np.sin((y + 0.5) * (two_pi / 2**32))).astype(np.float32)


def philox_4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32 of 10 rounds (Salmon et al. 2011, doi:10.1145/2063384.2063405): 32-bit words in uint64, (4, n)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low = 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & low, (first >> 32) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return np.stack([c0, c1, c2, c3])


def slerp(share: float, start: Tensor, end: Tensor) -> Tensor:
    """From `start` to `end`, (c, h, w), along the arc between their columns, as in AUTOMATIC1111's modules/rng.py.

    share: 0 is start, 1 is end. Columns with hardly an angle between them, which have no arc, are mixed linearly.
    """
    cosine = (start / start.norm(dim=1, keepdim=True) * (end / end.norm(dim=1, keepdim=True))).sum(dim=1, keepdim=True)
    angle = torch.acos(cosine.clamp(-1, 1))
    arc = (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)
    return torch.where(torch.sin(angle) > NO_SINE, arc, (1 - share) * start + share * end)


def _paste_centre(source: Tensor, target: Tensor) -> Tensor:
    """The middle of `source` over the middle of `target`, (c, h, w), rounded as in AUTOMATIC1111's modules/rng.py."""
    (from_y, to_y), (from_x, to_x) = (_middles(s, t) for s, t in zip(source.shape[1:], target.shape[1:], strict=True))
    target[:, to_y, to_x] = source[:, from_y, from_x]
    return target


def _middles(source: int, target: int) -> tuple[slice, slice]:
    """What is common to two sides with the same middle: its part of the source, and of the target."""
    margin = (target - source) // 2  # rounded down, also where it is negative
    if margin >= 0:
        return slice(0, source), slice(margin, margin + source)
    return slice(-margin, source + margin), slice(0, source + 2 * margin)


def brownian_noise(
    seeds: Sequence[int], shape: Sequence[int], device: torch.device, ratio_min: float, ratio_max: float
) -> Increment:
    """Noise for steps between levels, standard normal (len(seeds), *shape) float32, out of one path an image.

    Where a step is split, the noises of its parts add up to its own: with more steps a picture is the same picture in
    more detail. Each path is a torchsde.BrownianTree over Level.ratio from ratio_min to ratio_max (both finite), drawn
    on the CPU, as k-diffusion's BrownianTreeNoiseSampler has it. Raises RequestError where torchsde is not installed.
    """
    try:
        import torchsde
    except ImportError as error:
        raise RequestError("brownian needs torchsde, which is not installed: pip install -e '.[brownian]'") from error
    paths = [torchsde.BrownianTree(ratio_min, torch.zeros(*shape), ratio_max, entropy=seed) for seed in seeds]

    def increment(level: Level, after: Level) -> Tensor:
        start, end = (min(max(at.ratio, ratio_min), ratio_max) for at in (level, after))
        low, high = sorted((start, end))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ends that the tree has rounded
            moved = torch.stack([path(low, high) for path in paths]) / math.sqrt(high - low)
        return send(moved if start <= end else -moved, device)

    return increment
