"""What each step is made of: a pure function of the run's seed and the step.

Every random number of a step is drawn here, by a generator of its own for each place in the batch. So a run that is
resumed goes on as if it had never stopped, and several processes together see what one would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]
Prepare = Callable[[int, torch.Generator], Batch]  # an example's number and its randomness → its tensors


def generator(*key: object) -> torch.Generator:
    """A random source that depends on the key alone, on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class Feed(Dataset):
    """Step → the micro-batches that one of `processes` takes of the step's global batch."""

    def __init__(
        self,
        batches: Any,  # step → the numbers of its examples
        prepare: Prepare,
        seed: int,
        *,
        micro_batch: int | None = None,
        process: int = 0,
        processes: int = 1,
    ):
        self.batches, self.prepare, self.seed = batches, prepare, seed
        self.micro_batch, self.process, self.processes = micro_batch, process, processes

    def __getitem__(self, step: int) -> list[Batch]:
        numbers = self.batches[step]
        share = len(numbers) // self.processes
        mine = range(self.process * share, (self.process + 1) * share)
        prepared = [self.prepare(numbers[place], generator(self.seed, step, place)) for place in mine]
        size = self.micro_batch or share
        return [_stack(prepared[start : start + size]) for start in range(0, share, size)]

    def loader(self, first: int, steps: int, workers: int) -> DataLoader:
        """The steps from `first` to the last, made ahead by `workers` processes."""
        return DataLoader(self, batch_size=None, sampler=range(first, steps), num_workers=workers)


def _stack(examples: Sequence[Batch]) -> Batch:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
