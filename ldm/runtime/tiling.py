"""Pictures whose sides fit to each other: convolutions that wrap around where they would see zeros."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm.errors import RequestError
from ldm.runtime import native
from ldm.runtime.packing import ONEDNN

AXES: dict[str, tuple[int, ...]] = {"none": (), "both": (-1, -2), "x": (-1,), "y": (-2,)}  # of a b c h w tensor

# Its place among a convolution's arguments.
PADDING = {F.conv2d: 4, native.convolution: 3, getattr(ONEDNN, "_convolution_pointwise", None): 3}


def seamless(tiling: str) -> AbstractContextManager[object]:
    """While it is entered, padding wraps around: along x, y, both, or none. Raises RequestError for another word.

    It changes how this thread evaluates convolutions (and the VAE's own padding), not the networks: enter it around
    each evaluation of one, never around the yield of a generator, whose caller would be inside of it too.
    """
    if tiling not in AXES:
        raise RequestError(f"tiling is {tiling!r}: use one of {', '.join(AXES)}")
    return _Wrapping(AXES[tiling]) if AXES[tiling] else nullcontext()


class _Wrapping(TorchFunctionMode):
    def __init__(self, axes: tuple[int, ...]):
        super().__init__()
        self.axes = axes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        place = PADDING.get(func)
        if place and len(args) > place:  # as layers call it
            x, (height, width) = args[0], args[place]
            x = self._wrap(x, (width, width, height, height))
            padding = (0 if -2 in self.axes else height, 0 if -1 in self.axes else width)
            return func(x, *args[1:place], padding, *args[place + 1 :])
        if func is F.pad and len(args[1]) == 4:
            x, sides = args
            rest = [0 if axis in self.axes else side for axis, side in zip((-1, -1, -2, -2), sides, strict=True)]
            return func(self._wrap(x, sides), rest, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _wrap(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """`x` (b, c, h, w) enlarged on its tiled axes by pixels of the other side; `sides` is left, right, top, bottom.

        F.pad's circular mode is not used, because its result is not in channels_last memory.
        """
        for axis, before, after in ((-1, *sides[:2]), (-2, *sides[2:])):
            if axis in self.axes and before + after:
                size = x.shape[axis]
                parts = [x.narrow(axis, size - before, before), x, x.narrow(axis, 0, after)]
                x = torch.cat(parts, dim=axis)
        return x
