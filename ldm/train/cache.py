"""What is computed once, before the first step: latents, kept in a file of the run's folder, and captions' states."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint.files import first_line
from ldm.errors import LdmError
from ldm.files import staged_file
from ldm.images import to_tensor
from ldm.models.text import TextEncoder
from ldm.models.vae import VAE
from ldm.train.data import Examples, find_whole, fit

log = logging.getLogger(__name__)

Sizes = Sequence[tuple[int, int]]
PIXELS = 512 * 512  # to encode at once
CAPTIONS = 32  # to encode at once
SOURCES = "sources"


class Cache:
    """Example → the mean and deviation of its unscaled latents, float16, one below the other: (2·c, h, w).

    `sources` tells which example that is: another where its own picture is broken.
    """

    def __init__(self, tensors: dict[str, Tensor], sizes: Sizes):
        self.sources: list[int] = tensors[SOURCES].tolist()
        self._latents, self._sizes = tensors, sizes
        taken: Counter[tuple[int, int]] = Counter()
        self._rows = []
        for size in sizes:
            self._rows.append(taken[size])
            taken[size] += 1

    def __getitem__(self, number: int) -> Tensor:
        return self._latents[_name(self._sizes[number])][self._rows[number]]


def _name(size: tuple[int, int]) -> str:
    return "{}x{}".format(*size)


def _shape(vae: VAE, size: tuple[int, int]) -> tuple[int, int, int]:
    width, height = (side // vae.config.downsampling for side in size)
    return 2 * vae.config.latent_channels, height, width


@torch.no_grad()
def open_cache(path: Path, vae: VAE, examples: Examples, sizes: Sizes, device: torch.device) -> Cache:
    """The latents of all examples, cut to `sizes` (width, height): from `path` if it holds these, else made anew."""
    versions = [(examples.version(number), size) for number, size in enumerate(sizes)]
    key = fingerprint([vae.encoder, vae.quant_conv], versions)
    if path.is_file() and _key_of(path) == key:
        return Cache(load_file(path), sizes)
    sources = torch.arange(len(sizes))
    latents: dict[str, Tensor] = {}
    with tqdm(total=len(sizes), unit="picture", desc="encoding pictures") as bar:
        for size in dict.fromkeys(sizes):
            numbers = [number for number, own in enumerate(sizes) if own == size]
            rows = torch.empty(len(numbers), *_shape(vae, size), dtype=torch.float16)
            batch = max(1, PIXELS // (size[0] * size[1]))
            for start in range(0, len(numbers), batch):
                pictures = []
                for number in numbers[start : start + batch]:
                    sources[number], example = find_whole(examples, number)
                    pictures.append(to_tensor(fit(example.image, size)))
                posterior = vae.encode(torch.cat(pictures).to(device))
                deviation = (0.5 * posterior.logvar).exp()
                rows[start : start + batch] = torch.cat([posterior.mean, deviation], dim=1)
                bar.update(len(pictures))
            latents[_name(size)] = rows
    tensors = {**latents, SOURCES: sources}
    try:
        with staged_file(path, overwrite=True) as temporary:
            save_file(tensors, temporary, {"key": key})
    except SafetensorError as error:  # which is what a full disk is to safetensors
        raise LdmError(f"{path}: cannot be written; is there room on the disk? ({first_line(error)})") from error
    return Cache(tensors, sizes)


@torch.no_grad()
def encode_captions(text: TextEncoder, captions: Iterable[str], clip_skip: int) -> dict[str, Tensor]:
    """Caption → its hidden states (n, width), float16 on the CPU, of each that there is."""
    states: dict[str, Tensor] = {}
    different = sorted(set(captions))
    with tqdm(total=len(different), unit="caption", desc="encoding captions") as bar:
        for start in range(0, len(different), CAPTIONS):
            some = different[start : start + CAPTIONS]
            encoded = text(text.tokenize(some).to(next(text.parameters()).device), clip_skip)
            states.update(zip(some, encoded.half().cpu(), strict=True))
            bar.update(len(some))
    return states


def fingerprint(networks: Iterable[nn.Module], *facts: object) -> str:
    """A name for weights and whatever else something is made of."""
    digest = hashlib.sha256(repr(facts).encode())
    for network in networks:
        for parameter in network.parameters():
            digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _key_of(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("key")
    except (SafetensorError, OSError) as error:
        log.warning("%s: not readable (%s): made anew", path, error)
        return None
