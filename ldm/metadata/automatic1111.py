"""AUTOMATIC1111's `parameters` text ↔ Request.

The prompt, `Negative prompt: …` and a line of `Key: value, …`, where values with commas, colons or newlines are JSON
strings. Keys and their meaning are those of stable-diffusion-webui 1.10 (modules/processing.py, infotext_utils.py).
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from ldm.diffusion import samplers
from ldm.diffusion.grids import GRIDS
from ldm.errors import ImageError, RequestError, printable
from ldm.metadata.origin import Origin, draws_brownian, find_grid, find_sampler, stem, warn_lost
from ldm.request import MAX_MERGED, Request

log = logging.getLogger(__name__)

NEGATIVE = "Negative prompt:"
NUMBERS: dict[str, tuple[str, type]] = {
    "Steps": ("steps", int),
    "CFG scale": ("cfg_scale", float),
    "Image CFG scale": ("image_cfg_scale", float),
    "Seed": ("seed", int),
    "Variation seed": ("variation_seed", int),
    "Variation seed strength": ("variation_strength", float),
    "Clip skip": ("clip_skip", int),
    "Token merging ratio": ("token_merging", float),
    "Eta": ("eta", float),
    "Eta DDIM": ("eta", float),
    "Hires upscale": ("hires_scale", float),
    "Hires steps": ("hires_steps", int),
    "Mask blur": ("mask_blur", int),
    "Masked area padding": ("mask_padding", int),
}
WORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNG": ("noise", {"CPU": "cpu", "GPU": "cuda", "NV": "cuda"}),  # NV: the GPU's numbers, computed anywhere
    "Tiling": ("tiling", {"True": "both"}),
    "Emphasis": ("emphasis", {"Original": "original", "No norm": "no norm", "Ignore": "ignore"}),
    "Hires upscaler": ("hires_upscaler", {"Latent": "latent", "Lanczos": "lanczos"}),
    "Inpaint area": ("only_masked", {"Only masked": True, "Whole picture": False}),
    "Masked content": ("fill", {"original": "original", "fill": "blur", "latent noise": "noise"}),
}
SIZES = {"Size": ("width", "height"), "Seed resize from": ("seed_width", "seed_height")}
SHAPING = {  # that have no place in a request; other keys are an extension's, or say nothing of the picture
    "ENSD", "Face restoration", "First pass size", "Hires resize", "Hires sampler", "Hires schedule type",
    "Hires checkpoint", "Hires prompt", "Hires negative prompt", "Hires CFG Scale", "Conditional mask weight",
    "Noise multiplier", "Mask mode", "Refiner", "Refiner switch at", "NGMS", "Skip Early CFG", "Sigma churn",
    "Sigma tmin", "Sigma tmax", "Sigma noise", "Schedule max sigma", "Schedule min sigma", "Schedule rho",
    "Discard penultimate sigma", "FP8 weight", "Script", "Hypernet", "Noise Schedule", "UniPC variant",
    "UniPC skip type", "UniPC order",
}  # fmt: skip
# Its names of schedules that mean others here.
SCHEDULES = {"Uniform": "normal", "DDIM": "uniform"}

# --- Request → text ---------------------------------------------------------------------------------------------------


def parameters(request: Request, steps: int, model: str, vae: str | None = None, masked: bool = False) -> str:
    """The text AUTOMATIC1111 would write, without what is its default.

    steps: the length of the sampler's grid, which may be more than asked. vae: the name of one that is not the model's.
    masked: whether there was a mask.
    """
    settings = _settings_of(request, steps) | {"Model": model, "VAE": vae} | _passes_of(request, masked)
    lines = [
        request.prompt,
        *([f"{NEGATIVE} {request.negative_prompt}"] if request.negative_prompt else []),
        ", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items() if value is not None),
    ]
    return "\n".join(lines)


def _settings_of(request: Request, steps: int) -> dict[str, Any]:
    method = samplers.SAMPLERS[request.sampler]
    defaults = Request("")
    grid = None if method.from_unit_noise else method.grid  # for those samplers it has no choice
    varied = request.variation_strength > 0
    return {
        "Steps": steps,
        "Sampler": method.label,
        "Schedule type": _label(request.schedule or grid),
        "CFG scale": request.cfg_scale,
        "Image CFG scale": _unless(request.image_cfg_scale, defaults.image_cfg_scale),
        "Seed": request.seed,
        "Size": _pair(request.width, request.height),
        "Variation seed": request.variation_seed if varied else None,
        "Variation seed strength": request.variation_strength if varied else None,
        "Seed resize from": _pair(request.seed_width, request.seed_height),
        "Clip skip": _unless(request.clip_skip, defaults.clip_skip),
        "Token merging ratio": request.token_merging or None,
        "RNG": _word("RNG", request.noise) if request.noise == "cpu" else None,
        "Tiling": _word("Tiling", request.tiling),
        "Eta DDIM" if request.sampler == "ddim" else "Eta": _unless(request.eta, method.eta),
        "Emphasis": _unless(_word("Emphasis", request.emphasis), "Original"),
    }


def _passes_of(request: Request, masked: bool) -> dict[str, Any]:
    """The settings of an initial image, its mask, and a second pass."""
    settings: dict[str, Any] = {"Denoising strength": request.strength}
    if request.hires_scale != 1:
        if request.strength is None:
            settings["Denoising strength"] = request.hires_strength
        settings["Hires upscale"] = request.hires_scale
        settings["Hires steps"] = request.hires_steps
        settings["Hires upscaler"] = _word("Hires upscaler", request.hires_upscaler)
        settings["Token merging ratio hr"] = request.token_merging or None
    if masked:
        settings["Mask blur"] = request.mask_blur
        settings["Masked content"] = _word("Masked content", request.fill)
        if request.only_masked:
            settings["Inpaint area"] = "Only masked"
            settings["Masked area padding"] = request.mask_padding
    return settings


def _label(grid: str | None) -> str | None:
    return None if grid is None else "DDIM" if grid == "uniform" else GRIDS[grid].label


def _word(key: str, value: Any) -> str | None:
    return next((word for word, meaning in WORDS[key][1].items() if meaning == value), None)


def _unless(value: Any, default: Any) -> Any:
    return None if value == default else value


def _pair(width: int | None, height: int | None) -> str | None:
    return None if width is None or height is None else f"{width}x{height}"


def _quoted(value: str) -> str:
    """As it quotes a value that would otherwise read as several."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


