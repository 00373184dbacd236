"""Latents that are made once, before the first step, and kept in a file of the run's folder."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor
from tqdm import tqdm

from ldm.files import staged_file
from ldm.images import to_tensor
from ldm.models.vae import VAE
from ldm.train.config import Data
from ldm.train.data import Examples, fit, load_example

log = logging.getLogger(__name__)

Sizes = Sequence[tuple[int, int]]
PIXELS = 512 * 512  # to encode at once


class Cache:
    """Example → the mean and deviation of its unscaled latents, float16, one below the other: (2·c, h, w)."""

    def __init__(self, latents: dict[str, Tensor], sizes: Sizes):
        self._latents, self._sizes = latents, sizes
        taken: Counter[tuple[int, int]] = Counter()
        self._rows = []
        for size in sizes:
            self._rows.append(taken[size])
            taken[size] += 1

    def __getitem__(self, number: int) -> Tensor:
        return self._latents[_name(self._sizes[number])][self._rows[number]]


def _name(size: tuple[int, int]) -> str:
    return "{}x{}".format(*size)


@torch.no_grad()
def open_cache(path: Path, vae: VAE, examples: Examples, sizes: Sizes, data: Data, device: torch.device) -> Cache:
    """The latents of all examples, cut to `sizes` (width, height): from `path` if it holds these, else made anew."""
    key = _key(vae, examples, sizes, data)
    if path.is_file() and _key_of(path) == key:
        return Cache(load_file(path), sizes)
    latents: dict[str, Tensor] = {}
    with tqdm(total=len(sizes), unit="picture", desc="encoding pictures") as bar:
        for size in dict.fromkeys(sizes):
            numbers = [number for number, own in enumerate(sizes) if own == size]
            parts = []
            batch = max(1, PIXELS // (size[0] * size[1]))
            for start in range(0, len(numbers), batch):
                pictures = [
                    fit(load_example(examples, number).image, size) for number in numbers[start : start + batch]
                ]
                posterior = vae.encode(torch.cat([to_tensor(picture) for picture in pictures]).to(device))
                parts.append(
                    torch.cat([posterior.mean, (0.5 * posterior.logvar).exp()], dim=1).half().cpu().contiguous()
                )
                bar.update(len(pictures))
            latents[_name(size)] = torch.cat(parts)
    with staged_file(path, overwrite=True) as temporary:
        save_file(latents, temporary, {"key": key})
    return Cache(latents, sizes)


def _key(vae: VAE, examples: Examples, sizes: Sizes, data: Data) -> str:
    """What the latents depend on: the encoder's weights, and which pictures there are, from where, in which order."""
    digest = hashlib.sha256()
    for parameter in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    digest.update(repr([data, *((examples.name(number), size) for number, size in enumerate(sizes))]).encode())
    return digest.hexdigest()


def _key_of(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("key")
    except (SafetensorError, OSError) as error:
        log.warning("%s: not readable (%s): made anew", path, error)
        return None
