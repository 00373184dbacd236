"""Fewer tokens for self-attention: those that are alike are merged before it, and get one answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm.models.unet import UNet
from ldm.runtime.packing import ONEDNN

LINEAR = F.linear, getattr(ONEDNN, "_linear_pointwise", None)  # what layers call, with their bias third


def merging(unet: UNet, share: float, size: Sequence[int]) -> AbstractContextManager[object]:
    """While it is entered, self-attention at the finest level that has any sees a share fewer tokens, of 0 to 0.75.

    size: height and width of the latents. Token merging for Stable Diffusion, Bolya and Hoffman 2023, arXiv:2303.17604.
    Like `seamless` it changes how this thread evaluates functions, not the network.
    """
    return _Merging(unet, share, size) if share else nullcontext()


class Matching:
    """Which tokens of a map are merged into which, from their cosine similarity; for each picture by itself.

    Destinations are the top left of each 2×2, as in AUTOMATIC1111 (the paper draws one at random), so that nothing
    depends on chance. Of the others, the int(share · height · width) that are most like a destination go to theirs.
    """

    def __init__(self, x: Tensor, height: int, width: int, share: float):
        """x: tokens (b, height·width, c)."""
        rows, columns = (torch.arange(side, device=x.device) % 2 for side in (height, width))
        order = (rows[:, None] + columns > 0).flatten().int().argsort(stable=True)  # no nonzero, which a GPU waits for
        self.destinations, sources = order.tensor_split([-(-height // 2) * -(-width // 2)])  # also of a cut-off 2×2
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        similarity, best = (x[:, sources] @ x[:, self.destinations].mT).max(dim=-1)
        ranking = similarity.argsort(dim=-1, descending=True, stable=True)
        sources, best = sources[ranking], best.take_along_dim(ranking, dim=1)
        count = min(int(share * height * width), sources.shape[1])
        self.merged, self.alone, self.into = sources[:, :count], sources[:, count:], best[:, :count]

    def merge(self, x: Tensor) -> Tensor:
        """(b, n, c) → (b, n - merged, c): the means that destinations become, then the sources that stay alone."""
        places = torch.arange(len(self.destinations), device=x.device)
        goes = self.into[:, None] == places[:, None]  # (b, destinations, merged)
        part = 1 / (1 + goes.sum(dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)))
        # A product of matrices, because on GPUs sums over indices differ from run to run.
        means = (part * x[:, self.destinations]).to(x.dtype) + (part * goes).to(x.dtype) @ _take(x, self.merged)
        return torch.cat([means, _take(x, self.alone)], dim=1)

    def unmerge(self, x: Tensor) -> Tensor:
        """(b, n - merged, c) → (b, n, c): those that were merged get their destination's."""
        means, alone = x.tensor_split([len(self.destinations)], dim=1)
        order = torch.cat([self.destinations.expand(len(x), -1), self.alone, self.merged], dim=1)
        return _take(torch.cat([means, alone, _take(means, self.into)], dim=1), order.argsort(dim=1))


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Tokens (b, n, c) at places (b, m): (b, m, c)."""
    return x.take_along_dim(places[..., None], dim=1)


class _Merging(TorchFunctionMode):
    def __init__(self, unet: UNet, share: float, size: Sequence[int]):
        super().__init__()
        finest = min(unet.config.attention_levels, default=len(unet.config.channel_mult) - 1)
        self.share, (self.height, self.width) = share, (-(-side // 2**finest) for side in size)
        transformers = [stage.transformer for stage in unet.stages if stage.transformer]
        # A layer is known by a parameter that stays the same object, even where weights are streamed.
        self.before = {id(transformer.norm1.weight) for transformer in transformers}
        self.after = {id(transformer.self_attention.to_out.bias) for transformer in transformers}
        self.matching: Matching | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        if func is F.layer_norm and id(kwargs["weight"]) in self.before:
            [x, *_] = args
            if x.shape[1] == self.height * self.width:  # no other level has as many
                self.matching = Matching(x, self.height, self.width, self.share)
                return self.matching.merge(answer)
        if func in LINEAR and self.matching and id(args[2]) in self.after:
            matching, self.matching = self.matching, None
            return matching.unmerge(answer)
        return answer
