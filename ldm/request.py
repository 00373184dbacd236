"""The one list of generation parameters. Command-line flags, image metadata and the Python API are made from it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import Field, asdict, dataclass, field, fields, replace
from reprlib import repr as brief
from typing import Any

from ldm.config import MAX_CFG_SCALE, ScheduleConfig
from ldm.diffusion import samplers
from ldm.diffusion.grids import GRIDS, find_grid
from ldm.errors import RequestError

SIZE_MULTIPLE = 8  # pixels a latent pixel stands for
MAX_SIZE = 8192  # pixels along a side
MAX_STEPS = ScheduleConfig.timesteps
MAX_BATCH = 1024
DEFAULT_STRENGTH = 0.75  # of img2img
SEEDS = 2**64  # there are, in torch and ComfyUI; AUTOMATIC1111 has 2**32

EMPHASIS = ("original", "no norm", "ignore")
NOISE_SOURCES = ("cpu", "cuda")
TILINGS = ("none", "both", "x", "y")
FILLS = ("original", "noise", "blur")
UPSCALERS = ("latent", "lanczos")
MAX_MERGED = 0.75  # of tokens: all but one of each 2×2


def option(default: Any, help: str, least: float | None = None, most: float | None = None, choices: Any = None) -> Any:
    """A field with its help, and the range or the choices of its values."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate; None leaves a choice to the model. Raises RequestError naming every fault at once.

    A sampler may be given by any of its names ("DPM++ 2M Karras" tells the schedule too); the request then has ours.
    """

    prompt: str = field(kw_only=False, metadata={"help": "what the picture should show", "choices": None})
    negative_prompt: str = option("", "what it should not show")
    steps: int = option(25, f"denoising steps, 1 to {MAX_STEPS}", 1, MAX_STEPS)
    cfg_scale: float | None = option(
        None, "classifier-free guidance scale, 1 for no guidance; none given: the model's", 0, MAX_CFG_SCALE
    )
    sampler: str = option(samplers.DEFAULT, f"one of {', '.join(samplers.NAMES)}, or as other programs call it")
    schedule: str | None = option(None, f"which noise levels: {', '.join(GRIDS)}; none given: the sampler's own")
    eta: float | None = option(None, "noise added back at each step, 0 to 1; none given: the sampler's own", 0, 1)
    seed: int | None = option(
        None, "of the first image, the others count up from it; none given: a random one", 0, SEEDS - 1
    )
    width: int | None = option(
        None, "in pixels, a multiple of 8; none given: the model's, or the initial image's", SIZE_MULTIPLE, MAX_SIZE
    )
    height: int | None = option(
        None, "in pixels, a multiple of 8; none given: the model's, or the initial image's", SIZE_MULTIPLE, MAX_SIZE
    )
    batch_size: int = option(1, "images made at once", 1, MAX_BATCH)

    # How prompts are read.
    clip_skip: int = option(
        1, "layers of the text encoder to stop before its end, as AUTOMATIC1111 counts: 1 is all", 1, 12
    )
    emphasis: str = option("original", "how (word:1.3) is weighted: original restores the mean", choices=EMPHASIS)

    # How guidance works.
    guidance_rescale: float = option(0.0, "share of the guided prediction's deviation to take back, 0 to 1", 0, 1)
    guidance_start: float = option(0.0, "share of the steps before which there is no guidance", 0, 1)
    guidance_end: float = option(1.0, "share of the steps after which there is no guidance", 0, 1)
    dynamic_threshold: float | None = option(
        None, "share of the predicted values that guidance may not push beyond the unguided, such as 0.995", 0, 1
    )
    image_cfg_scale: float = option(1.5, "guidance by the initial image, of InstructPix2Pix models", 0, 1000)

    # Where the noise comes from.
    variation_seed: int | None = option(
        None, "of the noise to mix in; none given: the one after the seed", 0, SEEDS - 1
    )
    variation_strength: float = option(0.0, "how much of it, 0 to 1", 0, 1)
    seed_width: int | None = option(
        None, "keep the composition that the seed has at this width", SIZE_MULTIPLE, MAX_SIZE
    )
    seed_height: int | None = option(None, "and at this height", SIZE_MULTIPLE, MAX_SIZE)
    noise: str = option(
        "cpu", "whose random numbers: torch's on the cpu, or those AUTOMATIC1111 has on cuda", choices=NOISE_SOURCES
    )
    brownian: bool = option(False, "draw the samplers' noise as AUTOMATIC1111 does (needs torchsde)")
    tiling: str = option("none", "make pictures whose sides fit to each other", choices=TILINGS)

    # From an initial image.
    strength: float | None = option(
        None,
        f"share of the steps to run on the initial image: 0 keeps it, 1 hardly shows it; {DEFAULT_STRENGTH} as a flag",
        0,
        1,
    )
    exact_steps: bool = option(False, "run all the steps, whatever the strength, each of them shorter")
    mask_blur: int = option(4, "pixels by which the edge of a mask is softened", 0, 256)
    fill: str = option("original", "what is under a mask to begin with", choices=FILLS)
    only_masked: bool = option(False, "paint the part around the mask at the full size, then paste it")
    mask_padding: int = option(32, "pixels around the mask that count as that part", 0, 1024)
    outpaint_left: int = option(0, "pixels to add at this side", 0, MAX_SIZE)
    outpaint_right: int = option(0, "pixels to add at this side", 0, MAX_SIZE)
    outpaint_top: int = option(0, "pixels to add at this side", 0, MAX_SIZE)
    outpaint_bottom: int = option(0, "pixels to add at this side", 0, MAX_SIZE)

    # In two passes.
    hires_scale: float = option(1.0, "times by which a second pass enlarges the picture", 1, 8)
    hires_steps: int | None = option(None, "steps of the second pass; none given: those of the first", 1, MAX_STEPS)
    hires_strength: float = option(0.7, "share of them to run", 0, 1)
    hires_upscaler: str = option("latent", "what is enlarged: latents, or the picture by lanczos", choices=UPSCALERS)

    # What is computed less often, or of less.
    deep_cache: int = option(
        1,
        "evaluate the whole U-Net at the first of every this many steps, and at the others its outermost layers alone: "
        "faster, less exact; 1 for all",
        1,
        MAX_STEPS,
    )
    token_merging: float = option(
        0.0,
        f"share of the finest self-attention's tokens to merge with those alike, 0 to {MAX_MERGED}: faster, less exact",
        0,
        MAX_MERGED,
    )

    def __post_init__(self) -> None:
        faults = [fault for f in fields(self) for fault in self._faults(f)]
        if isinstance(self.sampler, str):
            faults += self._name_sampler()
        if not faults and self.guidance_start > self.guidance_end:
            faults.append(f"guidance_start is {self.guidance_start}, after guidance_end, {self.guidance_end}")
        if faults:
            raise RequestError("; ".join(faults))

    def _name_sampler(self) -> list[str]:
        """Put our names of the sampler, and of the schedule if its name tells one, in place of others'."""
        try:
            sampler, schedule = samplers.find(self.sampler)
            if isinstance(self.schedule, str):
                object.__setattr__(self, "schedule", find_grid(self.schedule))
        except ValueError as error:
            return [str(error)]
        object.__setattr__(self, "sampler", sampler)
        object.__setattr__(self, "schedule", self.schedule or schedule)
        if self.eta and samplers.SAMPLERS[sampler].eta is None:
            return [f"eta is {self.eta}: {sampler} has none, leave it out"]
        return []

    def _faults(self, f: Field[Any]) -> Iterator[str]:
        """What is wrong with the value of a field, by its type and the range or choices in its metadata."""
        value, (kind, *optional) = getattr(self, f.name), str(f.type).split(" | ")
        if value is None and optional:
            return
        least, most, choices = (f.metadata.get(key) for key in ("least", "most", "choices"))
        if kind == "str" and choices is not None:
            if value not in choices:
                yield f"{f.name} is {brief(value)}: use one of {', '.join(choices)}"
        elif kind == "str":
            if not _is_text(value):
                yield f"{f.name} is {brief(value)}: use text in valid Unicode"
        elif kind == "bool":
            if not isinstance(value, bool):
                yield f"{f.name} is {brief(value)}: use true or false"
        else:
            numeric = isinstance(value, (int, float) if kind == "float" else int) and not isinstance(value, bool)
            if not numeric or not least <= value <= most:  # false for NaN
                yield f"{f.name} is {brief(value)}: use {NOUNS[kind]} from {least} to {most}"
            elif f.name in MULTIPLES and value % SIZE_MULTIPLE:
                below = value - value % SIZE_MULTIPLE
                yield f"{f.name} is {value}: use {below} or {below + SIZE_MULTIPLE}, a multiple of {SIZE_MULTIPLE}"

    def seeds(self) -> list[int]:
        """The seed of each image; they count up from the request's own, or from a random one.

        Variations are of one seed, as in AUTOMATIC1111: their variation seeds count up instead.
        """
        first = random.SystemRandom().randrange(2**32) if self.seed is None else self.seed
        return [(first + (0 if self.variation_strength else i)) % SEEDS for i in range(self.batch_size)]

    def variation_seeds(self) -> list[int]:
        """The variation seed of each image; they count up from the request's own, or from the one after the seed."""
        first = self.seeds()[0] + 1 if self.variation_seed is None else self.variation_seed
        return [(first + i) % SEEDS for i in range(self.batch_size)]

    def images(self) -> list[Request]:
        """A request for each image of the batch alone."""
        chosen = replace(self, seed=self.seeds()[0])
        variations = chosen.variation_seeds() if self.variation_strength else [self.variation_seed] * self.batch_size
        return [
            replace(chosen, seed=seed, variation_seed=variation, batch_size=1)
            for seed, variation in zip(chosen.seeds(), variations, strict=True)
        ]

    def batch(self, number: int) -> Request:
        """The request of a later batch, of one that has a seed: its seeds, or variation seeds, follow on."""
        assert self.seed is not None
        shift = number * self.batch_size
        if self.variation_strength:
            return replace(self, variation_seed=(self.variation_seeds()[0] + shift) % SEEDS)
        return replace(self, seed=(self.seed + shift) % SEEDS)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Raises RequestError for what is not a JSON object of this class's fields."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"a request must be JSON ({error})") from error
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or "prompt" not in values or not values.keys() <= known:
            unknown = f", got {brief(sorted(values.keys() - known))}" if isinstance(values, dict) else ""
            raise RequestError(f"a request must be JSON of a prompt and any of {', '.join(sorted(known))}{unknown}")
        return cls(**values)


def _is_text(value: object) -> bool:
    """A lone surrogate, which is how Python reads bytes that are not UTF-8, is in no text."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


NOUNS = {"int": "a whole number", "float": "a number"}
MULTIPLES = {
    "width", "height", "seed_width", "seed_height",
    "outpaint_left", "outpaint_right", "outpaint_top", "outpaint_bottom",
}  # fmt: skip
