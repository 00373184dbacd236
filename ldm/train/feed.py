"""What each step is made of: a pure function of the run's seed and the step.

Every random number of a step is drawn here, by a generator of its own for each place in the batch. So a run that is
resumed goes on as if it had never stopped, and several processes together see what one would have seen.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
Prepare = Callable[[int, torch.Generator], Batch]  # an example's number and its randomness → its tensors


def generator(*key: object) -> torch.Generator:
    """A random source that depends on the key alone, on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class Feed:
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

    def steps(self, first: int, last: int, workers: int) -> Generator[list[Batch], None, None]:
        """Those of the steps from `first` to below `last`, made ahead by `workers` threads.

        Decoding and resizing of pictures leave Python's lock to others, and threads need no copies of the networks.
        """
        if not workers:
            yield from map(self.__getitem__, range(first, last))
            return
        ahead: deque[Future[list[Batch]]] = deque()
        threads = ThreadPoolExecutor(workers)
        try:
            for step in range(first, last):
                ahead.append(threads.submit(self.__getitem__, step))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)


def _stack(examples: Sequence[Batch]) -> Batch:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
