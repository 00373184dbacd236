"""Stable Diffusion as one object: a prompt goes in, pictures come out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint import load_model
from ldm.config import ModelConfig
from ldm.diffusion import Denoise, Level, NoiseSchedule, Step, samplers
from ldm.diffusion.guidance import guide_batched, guide_split
from ldm.diffusion.prediction import denoiser
from ldm.errors import CheckpointError, NumericalError, RequestError
from ldm.images import load_image, to_image, to_tensor
from ldm.models.text import TextEncoder
from ldm.models.unet import KeyValue, UNet
from ldm.models.vae import VAE
from ldm.request import SIZE_MULTIPLE, Request
from ldm.runtime.device import pick_device, pick_dtype
from ldm.runtime.memory import first_that_fits
from ldm.runtime.noise import seeded_noise

log = logging.getLogger(__name__)

DEFAULT_STRENGTH = 0.75


def shipped_model() -> Path:
    """The model in `weights/`: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parent
    for path in (package / "weights" / "shapes", package.parent / "weights" / "shapes"):
        if path.is_dir():
            return path
    raise CheckpointError("this installation carries no model; give the path of one")


@dataclass(frozen=True)
class StableDiffusion:
    """A model, ready to use. Networks run in `dtype`; latents and sampler arithmetic are float32."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    config: ModelConfig
    name: str
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        config: ModelConfig | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> StableDiffusion:
        """From a single file or a diffusers folder; the shipped model where no path is given.

        device: auto, cpu, cuda, cuda:N, mps. dtype: auto, float32, float16, bfloat16. `config` overrides what the
        file tells (single files do not tell the number of heads). Raises CheckpointError and RequestError.
        """
        where = pick_device(device)
        precision = pick_dtype(dtype, where)
        path = Path(path) if path is not None else shipped_model()
        model = load_model(path, config, device=where, dtype=precision)
        return cls(model.unet, model.vae, model.text, model.config, path.stem, where, precision)

    def txt2img(self, prompt: str, **fields: Any) -> list[Image.Image]:
        """Pictures of a prompt; `fields` are those of Request. Raises RequestError, NumericalError."""
        return self.generate(Request(prompt=prompt, **fields))

    def img2img(
        self, prompt: str, image: str | Path | Image.Image, strength: float = DEFAULT_STRENGTH, **fields: Any
    ) -> list[Image.Image]:
        """Pictures that start from `image`; `strength` is how much of it to replace, 0 to 1.

        As in the reference, int(strength · steps) steps are run. Raises RequestError, ImageError, NumericalError.
        """
        return self.generate(Request(prompt=prompt, strength=strength, **fields), load_image(image))

    def generate(self, request: Request, image: Image.Image | None = None, progress: bool = False) -> list[Image.Image]:
        """The pictures of a request, from an initial image if it has a strength; `progress` draws a bar on stderr."""
        request = self.resolve(request, image)
        latents, levels, steps = self._sampling(request, image)
        for step in tqdm(steps, total=len(levels) - 1, unit="step", disable=not progress):
            latents = step.x
        return self.decode(latents)

    def stream(self, request: Request, image: Image.Image | None = None) -> Iterator[Step]:
        """The steps of a request as they are made; `step.x` and `step.x0` are latents for `decode`."""
        _, _, steps = self._sampling(self.resolve(request, image), image)
        yield from steps

    def resolve(self, request: Request, image: Image.Image | None = None) -> Request:
        """The request with nothing left open: with a size and a seed. Raises RequestError."""
        if (image is None) != (request.strength is None):
            raise RequestError("strength and an initial image go together: give both or neither")
        if self.config.unet.in_channels != self.config.vae.latent_channels:
            raise RequestError(
                f"{self.name} takes {self.config.unet.in_channels} channels, for inpainting or editing: "
                f"use a model that takes {self.config.vae.latent_channels}"
            )
        native = (self.config.image_size,) * 2 if image is None else image.size
        width, height = (size - size % SIZE_MULTIPLE for size in native)
        return replace(request, seed=request.seeds()[0], width=request.width or width, height=request.height or height)

    def levels(self, request: Request) -> list[Level]:
        """The noise levels a request goes through, the one it ends at included: one more than the steps it runs."""
        return self._trajectory(request)[1]

    def _trajectory(self, request: Request) -> tuple[Level, list[Level]]:
        """The level to noise an initial image to, and the levels to denoise through.

        The reference runs the last int(strength · steps) steps, from an image noised to the level before the first
        of them (where there is one).
        """
        levels = samplers.levels(request.sampler, self.schedule, request.steps)
        if request.strength is None:
            return levels[0], levels
        first = max(len(levels) - 1 - int(request.strength * request.steps), 0)
        return levels[max(first - 1, 0)], levels[first:]

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule(self.config.schedule)

    def _sampling(self, request: Request, image: Image.Image | None) -> tuple[Tensor, list[Level], Iterator[Step]]:
        """Where a resolved request starts, the levels it goes through, and its steps."""
        assert request.width is not None and request.height is not None  # resolved
        start, levels = self._trajectory(request)
        side = self.config.vae.downsampling
        shape = (self.config.vae.latent_channels, request.height // side, request.width // side)
        noise = seeded_noise(request.seeds(), shape, self.device)
        if image is None:
            x = noise()
        else:
            x = self.encode(image.resize((request.width, request.height), Image.Resampling.LANCZOS))
            x = x.expand(request.batch_size, -1, -1, -1)
            if len(levels) > 1:
                x = start.add_noise(x, noise())
        return x, levels, samplers.run(request.sampler, self._denoiser(request, levels), x, levels, noise, request.eta)

    def _denoiser(self, request: Request, levels: list[Level]) -> Denoise:
        """The guided U-Net, with all that is constant over the steps computed here."""
        with torch.no_grad():
            times = [level.t for level in levels]
            shifts = self.unet.embed_time(torch.tensor(times, device=self.device))
            shifts_at = dict(zip(times, zip(*(shift.split(1) for shift in shifts), strict=True), strict=True))
            context = self.text.encode([request.negative_prompt, request.prompt])
            uncond, cond = zip(
                *(_halves(kv, request.batch_size) for kv in self.unet.embed_context(context)), strict=True
            )

        def network(keys_values: Sequence[KeyValue]) -> Denoise:
            @torch.no_grad()
            def predict(x: Tensor, level: Level) -> Tensor:
                return self.unet.predict(x.to(self.dtype), shifts_at[level.t], keys_values).float()

            return denoiser(predict, self.config.schedule.prediction_type)

        if request.cfg_scale == 1:
            return network(cond)
        both = [(torch.cat([k, k_]), torch.cat([v, v_])) for (k, v), (k_, v_) in zip(uncond, cond, strict=True)]
        return first_that_fits(
            {
                "guidance in one evaluation": guide_batched(network(both), request.cfg_scale),
                "guidance in two": guide_split(network(uncond), network(cond), request.cfg_scale),
            }
        )

    @torch.no_grad()
    def encode(self, image: Image.Image) -> Tensor:
        """RGB image, sides a multiple of 8 → the mode of its scaled latents (1, 4, height/8, width/8), float32."""
        pixels = to_tensor(image).to(self.device, self.dtype)
        return self.vae.encode(pixels).mode().float() * self.config.vae.scale_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Scaled latents (b, 4, h, w) → pictures, one at a time to save memory. Raises NumericalError."""
        if not latents.isfinite().all():
            raise NumericalError(f"the U-Net overflowed in {self._precision}: use dtype float32")
        return [to_image(self._decode_one(z)) for z in latents / self.config.vae.scale_factor]

    def _decode_one(self, z: Tensor) -> Tensor:
        """Unscaled latent (4, h, w) → image (3, 8·h, 8·w); repeated in float32 where half precision overflows."""
        image = self.vae.decode(z[None].to(self.dtype))[0]
        if not image.isfinite().all():
            log.warning("the VAE overflowed in %s: decoding again in float32", self._precision)
            image = copy.deepcopy(self.vae).float().decode(z[None])[0]
        if not image.isfinite().all():
            raise NumericalError("the VAE overflows in float32 too: its weights are damaged")
        return image

    @property
    def _precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def _halves(key_value: KeyValue, batch_size: int) -> tuple[KeyValue, KeyValue]:
    """Keys and values of two prompts → those of the first, and of the second, each for a whole batch."""
    k, v = (t.unsqueeze(1).expand(-1, batch_size, -1, -1, -1) for t in key_value)
    return (k[0], v[0]), (k[1], v[1])
