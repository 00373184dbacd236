"""Stable Diffusion as one object: a prompt goes in, pictures come out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
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
from ldm.canvas import Fitted, Source, multiples, open_canvas, proportioned
from ldm.checkpoint import load_model
from ldm.checkpoint.sources import Choices
from ldm.codec import Codec
from ldm.config import ModelConfig
from ldm.diffusion import Level, NoiseSchedule, Step
from ldm.engine import Engine
from ldm.errors import CheckpointError, RequestError
from ldm.images import to_image, to_tensor
from ldm.models.taesd import TAESD
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.preview import Preview, find_preview, load_taesd
from ldm.prompt import split_loras
from ldm.request import DEFAULT_STRENGTH, SIZE_MULTIPLE, Request
from ldm.runtime.device import pick_device, pick_dtype
from ldm.runtime.memory import parse_memory
from ldm.runtime.plan import Job, Plan
from ldm.trajectory import second_pass, trajectory, whole_grid

log = logging.getLogger(__name__)

OF_A_MASK = ("mask_blur", "fill", "only_masked", "mask_padding")
OF_HIRES = ("hires_steps", "hires_strength", "hires_upscaler")


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
    latent_preview: Preview | None = field(default=None, repr=False)
    taesd: TAESD | None = field(default=None, repr=False)  # decodes previews, where there is one,
    taesd_finals: bool = False  # and the pictures themselves
    plan: Plan | None = field(default=None, repr=False)  # by which the networks are in memory
    may_offload: bool = field(default=False, repr=False)  # the U-Net from a GPU that is full: not while it is learning

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
        taesd: str | Path | None = None,
        taesd_finals: bool = False,
        memory: str | int | None = None,
        int8: bool = False,
        largest: Request | None = None,
    ) -> StableDiffusion:
        """From a single file or a diffusers folder; the shipped model where no path is given.

        vae, text_encoder: a file or folder whose network to use instead of the model's own.
        ema: take the EMA weights of the U-Net. prediction_type: epsilon, v_prediction or sample (x0), and
        zero_terminal_snr: whether to rescale the noise schedule so that it ends at pure noise; None leaves both to what
        the file tells.
        allow_nonfinite: load weights that are NaN or infinite. config: overrides all that the file tells (single files
        do not tell the number of heads). device: auto, cpu, cuda, cuda:N, mps. dtype: auto, float32, float16, bfloat16.
        lora_folders: where to look for the LoRAs that prompts name. taesd: a file of TAESD's decoder, for previews;
        taesd_finals: and for the pictures themselves, in a fraction of the VAE's time, less exactly. memory: what this
        process, or its part on a GPU, may take, as bytes or such as "4G"; what is free by default. int8: keep the
        U-Net's weights in eight bits, which takes less memory and is a little off. largest: the request that memory has
        to be enough for, without LoRAs; one picture of the model's size by default. Raises CheckpointError and
        RequestError.
        """
        if taesd_finals and taesd is None:
            raise RequestError("taesd_finals needs taesd: give the file of its decoder")
        choices = Choices(vae, text_encoder, ema, prediction_type, zero_terminal_snr)
        where = pick_device(device)
        precision = pick_dtype(dtype, where)
        if (where.type, precision) == ("cpu", torch.float16):
            log.warning("float16 is slow on CPUs: bfloat16 or float32 is faster")
        path = Path(path) if path is not None else shipped_model()
        most = largest or Request("")
        job = Job(
            parse_memory(memory) if isinstance(memory, str) else memory,
            most.width, most.height, most.batch_size, most.hires_scale, int8,
        )  # fmt: skip
        model = load_model(
            path, config, choices, device=where, dtype=precision, allow_nonfinite=allow_nonfinite, job=job
        )
        name = path.resolve().name if path.is_dir() else path.stem
        folders = [lora_folders] if isinstance(lora_folders, str | Path) else lora_folders
        small = None if taesd is None else load_taesd(taesd).to(where)
        return cls(
            model.unet, model.vae, model.text, model.config, name, where, precision, tuple(map(Path, folders)),
            find_preview(path, model.config.vae), small, taesd_finals, model.plan, may_offload=True,
        )  # fmt: skip

    def txt2img(self, prompt: str, **fields: Any) -> list[Image.Image]:
        """Pictures of a prompt; `fields` are those of Request. Raises RequestError, NumericalError."""
        return self.generate(Request(prompt=prompt, **fields))

    def img2img(
        self, prompt: str, image: Source, strength: float = DEFAULT_STRENGTH, **fields: Any
    ) -> list[Image.Image]:
        """Pictures that start from `image`; `strength` is how much of it to replace, 0 to 1.

        As in the reference, int(strength · steps) steps are run; all of them with exact_steps. Raises RequestError,
        ImageError, NumericalError.
        """
        return self.generate(Request(prompt=prompt, strength=strength, **fields), image)

    def inpaint(
        self, prompt: str, image: Source, mask: Source | None = None, strength: float = 1.0, **fields: Any
    ) -> list[Image.Image]:
        """Pictures that differ from `image` where `mask` is white, and in what outpainting adds.

        Pixels that are black in the mask after it is softened by mask_blur are those of the image, bit for bit. Raises
        RequestError, ImageError, NumericalError.
        """
        return self.generate(Request(prompt=prompt, strength=strength, **fields), image, mask)

    def generate(
        self,
        request: Request,
        image: Source | None = None,
        mask: Source | None = None,
        *,
        progress: bool = False,
        watch: Callable[[Step], object] | None = None,
    ) -> list[Image.Image]:
        """The pictures of a request, from an initial image if it has a strength.

        progress: draw a bar on stderr. watch: is called with each step. Raises RequestError, ImageError,
        NumericalError.
        """
        request, fitted = self._prepare(request, image, mask)
        self._warn(request, fitted)
        with self.adapters.prompted(self._doses(request)):
            walk = self._walk(request, fitted)
            with tqdm(total=self.steps_to_run(request), unit="step", disable=not progress) as bar:
                while True:
                    try:
                        step = next(walk)
                    except StopIteration as stop:
                        latents = stop.value
                        break
                    bar.update()
                    if watch is not None:
                        watch(step)
        return [fitted.finish(picture) for picture in self.decode(latents, request.tiling)]

    def stream(self, request: Request, image: Source | None = None, mask: Source | None = None) -> Iterator[Step]:
        """The steps of a request as they are made; `step.x` and `step.x0` are latents for `decode` and `preview`.

        LoRAs that the prompt names are in the weights from the first step to the last, or until the iterator is closed.
        """
        request, fitted = self._prepare(request, image, mask)  # its faults are found here, not at the first step
        self._warn(request, fitted)

        def steps(doses: list[Dose]) -> Iterator[Step]:
            with self.adapters.prompted(doses):
                yield from self._walk(request, fitted)

        return steps(self._doses(request))

    def preview(self, step: Step) -> Image.Image:
        """What the first image of a batch will be, as far as a step tells; of full size where TAESD decodes."""
        if self.taesd is not None:
            with torch.no_grad():
                return to_image(self.taesd(step.x0[:1])[0])
        if self.latent_preview is None:
            raise RequestError(
                f"{self.name}: how its latents look is not known: load it with taesd, or fit a preview.json"
            )
        return self.latent_preview.project(step.x0[0])

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

    def complete(self, request: Request, image: Source | None = None, mask: Source | None = None) -> Request:
        """The request with all that the model chooses, as `generate` makes it of the same arguments. Raises as that."""
        return self._prepare(request, image, mask)[0]

    def resolve(self, request: Request, image: Image.Image | None = None) -> Request:
        """The request with a size, a seed and a guidance scale. Raises RequestError for what this model cannot do.

        What is not given is the model's; a side the initial image's where there is one, whose shape it keeps where the
        other is given.
        """
        if self.config.edits and image is None:
            raise RequestError(f"{self.name} edits pictures: give an initial image")
        if (image is None) != (request.strength is None) and not self.config.edits:
            raise RequestError("strength and an initial image go together: give both or neither")
        if request.steps > self.config.schedule.timesteps:
            raise RequestError(f"steps is {request.steps}: this model has {self.config.schedule.timesteps} at most")
        plain = self.config.unet.in_channels == self.config.vae.latent_channels
        if not (plain or self.config.inpaints or self.config.edits):
            raise RequestError(
                f"{self.name} takes {self.config.unet.in_channels} channels, which no kind of model does that is known"
            )
        width, height = (self.config.image_size,) * 2 if image is None else proportioned(request, image.size)
        if min(width, height) < SIZE_MULTIPLE:
            raise RequestError(
                f"the image would have {width}×{height} pixels: use one of {SIZE_MULTIPLE} or more a side"
            )
        width, height = multiples((width, height))
        return replace(
            request,
            seed=request.seeds()[0],
            width=request.width or width,
            height=request.height or height,
            cfg_scale=self.config.cfg_scale if request.cfg_scale is None else request.cfg_scale,
        )

    def grid_length(self, request: Request) -> int:
        """How many steps a whole run of the request's sampler has, which may be more than were asked for."""
        return len(whole_grid(request, self.schedule)) - 1

    def steps_to_run(self, request: Request) -> int:
        """How many steps a request runs, those of a second pass included."""
        passes = [request, *([second_pass(request)] if request.hires_scale > 1 else [])]
        return sum(len(self.levels(each)) - 1 for each in passes)

    def levels(self, request: Request) -> list[Level]:
        """The noise levels a request goes through, the one it ends at included: one more than the steps it runs."""
        return trajectory(request, self.schedule)[1]

    def _prepare(self, request: Request, image: Source | None, mask: Source | None) -> tuple[Request, Fitted]:
        """The request, complete, and what it starts from. Raises RequestError and ImageError."""
        canvas = open_canvas(request, image, mask)
        request = self.resolve(request, canvas.picture)
        assert request.width is not None and request.height is not None
        if request.hires_scale > 1 and canvas.mask is not None:
            raise RequestError("hires_scale and a mask do not go together: use only_masked for a larger size")
        if request.hires_scale > 1:
            second_pass(request)  # which may be too large
        return request, canvas.fitted(request)

    def _warn(self, request: Request, fitted: Fitted) -> None:
        """Tell what takes long, and what is asked for and does nothing here."""
        last = second_pass(request) if request.hires_scale > 1 else request
        assert last.width is not None and last.height is not None
        if last.width * last.height > 4 * self.config.image_size**2:
            log.warning(
                "%d×%d pixels are many for a model trained at %d×%d: a smaller width or height is faster",
                *(last.width, last.height, self.config.image_size, self.config.image_size),
            )
        if request.cfg_scale == 1 and request.negative_prompt and not self.config.edits:
            log.warning("the negative prompt has no effect at cfg_scale 1")
        default = Request("")
        for wanting, names in {
            "a mask": OF_A_MASK if fitted.mask is None else (),
            "a model that edits pictures": () if self.config.edits else ("image_cfg_scale",),
            "hires_scale": OF_HIRES if request.hires_scale == 1 else (),
            "variation_strength": () if request.variation_strength else ("variation_seed",),
        }.items():
            if idle := [name for name in names if getattr(request, name) != getattr(default, name)]:
                log.warning("without effect, for want of %s: %s", wanting, ", ".join(idle))

    def _walk(self, request: Request, fitted: Fitted) -> Generator[Step, None, Tensor]:
        """The steps of a request, and then its latents, as long as the weights are those that it began with.

        Raises RequestError where LoRAs come or go meanwhile: the prompt was encoded with others.
        """
        loras, walk = self.adapters.active, self._engine.walk(request, fitted)
        while True:
            if self.adapters.active != loras:
                raise RequestError("the LoRAs changed while a picture was being made: finish or close it first")
            try:
                step = next(walk)
            except StopIteration as stop:
                return stop.value
            yield step

    def encode(self, image: Image.Image, tiling: str = "none") -> Tensor:
        """RGB image, sides a multiple of 8 → the mode of its scaled latents (1, 4, height/8, width/8), float32."""
        return self._codec.encode(to_tensor(image), tiling)

    def decode(self, latents: Tensor, tiling: str = "none") -> list[Image.Image]:
        """Scaled latents (b, 4, h, w) → pictures. Raises NumericalError."""
        return self._codec.decode(latents, tiling)

    @property
    def schedule(self) -> NoiseSchedule:
        return self._engine.schedule

    @cached_property
    def _codec(self) -> Codec:
        taesd = self.taesd if self.taesd_finals else None
        in_strips = self.device.type == "cpu" or self.plan is not None  # as plans count it; on CPUs it takes as long
        return Codec(self.vae, self.config.vae.scale_factor, self.device, self.dtype, taesd, in_strips)

    @cached_property
    def _engine(self) -> Engine:
        apart = self.plan is not None and self.plan.apart
        return Engine(self.unet, self.text, self._codec, self.config, self.device, apart, self.may_offload)
