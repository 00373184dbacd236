"""What a caller holds of something that was loaded into a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Handle:
    """A LoRA or an embedding in use: `remove()` takes it out again, and so does the end of a `with` block."""

    name: str
    remove: Callable[[], None]  # without effect the second time

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
