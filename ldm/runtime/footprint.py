"""What a computation takes of memory, told without computing it: networks run on `meta` tensors, which have no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def footprint(run: Callable[[], object]) -> int:
    """The most bytes that the tensors made by `run`, which are all on `meta`, have at any one time."""
    with torch.no_grad(), _Fused(), _Counting() as counting:
        run()
    return counting.most


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # bytes of storages, by id
        self.now = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for made in tree_leaves(result):
                if isinstance(made, Tensor):
                    self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.alive:
            self.alive[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, id(storage))

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)


class _Fused(TorchFunctionMode):
    """Attention as CPUs and CUDA have it, which make no matrix of all queries and keys; `meta` does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, _, v = args
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))
