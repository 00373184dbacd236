"""DreamBooth's prior preservation (arXiv:2208.12242): the model's own pictures beside the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.checkpoint import Model
from ldm.files import staged_file
from ldm.pipeline import StableDiffusion
from ldm.train.config import TrainConfig
from ldm.train.data import Example, Examples, Size, load_example


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
        return load_example(source, number)

    def size(self, index: int) -> Size:
        source, number = self._find(index)
        return source.size(number)

    def caption(self, index: int) -> str:
        source, number = self._find(index)
        return source.caption(number)

    def name(self, index: int) -> str:
        source, number = self._find(index)
        return source.name(number)

    def summary(self) -> str:
        return f"{self.first.summary()}; {self.second.summary()}"


def draw_prior(folder: Path, model: Model, config: TrainConfig, device: torch.device) -> None:
    """Fill a folder with the model's pictures of the class, those that it lacks, each under the number of its seed."""
    prior = config.prior
    missing = [seed for seed in range(prior.count) if not (folder / f"{seed}.txt").is_file()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    networks = (model.unet, model.vae, model.text)
    for network in networks:
        network.to(device)
    sd = StableDiffusion(*networks, model.config, "prior", device, torch.float32)
    for seed in tqdm(missing, unit="picture", desc="drawing the prior"):
        prompt = prior.prompts[seed % len(prior.prompts)]
        [picture] = sd.generate(config.request(prompt, seed))
        with staged_file(folder / f"{seed}.png", overwrite=True) as temporary:
            picture.save(temporary, format="PNG")
        with staged_file(folder / f"{seed}.txt") as temporary:  # last: it tells that the picture is there
            temporary.write_text(prompt, encoding="utf-8")
    for network in networks:
        network.cpu()
