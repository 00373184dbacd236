"""DreamBooth's prior preservation (arXiv:2208.12242): the model's own pictures beside the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ldm.checkpoint import Model
from ldm.files import staged_file
from ldm.pipeline import StableDiffusion
from ldm.train.cache import fingerprint
from ldm.train.config import TrainConfig
from ldm.train.data import Example, Examples, Size


@dataclass(frozen=True)
class Joined:
    """Examples of two sources, as many of each: the first half is of the first. The smaller one comes round again."""

    first: Examples
    second: Examples

    @property
    def half(self) -> int:
        return max(len(self.first), len(self.second))

    @property
    def broken(self) -> Mapping[str, str]:
        return {**self.first.broken, **self.second.broken}

    def _find(self, index: int) -> tuple[Examples, int]:
        source = self.first if index < self.half else self.second
        return source, index % self.half % len(source)

    def __len__(self) -> int:
        return 2 * self.half

    def __getitem__(self, index: int) -> Example:
        source, number = self._find(index)
        return source[number]

    def size(self, index: int) -> Size:
        source, number = self._find(index)
        return source.size(number)

    def caption(self, index: int) -> str:
        source, number = self._find(index)
        return source.caption(number)

    def name(self, index: int) -> str:
        source, number = self._find(index)
        return source.name(number)

    def version(self, index: int) -> object:
        source, number = self._find(index)
        return source.version(number)

    def summary(self) -> str:
        return f"{self.first.summary()}; {self.second.summary()}"


def draw_prior(parent: Path, model: Model, config: TrainConfig, accelerator: Accelerator) -> Path:
    """The model's pictures of the class, each under the number of its seed: in a folder of their own, of which those
    that lack are drawn now. Another model, other prompts or other settings have another folder."""
    prior, device = config.prior, accelerator.device
    requests = [config.request(prior.prompts[seed % len(prior.prompts)], seed) for seed in range(prior.count)]
    networks = (model.unet, model.vae, model.text)
    sd = StableDiffusion(*networks, model.config, "prior", device, torch.float32)
    requests = [sd.resolve(request) for request in requests]
    folder = parent / fingerprint(networks, model.config.schedule, requests, config.loop.precision)[:12]
    missing = [
        request
        for request in requests
        if not all((folder / f"{request.seed}.{ending}").is_file() for ending in ("png", "txt"))
    ]
    if not missing:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for network in networks:
        network.to(device)
    for request in tqdm(missing, unit="picture", desc="drawing the prior"):
        with accelerator.autocast():
            [picture] = sd.generate(request)
        with staged_file(folder / f"{request.seed}.png", overwrite=True) as temporary:
            picture.save(temporary, format="PNG")
        with staged_file(folder / f"{request.seed}.txt", overwrite=True) as temporary:
            temporary.write_text(request.prompt, encoding="utf-8")
    for network in networks:
        network.cpu()
    return folder
