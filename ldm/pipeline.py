"""Stable Diffusion as one object: a prompt goes in, pictures come out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.adapters.folders import find_loras
from ldm.adapters.handle import Handle
from ldm.adapters.lora import read_lora
from ldm.adapters.merge import Adapters, Dose
from ldm.adapters.textual_inversion import Embeddings, read_embedding
from ldm.checkpoint import load_model
from ldm.checkpoint.sources import Choices
from ldm.config import ModelConfig
from ldm.diffusion import Denoise, Level, NoiseSchedule, Step, samplers
from ldm.diffusion.guidance import guide_batched, guide_split
from ldm.diffusion.prediction import denoiser
from ldm.errors import CheckpointError, NumericalError, RequestError
from ldm.images import load_image, to_image, to_tensor
from ldm.models.text import TextEncoder
from ldm.models.unet import KeyValue, UNet
from ldm.models.vae import VAE
from ldm.prompt import split_loras
from ldm.request import DEFAULT_STRENGTH, SIZE_MULTIPLE, Request
from ldm.runtime.device import pick_device, pick_dtype
from ldm.runtime.memory import first_that_fits
from ldm.runtime.noise import seeded_noise

log = logging.getLogger(__name__)


def shipped_model() -> Path:
    """The model in `weights/`: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parent
    for path in (package / "weights" / "shapes", package.parent / "weights" / "shapes"):
        if path.is_dir():
            return path
    raise CheckpointError("this installation carries no model; give the path of one")


