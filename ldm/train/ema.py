"""The exponential moving average of what is trained: what is saved, and what pictures are drawn with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Named = Mapping[str, Tensor]


class EMA:
    """shadow ← decay · shadow + (1 - decay) · parameter, after each step; faster at first, as in the reference."""

    def __init__(self, parameters: Named, decay: float):
        self.decay = decay
        self.shadow = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Named, step: int) -> None:
        decay = min(self.decay, (2 + step) / (11 + step))  # LitEma counts from 1
        torch._foreach_lerp_(list(self.shadow.values()), [parameters[name] for name in self.shadow], 1 - decay)

    @contextmanager
    def applied(self, parameters: Named) -> Iterator[None]:
        """With the averages in the place of the parameters."""
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    @torch.no_grad()
    def _swap(self, parameters: Named) -> None:
        for name, average in self.shadow.items():
            kept = parameters[name].clone()
            parameters[name].copy_(average)
            average.copy_(kept)