# --- text → Request ---------------------------------------------------------------------------------------------------

# A key ends at the first colon or comma; a value is a JSON string, or goes on to the next comma. The quote that opens
# a value cannot be an escaped one of the value before, so no part of a line is tried for more than one string.
SETTING = re.compile(r'\s*([^:,]*)(?::\s*("[^\\"]*(?:\\.[^\\"]*)*"(?=\s*(?:,|\Z))|[^,]*))?(?:,|\Z)')
KEY = re.compile(r"\w[\w \-/]+")
MAX_DIGITS = 30  # of a number: all that a float needs


def parse(text: str, noise: str = "cuda") -> Origin:
    """What a `parameters` text tells; `noise` is whose random numbers an absent RNG means. Linear in its length.

    Samplers without a `Schedule type` are those of versions before 1.9, where "DPM++ 2M Karras" told it. Raises
    ImageError for a text without settings, RequestError for values a request cannot have.
    """
    *lines, last = text.strip().split("\n")
    settings = split_settings(last)
    if len(settings) < 3:  # AUTOMATIC1111's own way to tell settings from a prompt
        raise ImageError("its parameters hold no settings (Steps: 20, Sampler: Euler a, Seed: 1, …)")
    prompt, negative = _prompts(lines)
    settings = {key: value for key, value in settings.items() if value}
    masked, model, vae = "Mask blur" in settings, settings.pop("Model", None), settings.pop("VAE", None)
    values: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative, "noise": noise}
    _read_sampler(settings, values)
    _read_numbers(settings, values)
    lost = _read_words(settings, values) | _read_passes(settings, values) | _read_merging(settings, values)
    warn_lost(lost | {f"{key}: {settings[key]}" for key in settings.keys() & SHAPING})
    if others := sorted(settings.keys() - SHAPING):
        log.info("settings without a meaning here: %s", printable(", ".join(others), 500))
    return Origin(Request(**values), stem(model), stem(vae), masked)