@dataclass(frozen=True)
class StableDiffusion:
    """A model, ready to use. Networks hold weights and take tensors in `dtype`; latents between them are float32."""

    unet: UNet = field(repr=False)
    vae: VAE = field(repr=False)
    text: TextEncoder = field(repr=False)
    config: ModelConfig
    name: str
    device: torch.device
    dtype: torch.dtype
    lora_folders: tuple[Path, ...] = ()  # where the LoRAs are that prompts name

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        ema: bool = False,
        prediction_type: str | None = None,
        zero_terminal_snr: bool | None = None,
        allow_nonfinite: bool = False,
        config: ModelConfig | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        lora_folders: str | Path | Sequence[str | Path] = (),
    ) -> StableDiffusion:
        """From a single file or a diffusers folder; the shipped model where no path is given.

        vae, text_encoder: a file or folder whose network to use instead of the model's own.
        ema: take the EMA weights of the U-Net. prediction_type: epsilon or v_prediction, and zero_terminal_snr: whether
        to rescale the noise schedule so that it ends at pure noise; None leaves both to what the file tells.
        allow_nonfinite: load weights that are NaN or infinite. config: overrides all that the file tells (single files
        do not tell the number of heads). device: auto, cpu, cuda, cuda:N, mps. dtype: auto, float32, float16, bfloat16.
        lora_folders: where to look for the LoRAs that prompts name. Raises CheckpointError and RequestError.
        """
        choices = Choices(vae, text_encoder, ema, prediction_type, zero_terminal_snr)
        where = pick_device(device)
        precision = pick_dtype(dtype, where)
        if (where.type, precision) == ("cpu", torch.float16):
            log.warning("float16 is slow on CPUs: bfloat16 or float32 is faster")
        path = Path(path) if path is not None else shipped_model()
        model = load_model(path, config, choices, device=where, dtype=precision, allow_nonfinite=allow_nonfinite)
        name = path.resolve().name if path.is_dir() else path.stem
        folders = [lora_folders] if isinstance(lora_folders, str | Path) else lora_folders
        return cls(model.unet, model.vae, model.text, model.config, name, where, precision, tuple(map(Path, folders)))

    def txt2img(self, prompt: str, **fields: Any) -> list[Image.Image]:
        """Pictures of a prompt; `fields` are those of Request. Raises RequestError, NumericalError."""
        return self.generate(Request(prompt=prompt, **fields))

    def img2img(
        self, prompt: str, image: str | Path | Image.Image, strength: float = DEFAULT_STRENGTH, **fields: Any
    ) -> list[Image.Image]:
        """Pictures that start from `image`; `strength` is how much of it to replace, 0 to 1.

        As in the reference, int(strength · steps) steps are run. Raises RequestError, ImageError, NumericalError.
        """
        return self.generate(Request(prompt=prompt, strength=strength, **fields), image)

    def generate(
        self, request: Request, image: str | Path | Image.Image | None = None, progress: bool = False
    ) -> list[Image.Image]:
        """The pictures of a request, from an initial image if it has a strength; `progress` draws a bar on stderr."""
        with self.adapters.prompted(self._doses(request)):
            latents, levels, steps = self._sampling(request, image)
            for step in tqdm(steps, total=len(levels) - 1, unit="step", disable=not progress):
                latents = step.x
        return self.decode(latents)

    def stream(self, request: Request, image: str | Path | Image.Image | None = None) -> Iterator[Step]:
        """The steps of a request as they are made; `step.x` and `step.x0` are latents for `decode`.

        LoRAs that the prompt names are in the weights from the first step to the last, or until the iterator is closed.
        """
        picture = None if image is None else load_image(image)
        self.resolve(request, picture)  # its faults are found here, not at the first step

        def steps(doses: list[Dose]) -> Iterator[Step]:
            with self.adapters.prompted(doses):
                yield from self._sampling(request, picture)[2]

        return steps(self._doses(request))

    def load_lora(
        self,
        path: str | Path,
        strength: float = 1.0,
        *,
        text_strength: float | None = None,
        name: str | None = None,
        allow_nonfinite: bool = False,
    ) -> Handle:
        """Merge a LoRA, or one of its relatives, into the weights, until the handle removes it or its `with` ends.

        text_strength: that in the text encoder, `strength` where not given. name: what prompts call it, the file's
        stem where not given. Raises CheckpointError, and RequestError for a strength that is not finite.
        """
        lora = read_lora(path, self.unet, self.text, name=name, allow_nonfinite=allow_nonfinite)
        return self.adapters.add(Dose(lora, strength, strength if text_strength is None else text_strength))

    def load_embedding(self, path: str | Path, token: str | None = None, *, allow_nonfinite: bool = False) -> Handle:
        """Let a word of prompts stand for an embedding, until the handle removes it or its `with` ends.

        token: the word; the file's stem where not given, and the token it is saved under. Raises CheckpointError, and
        RequestError for a word that is taken.
        """
        return self.embeddings.add(read_embedding(path, self.text, token, allow_nonfinite=allow_nonfinite))

    @cached_property
    def adapters(self) -> Adapters:
        """The LoRAs in the weights. Of objects that share networks, only one may load any."""
        return Adapters(self.unet, self.text)

    @cached_property
    def embeddings(self) -> Embeddings:
        return Embeddings(self.text)

    def _doses(self, request: Request) -> list[Dose]:
        """The LoRAs that a request's prompt names. Raises RequestError and CheckpointError, before anything slow."""
        tags = split_loras(request.prompt)[1]
        if ignored := split_loras(request.negative_prompt)[1]:
            log.warning("a negative prompt takes no LoRAs: %s ignored", ", ".join(tag.name for tag in ignored))
        files = find_loras((tag.name for tag in tags), self.lora_folders, self.adapters.loaded)
        loras = self.adapters.loaded | {name: read_lora(path, self.unet, self.text) for name, path in files.items()}
        return [Dose(loras[tag.name], tag.unet, tag.text) for tag in tags]

    def resolve(self, request: Request, image: Image.Image | None = None) -> Request:
        """The request with a size and a seed. Raises RequestError for what this model cannot do.

        A side that is not given is the model's, or the initial image's; given the other, it keeps the image's shape.
        """
        if (image is None) != (request.strength is None):
            raise RequestError("strength and an initial image go together: give both or neither")
        if request.steps > self.config.schedule.timesteps:
            raise RequestError(f"steps is {request.steps}: this model has {self.config.schedule.timesteps} at most")
        if self.config.unet.in_channels != self.config.vae.latent_channels:
            raise RequestError(
                f"{self.name} takes {self.config.unet.in_channels} channels, for inpainting or editing: "
                f"use a model that takes {self.config.vae.latent_channels}"
            )
        width, height = (self.config.image_size,) * 2 if image is None else image.size
        if image is not None and (request.width is None) != (request.height is None):
            scale = (request.width or 0) / width + (request.height or 0) / height
            width, height = round(width * scale), round(height * scale)
        if min(width, height) < SIZE_MULTIPLE:
            raise RequestError(
                f"the image would have {width}×{height} pixels: use one of {SIZE_MULTIPLE} or more a side"
            )
        return replace(
            request,
            seed=request.seeds()[0],
            width=request.width or width - width % SIZE_MULTIPLE,
            height=request.height or height - height % SIZE_MULTIPLE,
        )

    def grid_length(self, request: Request) -> int:
        """How many steps a whole run of the request's sampler has, which may be more than were asked for."""
        return len(samplers.levels(request.sampler, self.schedule, request.steps)) - 1

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

    def _sampling(
        self, request: Request, source: str | Path | Image.Image | None
    ) -> tuple[Tensor, list[Level], Iterator[Step]]:
        """Where a request starts, the levels it goes through, and its steps."""
        image = None if source is None else load_image(source)
        request = self.resolve(request, image)
        assert request.width is not None and request.height is not None
        if request.width * request.height > 4 * self.config.image_size**2:
            log.warning(
                "%d×%d pixels are many for a model trained at %d×%d: a smaller width or height is faster",
                *(request.width, request.height, self.config.image_size, self.config.image_size),
            )
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
            else:
                log.warning("strength %s of %d steps is less than one: none is run", request.strength, request.steps)
        steps = samplers.run(request.sampler, self._denoiser(request, levels), x, levels, noise, request.eta)
        return x, levels, self._of_one_model(steps, self.adapters.active)

    def _of_one_model(self, steps: Iterator[Step], loras: tuple[Dose, ...]) -> Iterator[Step]:
        """The steps, as long as the weights are those that the prompt was encoded with. Raises RequestError."""
        while True:
            if self.adapters.active != loras:
                raise RequestError("the LoRAs changed while a picture was being made: finish or close it first")
            if (step := next(steps, None)) is None:
                return
            yield step

    def _denoiser(self, request: Request, levels: list[Level]) -> Denoise:
        """The guided U-Net, with all that is constant over the steps computed here."""
        with torch.no_grad():
            times = [level.t for level in levels]
            shifts = self.unet.embed_time(torch.tensor(times, device=self.device))
            shifts_at = dict(zip(times, zip(*(shift.split(1) for shift in shifts), strict=True), strict=True))
            context = self.text.encode([split_loras(text)[0] for text in (request.negative_prompt, request.prompt)])
            uncond, cond = zip(
                *(_halves(kv, request.batch_size) for kv in self.unet.embed_context(context)), strict=True
            )

        def network(keys_values: Sequence[KeyValue]) -> Denoise:
            @torch.no_grad()
            def predict(x: Tensor, level: Level) -> Tensor:
                return self.unet.predict(x.to(self.dtype), shifts_at[level.t], keys_values).float()

            return denoiser(predict, self.config.schedule.prediction_type)

        if request.cfg_scale == 1:
            if request.negative_prompt:
                log.warning("the negative prompt has no effect at cfg_scale 1")
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
        mode = self._run_vae(lambda vae, pixels: vae.encode(pixels).mode(), to_tensor(image).to(self.device))
        return mode * self.config.vae.scale_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Scaled latents (b, 4, h, w) → pictures, one at a time to save memory. Raises NumericalError."""
        if not latents.isfinite().all():
            if self.dtype == torch.float32:
                raise NumericalError("the sampler diverged: lower cfg_scale or use more steps")
            raise NumericalError(f"the U-Net overflowed in {self.dtype}: use dtype float32")
        return [
            to_image(self._run_vae(lambda vae, z: vae.decode(z), z[None])[0])
            for z in latents / self.config.vae.scale_factor
        ]

    def _run_vae(self, run: Callable[[VAE, Tensor], Tensor], x: Tensor) -> Tensor:
        """A part of the VAE in `dtype`, or in float32 where that overflows; float32 in and out."""
        result = run(self.vae, x.to(self.dtype))
        if not result.isfinite().all():
            result = run(self._exact_vae, x)
        if not result.isfinite().all():
            raise NumericalError("the VAE overflows in float32: its weights are damaged")
        return result.float()

    @cached_property
    def _exact_vae(self) -> VAE:
        log.warning("the VAE overflows in %s: running it in float32", self.dtype)
        return copy.deepcopy(self.vae).float()


def _halves(key_value: KeyValue, batch_size: int) -> tuple[KeyValue, KeyValue]:
    """Keys and values of two prompts → those of the first, and of the second, each for a whole batch."""
    k, v = (t.unsqueeze(1).expand(-1, batch_size, -1, -1, -1) for t in key_value)
    return (k[0], v[0]), (k[1], v[1])
