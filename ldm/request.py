"""The one list of generation parameters. Command-line flags, image metadata and the Python API are made from it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from reprlib import repr as brief
from typing import Any

from ldm.config import ScheduleConfig
from ldm.diffusion import samplers
from ldm.errors import RequestError

SIZE_MULTIPLE = 8  # pixels a latent pixel stands for
MAX_SIZE = 8192  # pixels along a side
MAX_STEPS = ScheduleConfig.timesteps
MAX_BATCH = 1024
DEFAULT_STRENGTH = 0.75  # of img2img
SEEDS = 2**64  # there are, in torch and ComfyUI; AUTOMATIC1111 has 2**32


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate; None leaves a choice to the model. Raises RequestError naming every fault at once."""

    prompt: str = field(kw_only=False, metadata={"help": "what the picture should show"})
    negative_prompt: str = option("", "what it should not show")
    steps: int = option(25, f"denoising steps, 1 to {MAX_STEPS}")
    cfg_scale: float = option(7.5, "classifier-free guidance scale; 1 is none")
    sampler: str = option("ddim", f"one of {', '.join(samplers.NAMES)}; plms wants 50 steps or more")
    eta: float = option(0.0, "noise added back at each step, 0 to 1, of the ddim sampler")
    seed: int | None = option(None, "of the first image, the others count up from it; none given: a random one")
    width: int | None = option(None, "in pixels, a multiple of 8; none given: the model's, or the initial image's")
    height: int | None = option(None, "in pixels, a multiple of 8; none given: the model's, or the initial image's")
    batch_size: int = option(1, "images made at once")
    strength: float | None = option(
        None, "share of the steps to run on the initial image: 0 keeps it, 1 hardly shows it"
    )

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise RequestError("; ".join(faults))

    def _faults(self) -> Iterator[str]:
        for name in ("prompt", "negative_prompt"):
            if not _is_text(getattr(self, name)):
                yield f"{name} is {brief(getattr(self, name))}: use text in valid Unicode"
        yield from self._out_of_range("steps", int, 1, MAX_STEPS)
        yield from self._out_of_range("cfg_scale", float, 0, 1000)
        yield from self._out_of_range("eta", float, 0, 1)
        yield from self._out_of_range("batch_size", int, 1, MAX_BATCH)
        if self.seed is not None:
            yield from self._out_of_range("seed", int, 0, SEEDS - 1)
        if self.strength is not None:
            yield from self._out_of_range("strength", float, 0, 1)
        for name in ("width", "height"):
            if (size := getattr(self, name)) is not None:
                yield from self._out_of_range(name, int, SIZE_MULTIPLE, MAX_SIZE) or _not_a_multiple(name, size)
        if self.sampler not in samplers.NAMES:
            yield f"sampler is {brief(self.sampler)}: use one of {', '.join(samplers.NAMES)}"
        elif self.eta and not samplers.SAMPLERS[self.sampler].takes_eta:
            yield f"eta is {self.eta}: {self.sampler} has none, leave it at 0"

    def _out_of_range(self, name: str, kind: type, least: int, most: int) -> list[str]:
        value = getattr(self, name)
        numeric = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if numeric and least <= value <= most:  # false for NaN
            return []
        noun = "a number" if kind is float else "a whole number"
        return [f"{name} is {brief(value)}: use {noun} from {least} to {most}"]

    def seeds(self) -> list[int]:
        """The seed of each image; they count up from the request's own, or from a random one."""
        first = random.SystemRandom().randrange(2**32) if self.seed is None else self.seed
        return [(first + i) % SEEDS for i in range(self.batch_size)]

    def images(self) -> list[Request]:
        """A request for each image of the batch alone."""
        return [replace(self, seed=seed, batch_size=1) for seed in self.seeds()]

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


def _not_a_multiple(name: str, size: int) -> list[str]:
    if size % SIZE_MULTIPLE == 0:
        return []
    below = size - size % SIZE_MULTIPLE
    return [f"{name} is {size}: use {below} or {below + SIZE_MULTIPLE}, a multiple of {SIZE_MULTIPLE}"]
