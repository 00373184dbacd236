"""Noise that depends on the seed alone: not on the batch an image is part of, nor on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldm.diffusion import Noise


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Noise:
    """A source of standard normal (len(seeds), *shape) float32 tensors; each image has a CPU generator of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> torch.Tensor:
        return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)

    return draw
