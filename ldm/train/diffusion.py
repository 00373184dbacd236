"""Training latent diffusion: from nothing, or the fine-tuning of a model in any of its ways.

Rombach et al. 2022, arXiv:2112.10752, equation 3. What differs between the ways is which parameters learn, and what
they are saved as: a table of `METHODS`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint import Model
from ldm.diffusion import NoiseSchedule
from ldm.diffusion.loss import diffusion_loss, min_snr_weights
from ldm.errors import RequestError
from ldm.images import grid, to_tensor
from ldm.pipeline import StableDiffusion
from ldm.train.cache import Cache, encode_captions
from ldm.train.config import TrainConfig
from ldm.train.data import Examples, fit, load_example
from ldm.train.feed import Batch
from ldm.train.masks import random_mask
from ldm.train.methods import METHODS
from ldm.train.networks import checkpoint_gradients
from ldm.train.sheets import captioned
from ldm.train.task import Task

log = logging.getLogger(__name__)

TOKENIZED = 100_000  # captions whose tokens are kept, so that one that is too long is told of once


class DiffusionTask(Task):
    """A U-Net, and whatever else learns with it. The VAE never does."""

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        examples: Examples,
        sizes: list[tuple[int, int]],
        device: torch.device,
        cache: Cache | None,
        own: int,
    ):
        """sizes: (width, height) that each example is cut to. cache: their latents, made before.

        own: how many are the run's own; the rest are of the prior.
        """
        super().__init__()
        self.config, self.examples, self.sizes, self.cache, self.own = config, examples, sizes, cache, own
        self.schedule = _schedule(config, model)
        if not 1 <= config.diffusion.clip_skip <= model.config.text.layers:
            raise RequestError(
                f"diffusion.clip_skip is {config.diffusion.clip_skip}: use 1 to {model.config.text.layers}, the text "
                "encoder's layers"
            )
        full = config.diffusion.method == "full"
        learns = {"unet": full, "vae": False, "text": full and config.diffusion.train_text}
        running = {}
        for name, whole in learns.items():  # what only runs needs no more than the precision it runs in
            dtype = torch.float32 if whole else getattr(torch, config.loop.precision)
            network = getattr(model, name)
            if full and dtype != torch.float32:
                network = copy.deepcopy(network)  # the original is written, as it was
            running[name] = network.to(device, dtype).train(name != "vae")
        self.model = replace(model, **running)
        self.method = METHODS[config.diffusion.method](config, model)
        self.learning = nn.ModuleDict(self.method.learning)
        if config.loop.gradient_checkpointing:
            checkpoint_gradients(model.unet)
        self.device = device
        if config.diffusion.method == "textual_inversion":
            _check_captions(model, examples, config.inversion.token)
        self.tokenize = lru_cache(TOKENIZED)(lambda caption: model.text.tokenize(caption)[0])
        self.states = None
        if cache is not None and not self.method.text_learns:
            captions = (examples.caption(number) for number in range(len(examples)))
            self.states = encode_captions(running["text"], ["", *captions], config.diffusion.clip_skip)

    def prepare(self, number: int, generator: torch.Generator) -> Batch:
        """noise, posterior_noise (c, h, w), t (), weight (), and what to see and to read.

        To see are moments (2·c, h, w) from the cache, or the image (3, height, width) in [-1, 1]. For inpainting the
        image in any case, and a mask (1, height, width), 1 where to paint. To read are a caption's tokens (n,), or
        from the cache context (n, width), its hidden states.
        """
        settings, model = self.config.diffusion, self.model
        latent_shape = self._latent_shape(number)
        chance = Random(torch.randint(2**62, (1,), generator=generator).item())
        batch: Batch = {
            "noise": torch.randn(latent_shape, generator=generator)
            + settings.offset_noise * torch.randn(latent_shape[0], 1, 1, generator=generator),
            "posterior_noise": torch.randn(latent_shape, generator=generator),
            "t": torch.randint(model.config.schedule.timesteps, (), generator=generator),
            "weight": torch.tensor(1.0 if number < self.own else self.config.prior.weight),
        }
        if self.cache is None or settings.inpaint:
            example = load_example(self.examples, number)
            image, caption = example.image, example.caption
            mirrored = self.config.data.flip and chance.random() < 0.5
            crop = chance if self.config.data.random_crop else None
            batch["image"] = to_tensor(fit(image, self.sizes[number], crop, mirrored))[0]
        else:
            caption = self.examples.caption(self.cache.sources[number])
        if self.cache is not None:
            batch["moments"] = self.cache[number]
        if settings.inpaint:
            batch["mask"] = random_mask(self.sizes[number], chance)
        dropped = torch.rand((), generator=generator) < settings.caption_dropout
        caption = "" if dropped else caption
        if self.states is not None:
            batch["context"] = self.states[caption]
        else:
            batch["tokens"] = self.tokenize(caption)
        return batch

    def _latent_shape(self, number: int) -> tuple[int, int, int]:
        vae, (width, height) = self.model.config.vae, self.sizes[number]
        return vae.latent_channels, height // vae.downsampling, width // vae.downsampling

    def forward(self, batch: Batch, step: int, turn: str) -> Mapping[str, Tensor]:
        """The weighted squared error of what the U-Net predicts."""
        model, t = self.model, batch["t"]
        latents = self._latents(batch)
        context = self._context(batch)
        beside = self._beside(batch)
        losses = diffusion_loss(
            lambda x, t: model.unet(torch.cat([x, *beside], dim=1), t, context).float(),
            latents, batch["noise"], t, self.schedule,
        )  # fmt: skip
        if self.config.diffusion.min_snr is not None:
            losses = losses * min_snr_weights(self.schedule, t, self.config.diffusion.min_snr)
        return {"loss": (losses * batch["weight"]).mean()}

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        """A draw of each picture's scaled latents, float32."""
        vae = self.model.vae
        if "moments" in batch:
            mean, deviation = batch["moments"].float().chunk(2, dim=1)
            latents = mean + deviation * batch["posterior_noise"]
        else:
            latents = vae.encode(batch["image"].to(vae.quant_conv.weight.dtype)).at(batch["posterior_noise"]).float()
        return vae.config.scale_factor * latents

    def _context(self, batch: Batch) -> Tensor:
        text = self.model.text
        if "context" in batch:
            return batch["context"].to(next(text.parameters()).dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method.text_learns):
            return text(batch["tokens"], self.config.diffusion.clip_skip)

    @torch.no_grad()
    def _beside(self, batch: Batch) -> list[Tensor]:
        """What an inpainting U-Net sees beside the latents: where it paints, and the scaled latents of the rest."""
        if "mask" not in batch:
            return []
        vae, mask = self.model.vae, batch["mask"]
        known = vae.encode((batch["image"] * (1 - mask)).to(vae.quant_conv.weight.dtype)).mode().float()
        return [F.max_pool2d(mask, vae.config.downsampling), vae.config.scale_factor * known]

    def save(self, target: Path, dtype: str) -> None:
        self.method.save(target, dtype)

    @torch.no_grad()
    def pictures(self) -> Image.Image | None:
        samples, model = self.config.samples, self.model
        if not samples.prompts:
            return None
        modes = {network: network.training for network in (model.unet, model.text)}
        for network in modes:
            network.eval()
        precision = next(model.vae.parameters()).dtype
        sd = StableDiffusion(model.unet, model.vae, model.text, model.config, "training", self.device, precision)
        drawn = [sd.generate(self.config.request(prompt, samples.seed))[0] for prompt in samples.prompts]
        for network, mode in modes.items():
            network.train(mode)
        return grid([captioned(picture, prompt) for picture, prompt in zip(drawn, samples.prompts, strict=True)])


def _schedule(config: TrainConfig, model: Model) -> NoiseSchedule:
    """Raises RequestError for what no schedule can be, and for a loss that would leave its end out."""
    try:
        schedule = NoiseSchedule(model.config.schedule)
    except ValueError as error:
        raise RequestError(str(error)) from error
    if schedule.config.zero_terminal_snr and config.diffusion.min_snr is not None:
        raise RequestError(
            "diffusion.min_snr gives steps without signal no weight, and zero_terminal_snr is about them"
        )
    return schedule


def _check_captions(model: Model, examples: Examples, token: str) -> None:
    """Raises RequestError where no caption has the new word, which then would not learn."""
    known = model.config.text.vocab_size
    using = sum((model.text.tokenize(examples.caption(i)) >= known).any().item() for i in range(len(examples)))
    if not using:
        raise RequestError(f"no caption has the new word {token!r}, so that it would learn nothing: put it into them")
    if using < len(examples):
        log.warning("%d of %d captions have the new word %r", using, len(examples), token)
