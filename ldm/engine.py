"""From a request and what it starts from to latents: the run of a sampler, or two."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from ldm.canvas import Fitted
from ldm.codec import Codec
from ldm.conditioning import encode_prompt
from ldm.config import ModelConfig
from ldm.diffusion import Increment, NoiseSchedule, Step, samplers
from ldm.diffusion.inpainting import keep_known
from ldm.editing import latent_mask
from ldm.images import to_tensor
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.prompt import split_loras
from ldm.request import Request
from ldm.runtime.noise import brownian_noise, seeded_noise
from ldm.sampling import Conditions, Predictor, guided
from ldm.trajectory import second_pass, trajectory, whole_grid

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Engine:
    """The networks at work. Requests have a size, a seed and a guidance scale; latents are scaled, float32."""

    unet: UNet
    text: TextEncoder
    codec: Codec
    config: ModelConfig
    device: torch.device
    apart: bool = False  # whether guidance takes an evaluation for each prompt, which takes less memory
    may_offload: bool = False  # whether the U-Net may leave a GPU that is full

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule(self.config.schedule)

    def walk(self, request: Request, fitted: Fitted) -> Generator[Step, None, Tensor]:
        """The steps of both passes, or of the one there is; answers with the latents at the end."""
        latents = None if fitted.picture is None else self.codec.encode(to_tensor(fitted.picture), request.tiling)
        latents = yield from self._pass(request, fitted, latents if request.strength is not None else None)
        if request.hires_scale > 1:
            second = second_pass(request)
            assert second.width is not None and second.height is not None
            larger = Fitted(fitted.picture and fitted.picture.resize((second.width, second.height)))
            latents = yield from self._pass(
                second, larger, self._enlarge(latents, second), done=len(whole_grid(request, self.schedule)) - 1
            )
        return latents

    def _enlarge(self, latents: Tensor, request: Request) -> Tensor:
        """Latents at the size of a request: interpolated, or encoded from enlarged pictures."""
        assert request.width is not None and request.height is not None
        if request.hires_upscaler == "latent":
            size = self._latent_shape(request.width, request.height)[1:]
            return torch.nn.functional.interpolate(latents, size, mode="bilinear")
        pictures = (
            picture.resize((request.width, request.height), Image.Resampling.LANCZOS)
            for picture in self.codec.decode(latents, request.tiling)
        )
        return torch.cat([self.codec.encode(to_tensor(picture), request.tiling) for picture in pictures])

    def _pass(
        self, request: Request, fitted: Fitted, latents: Tensor | None, done: int = 0
    ) -> Generator[Step, None, Tensor]:
        """One run of the sampler, from noise or from clean latents (1 or b, 4, h, w), after `done` steps of another."""
        assert request.width is not None and request.height is not None
        start, levels = trajectory(request, self.schedule)
        noise = seeded_noise(
            request.seeds(), self._latent_shape(request.width, request.height), self.device, source=request.noise,
            variation_seeds=request.variation_seeds(), variation_strength=request.variation_strength,
            seed_shape=self._latent_shape(request.seed_width or request.width, request.seed_height or request.height),
        )  # fmt: skip
        x = noise()
        mask = None if fitted.mask is None else latent_mask(fitted.mask, (x.shape[-2], x.shape[-1])).to(self.device)
        if latents is None:
            x = samplers.start(request.sampler, x, levels[0])
        else:
            _tell_steps(request, len(levels) - 1)
            filled = latents = latents.expand_as(x)
            if mask is not None and request.fill == "noise" and len(levels) > 1:
                filled = latents + mask * (noise() - latents)
            x = start.add_noise(filled, x) if len(levels) > 1 else latents
        predictor = Predictor(
            self.unet, self.config.schedule.prediction_type, levels, request.tiling,
            deep_cache=request.deep_cache, token_merging=request.token_merging,
        )  # fmt: skip
        conditions = self._conditions(request, fitted, mask, done)
        denoise = guided(predictor, conditions, request, levels, self.apart, self.may_offload)
        if mask is not None and latents is not None and not self.config.inpaints:
            denoise = keep_known(denoise, latents, mask)
        increment = self._brownian(request) if request.brownian else None
        steps = samplers.run(request.sampler, denoise, x, levels, noise, self.schedule, request.eta, increment)
        for step in steps:
            if step.level is levels[-1] and mask is not None and latents is not None:
                step = replace(step, x=latents + mask * (step.x - latents))  # some end before the clean image
            yield step
            x = step.x
        return x

    def _brownian(self, request: Request) -> Increment:
        """Over the levels of a whole run, as AUTOMATIC1111 has it, wherever an image starts."""
        assert request.width is not None and request.height is not None
        levels = whole_grid(request, self.schedule)
        ratios = [min(level.ratio, self.schedule.ratios[-1]) for level in levels if level.ratio]
        shape = self._latent_shape(request.width, request.height)
        return brownian_noise(request.seeds(), shape, self.device, min(ratios), max(ratios))

    def _conditions(self, request: Request, fitted: Fitted, mask: Tensor | None, done: int) -> Conditions:
        """What to draw, and what not, over the steps, and what is beside it."""
        steps = len(whole_grid(request, self.schedule)) - 1
        positive, negative = (
            encode_prompt(
                self.text, split_loras(prompt)[0], steps, clip_skip=request.clip_skip,
                emphasis=request.emphasis, negative=negative, done=done,
            )
            for prompt, negative in ((request.prompt, False), (request.negative_prompt, True))
        )  # fmt: skip
        return Conditions(positive, negative, self._beside(request, fitted, mask), self.config.edits)

    def _beside(self, request: Request, fitted: Fitted, mask: Tensor | None) -> Tensor | None:
        """What the U-Net sees beside the latents; an inpainting model's: 1 where it paints, and the rest."""
        assert request.width is not None and request.height is not None
        if self.config.edits:
            assert fitted.picture is not None
            return self.codec.encode(to_tensor(fitted.picture), request.tiling) / self.config.vae.scale_factor
        if not self.config.inpaints:
            return None
        pixels = torch.zeros(1, 3, request.height, request.width)  # grey all over where there is no image
        painted = torch.ones(1, 1, request.height, request.width)
        if fitted.picture is not None:
            pixels = to_tensor(fitted.picture)
            if fitted.mask is not None:
                painted = (latent_mask(fitted.mask, (request.height, request.width)) >= 0.5).float()
        side = self.config.vae.downsampling
        known = self.codec.encode(pixels * (1 - painted), request.tiling)
        return torch.cat([torch.nn.functional.max_pool2d(painted, side).to(self.device), known], dim=1)

    def _latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        side = self.config.vae.downsampling
        return self.config.vae.latent_channels, height // side, width // side


def _tell_steps(request: Request, run: int) -> None:
    """How many steps there truly are on an initial image, where they are not those asked for."""
    if run == 0:
        log.warning("strength %s of %d steps is less than one: none is run", request.strength, request.steps)
    elif run != request.steps:
        log.info("running %d of %d steps, at strength %s", run, request.steps, request.strength)
