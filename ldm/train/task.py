"""What a training task offers to the loop: losses of a batch, weights to save, pictures to look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.train.feed import Batch


class Task(ABC, nn.Module):
    """Its submodules are what is trained, saved and resumed; a Model, which is none, holds the rest."""

    turns: tuple[str, ...] = ("network",)  # whose losses a step minimises, one after the other

    def turns_at(self, step: int) -> tuple[str, ...]:
        """Those of a step."""
        return self.turns

    @abstractmethod
    def prepare(self, number: int, generator: torch.Generator) -> Batch:
        """The tensors of one example, randomness included."""

    @abstractmethod
    def forward(self, batch: Batch, step: int, turn: str) -> Mapping[str, Tensor]:
        """Scalars to record, the means over a batch; "loss" is the one to minimise."""

    def learners(self, turn: str) -> list[nn.Parameter]:
        """The parameters that a turn changes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @abstractmethod
    def save(self, target: Path, dtype: str) -> None:
        """Write the result so far in a layout that every tool reads, over what is there."""

    @abstractmethod
    def pictures(self) -> Image.Image | None:
        """A sheet that shows what has been learned so far."""