def split_settings(line: str) -> dict[str, str]:
    """`Key: value, "Key": "quoted, value"` → {key: value}; what has no key is left out."""
    return {
        key: _unquoted(value.strip())
        for key, value in ((match[1].strip(), match[2]) for match in SETTING.finditer(line))
        if value is not None and KEY.fullmatch(key)
    }


def _unquoted(value: str) -> str:
    try:
        text = json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value
    return text if isinstance(text, str) else value


def _prompts(lines: list[str]) -> tuple[str, str]:
    stripped = [line.strip() for line in lines]
    start = next((i for i, line in enumerate(stripped) if line.startswith(NEGATIVE)), len(stripped))
    negative = "\n".join(line.removeprefix(NEGATIVE).strip() for line in stripped[start:])
    return "\n".join(stripped[:start]), negative


def _read_sampler(settings: dict[str, str], values: dict[str, Any]) -> None:
    """Take the sampler and the schedule."""
    name, schedule = settings.pop("Sampler", None), settings.pop("Schedule type", None)
    if name is None:
        return
    sampler, told = find_sampler(name)
    if schedule is not None and schedule != "Automatic":  # which is the sampler's own
        told = SCHEDULES.get(schedule) or find_grid(schedule)
    elif (
        schedule is None
        and told is None
        and samplers.SAMPLERS[sampler].grid in ("karras", "exponential")
        and sampler != "restart"
    ):
        told = "normal"
    values |= {"sampler": sampler, "schedule": told, "brownian": draws_brownian(sampler)}


def _read_words(settings: dict[str, str], values: dict[str, Any]) -> set[str]:
    """Take the settings that are one of some words; returns those whose word has no equal here."""
    lost = set()
    for key, (field, meanings) in WORDS.items():
        if (word := settings.pop(key, None)) is None:
            continue
        if word in meanings:
            values[field] = meanings[word]
        else:
            lost.add(f"{key}: {word}")
    return lost


def _read_numbers(settings: dict[str, str], values: dict[str, Any]) -> None:
    for key, (field, kind) in NUMBERS.items():
        if key in settings:
            values[field] = _number(key, settings.pop(key), kind)
    for key, names in SIZES.items():
        if key in settings:
            sides = [_number(key, side, int) for side in settings.pop(key).split("x", 1)]
            if min(sides) > 0:  # -1x-1 is how older versions say none
                values |= zip(names, sides, strict=False)


def _read_passes(settings: dict[str, str], values: dict[str, Any]) -> set[str]:
    """Take the strength, which is the second pass's where there is one, and that pass's size."""
    lost = set()
    resized = settings.pop("Hires resize", None)
    if resized is not None and "hires_scale" not in values:
        width, _, height = resized.partition("x")
        scales = {
            _number("Hires resize", side, int) / values[name]
            for side, name in ((width, "width"), (height, "height"))
            if name in values
        }
        if len(scales) == 1:
            values["hires_scale"] = scales.pop()
        else:
            lost.add(f"Hires resize: {resized}")
    if "Denoising strength" in settings:
        strength = _number("Denoising strength", settings.pop("Denoising strength"), float)
        if "hires_scale" in values:
            values["hires_strength"] = strength
        elif strength:  # older versions write 0 where there is no initial image
            values["strength"] = strength
    if values.get("hires_steps") == 0:  # as many as the first pass has
        del values["hires_steps"]
    return lost


def _read_merging(settings: dict[str, str], values: dict[str, Any]) -> set[str]:
    """Take the second pass's share of merged tokens; returns it where it is not the first's."""
    key, share = "Token merging ratio hr", values.get("token_merging", 0.0)
    if share > MAX_MERGED:  # it merges as many as there are, whatever more is asked
        values["token_merging"] = MAX_MERGED
    text = settings.pop(key, None)
    return set() if text is None or _number(key, text, float) == share else {f"{key}: {text}"}


def _number(key: str, text: str, kind: type) -> Any:
    try:
        if len(text) > MAX_DIGITS:
            raise ValueError("it is too long")
        return kind(text)
    except ValueError as error:
        noun = "a whole number" if kind is int else "a number"
        raise RequestError(f"{key} is {printable(text)!r}: use {noun}") from error
