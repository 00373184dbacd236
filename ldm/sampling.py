"""From networks and texts to a denoiser: what a sampler asks at each level, computed as few times as can be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion import Denoise, Level, Prediction
from ldm.diffusion.guidance import guide, guide_edit, rescale, threshold
from ldm.diffusion.prediction import PREDICTION_TYPES
from ldm.errors import RequestError
from ldm.models.unet import KeyValue, UNet
from ldm.request import Request
from ldm.runtime.device import send
from ldm.runtime.memory import first_that_fits
from ldm.runtime.merging import merging
from ldm.runtime.streaming import offload, resident
from ldm.runtime.tiling import seamless

log = logging.getLogger(__name__)

MOST_KEPT = 20  # about so many contexts' keys and values: prompts may be others at each step


class Branch(NamedTuple):
    """What the U-Net is told of one picture, besides the picture as it is."""

    context: Tensor  # (1, n, width)
    beside: Tensor | None = None  # (1, c, h, w), more channels of its input


class Predictor:
    """The U-Net as a function of latents, level and branches. What is constant over the steps is computed once.

    deep_cache, token_merging: as in Request.
    """

    def __init__(
        self,
        unet: UNet,
        prediction_type: str,
        levels: Sequence[Level],
        tiling: str = "none",
        deep_cache: int = 1,
        token_merging: float = 0.0,
    ):
        self.unet, self.prediction_type, self.tiling = unet, prediction_type, tiling
        self.deep_cache, self.token_merging = deep_cache, token_merging
        bias = unet.conv_in.bias  # which is in memory, where not all weights are
        assert bias is not None
        self.device, self.dtype = bias.device, bias.dtype
        times = list(dict.fromkeys(level.t for level in levels))
        self._shifts = dict(zip(times, self._embed(times), strict=True))
        self._keys_values: dict[tuple[int, ...], list[KeyValue]] = {}  # by batch size and the contexts they are made of
        self._deep: dict[tuple[int, ...], Tensor] = {}  # of the steps of one period, by all that it is made of but x
        self._period = 0

    @torch.no_grad()
    def _embed(self, times: Sequence[float]) -> list[tuple[Tensor, ...]]:
        shifts = self.unet.embed_time(send(torch.tensor(times), self.device))
        return list(zip(*(shift.split(1) for shift in shifts), strict=True))

    def _shifts_at(self, t: float) -> tuple[Tensor, ...]:
        if t not in self._shifts:  # a sampler that evaluates between the levels of its grid
            [self._shifts[t]] = self._embed([t])
        return self._shifts[t]

    def _keys_values_of(self, contexts: Sequence[Tensor], batch: int) -> list[KeyValue]:
        """Those of all contexts, each for a whole batch; the caller keeps the contexts, whose identity tells them."""
        key = (batch, *map(id, contexts))
        if key not in self._keys_values:
            while self._keys_values and sum(map(len, self._keys_values)) + len(contexts) > MOST_KEPT:
                del self._keys_values[next(iter(self._keys_values))]
            states = torch.cat([context.to(self.device, self.dtype) for context in contexts])
            self._keys_values[key] = [
                (k.repeat_interleave(batch, dim=0), v.repeat_interleave(batch, dim=0))
                for k, v in self.unet.embed_context(states)
            ]
        return self._keys_values[key]

    @torch.no_grad()
    def together(self, x: Tensor, level: Level, branches: Sequence[Branch], step: int = 0) -> list[Prediction]:
        """A prediction for each branch, from one evaluation where their contexts have one length.

        What the branches share until they meet their prompts is computed once, unless they see other channels.
        step: by which `deep_cache` counts. The caller keeps the branches' tensors, whose identity tells them.
        """
        if len({branch.context.shape[1] for branch in branches}) > 1:
            return self.apart(x, level, branches, step)
        keys_values = self._keys_values_of([branch.context for branch in branches], len(x))
        alike = all(branch.beside is branches[0].beside for branch in branches)
        seen = [_with_channels(x, branch.beside) for branch in (branches[:1] if alike else branches)]
        latents = torch.cat(seen).to(self.dtype)
        of_what = (len(x), *(id(tensor) for branch in branches for tensor in branch))
        with seamless(self.tiling), merging(self.unet, self.token_merging, latents.shape[-2:]):
            outputs = self._evaluate(latents, self._shifts_at(level.t), keys_values, step, of_what)
        predict = PREDICTION_TYPES[self.prediction_type]
        return [predict(output, x, level) for output in outputs.float().chunk(len(branches))]

    def _evaluate(
        self,
        latents: Tensor,
        shifts: Sequence[Tensor],
        keys_values: Sequence[KeyValue],
        step: int,
        of_what: tuple[int, ...],
    ) -> Tensor:
        """The whole U-Net, or its outermost layers around what the others answered last, in one period of steps.

        DeepCache, Ma et al. 2023, arXiv:2312.00858, section 3.3: its 1:N strategy, with the shallowest of its branches.
        """
        if self.deep_cache == 1:
            return self.unet.predict(latents, shifts, keys_values)
        period, since = divmod(step, self.deep_cache)
        if period != self._period:
            self._period, self._deep = period, {}
        outer = self.unet.enter(latents)
        if since == 0 or of_what not in self._deep:
            self._deep[of_what] = self.unet.deep(outer, shifts, keys_values)
        return self.unet.leave(outer, self._deep[of_what], shifts, keys_values)

    def apart(self, x: Tensor, level: Level, branches: Sequence[Branch], step: int = 0) -> list[Prediction]:
        """The same, from an evaluation each."""
        return [self.together(x, level, [branch], step)[0] for branch in branches]

    def offloaded(self, x: Tensor, level: Level, branches: Sequence[Branch], step: int = 0) -> list[Prediction]:
        """The same, by weights that are not on the GPU from now on but while their layer runs."""
        offload(self.unet)
        return self.apart(x, level, branches, step)


def _with_channels(x: Tensor, beside: Tensor | None) -> Tensor:
    return x if beside is None else torch.cat([x, beside.expand(len(x), -1, -1, -1)], dim=1)


@dataclass(frozen=True)
class Conditions:
    """What is to be drawn, and what not, by step; and what an inpainting or editing model sees beside the latents."""

    positive: Conditioning
    negative: Conditioning
    beside: Tensor | None = None  # (1, c, h, w)
    edits: bool = False  # InstructPix2Pix: guidance is by the picture beside, too


def guided(
    predictor: Predictor,
    conditions: Conditions,
    request: Request,
    levels: Sequence[Level],
    apart: bool = False,
    may_offload: bool = False,
) -> Denoise:
    """The U-Net with guidance, over the levels of a run, from whose start the steps of prompts count.

    apart: whether to begin with an evaluation for each prompt, and not only where memory is short for one of all.
    may_offload: whether the U-Net may leave a GPU that is too full for that, and stay away.
    """
    ways = {} if apart else {"one evaluation for all prompts": predictor.together}
    ways["an evaluation for each prompt"] = predictor.apart
    if may_offload and predictor.device.type != "cpu" and resident(predictor.unet):
        ways["the U-Net's weights in main memory"] = predictor.offloaded
    ask = first_that_fits(ways)
    visited, cfg_scale = levels[:-1], request.cfg_scale
    assert cfg_scale is not None
    unseen = None if conditions.beside is None else torch.zeros_like(conditions.beside)

    def step_of(level: Level) -> int:
        """The step during which a level is visited, be it one of the grid or one between two of them."""
        return max(sum(before.ratio >= level.ratio * (1 - 1e-9) for before in visited) - 1, 0)

    def denoise(x: Tensor, level: Level) -> Prediction:
        """The guided prediction: of as many evaluations of the U-Net as there are branches, or of one."""
        step = step_of(level)
        weights, contexts = zip(*conditions.positive.at(step), strict=True)
        [(_, unconditional), *_] = conditions.negative.at(step)
        conds = [Branch(context, conditions.beside) for context in contexts]
        active = request.guidance_start <= step / len(visited) < request.guidance_end
        scale = cfg_scale if active else 1.0
        uncond = Branch(unconditional, conditions.beside)
        if conditions.edits:
            blind = Branch(unconditional, unseen)  # to the picture that is to be edited
            result, plain = _edited(ask(x, level, [blind, uncond, *conds], step), weights, scale, request)
        elif scale == 1 and weights == (1.0,):
            return ask(x, level, conds, step)[0]
        else:
            first, *predictions = ask(x, level, [uncond, *conds], step)
            result, plain = (guide(first, predictions, weights, each) for each in (scale, 1.0))
        if active and request.guidance_rescale:
            result = rescale(result, plain, request.guidance_rescale, x, level, predictor.prediction_type)
        if active and request.dynamic_threshold is not None:
            result = threshold(result, plain, request.dynamic_threshold, x, level)
        return result

    return denoise


def _edited(
    predictions: Sequence[Prediction], weights: Sequence[float], scale: float, request: Request
) -> tuple[Prediction, Prediction]:
    """Guided by prompt and picture, and by neither. Raises RequestError for several prompts."""
    if len(weights) > 1:
        raise RequestError("a model that edits pictures takes one prompt: leave out AND")
    nothing, image, both = predictions
    return guide_edit(nothing, image, both, scale=scale * weights[0], image_scale=request.image_cfg_scale), both
