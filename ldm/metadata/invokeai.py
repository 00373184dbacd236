"""InvokeAI's metadata → Request: `invokeai_metadata` of version 3 and later, `sd-metadata` of version 2."""

from __future__ import annotations

import re
from typing import Any

from ldm.diffusion import samplers
from ldm.errors import ImageError, printable
from ldm.metadata.origin import Origin, draws_brownian, find_sampler, load_object, stem, warn_lost
from ldm.request import Request

FIELDS = {
    "positive_prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "cfg_scale": "cfg_scale",
    "cfg_rescale_multiplier": "guidance_rescale",
    "steps": "steps",
    "rand_device": "noise",
}
OLD_FIELDS = {name: name for name in ("width", "height", "seed", "cfg_scale", "steps")}
# Which say nothing of the picture, or something that is read beside FIELDS.
KNOWN = {
    "generation_mode", "scheduler", "clip_skip", "strength", "init_image", "model", "vae", "seamless_x", "seamless_y",
    "app_version", "workflow", "graph", "_canvas_objects", "canvas_v2_metadata",
    "positive_style_prompt", "negative_style_prompt",
}  # fmt: skip
OLD_KNOWN = {"prompt", "sampler", "type", "strength", "seamless", "variations"}
# Its names that are not a sampler's here with k_ before it or _k behind.
SCHEDULERS = {
    "kdpm_2": "dpm_2", "kdpm_2_a": "dpm_2_a", "kdpm_2_k": "dpm_2_k", "kdpm_2_a_k": "dpm_2_a_k",
    "dpmpp_2s": "dpmpp_2s_a", "dpmpp_2s_k": "dpmpp_2s_a_k", "k_dpmpp_2": "dpmpp_2m", "k_dpmpp_2_a": "dpmpp_2s_a",
}  # fmt: skip


def parse(text: str) -> Origin:
    """What `invokeai_metadata` tells. Raises ImageError, RequestError; names in a warning what is left out."""
    given = load_object(text, "metadata")
    if "positive_prompt" not in given:
        raise ImageError("its metadata have no positive_prompt")
    lost = {name for name, value in given.items() if value and name not in FIELDS and name not in KNOWN}
    values = {field: given[name] for name, field in FIELDS.items() if given.get(name) is not None}
    values.setdefault("prompt", "")
    skipped = given.get("clip_skip")
    values["clip_skip"] = 1 if skipped is None else skipped + 1 if isinstance(skipped, int) else skipped
    tiled = bool(given.get("seamless_x")), bool(given.get("seamless_y"))
    values["tiling"] = {(True, True): "both", (True, False): "x", (False, True): "y"}.get(tiled, "none")
    if given.get("init_image") or given.get("generation_mode") == "img2img":
        values["strength"] = given.get("strength")
    return _origin(values, given.get("scheduler"), lost, _name(given.get("model")), _name(given.get("vae")))


def parse_old(text: str) -> Origin:
    """What `sd-metadata` tells; words in [brackets] are its negative prompt. Raises and warns as `parse` does."""
    given = load_object(text, "metadata")
    image = given.get("image")
    if not isinstance(image, dict):
        raise ImageError("its metadata have no image")
    lost = {name for name, value in image.items() if value and name not in OLD_FIELDS and name not in OLD_KNOWN}
    values = {field: image[name] for name, field in OLD_FIELDS.items() if image.get(name) is not None}
    prompt = _old_prompt(image.get("prompt"), lost)
    values["negative_prompt"] = ", ".join(re.findall(r"\[([^\[\]]*)\]", prompt))
    values["prompt"] = " ".join(re.sub(r"\[[^\[\]]*\]", " ", prompt).split())
    if image.get("type") == "img2img":
        values["strength"] = image.get("strength")
    if image.get("seamless"):
        values["tiling"] = "both"
    match image.get("variations"):
        case [{"seed": seed, "weight": weight}]:
            values |= {"variation_seed": seed, "variation_strength": weight}
        case [_, *_]:
            lost.add("variations")
    return _origin(values, image.get("sampler"), lost, given.get("model_weights"), None)


def _old_prompt(prompt: object, lost: set[str]) -> str:
    """A text, or a list of texts with weights, of which the first is taken."""
    match prompt:
        case str():
            return prompt
        case [{"prompt": str(text)}, *others]:
            if others:
                lost.add("prompts after the first")
            return text
    raise ImageError("its metadata have no prompt")


def _origin(values: dict[str, Any], scheduler: object, lost: set[str], model: object, vae: object) -> Origin:
    if scheduler is not None:
        name = SCHEDULERS.get(scheduler, scheduler) if isinstance(scheduler, str) else scheduler
        plain = name.removeprefix("k_").removesuffix("_k") if isinstance(name, str) else name
        sampler, _ = find_sampler(plain)
        spaced = (
            "normal" if samplers.SAMPLERS[sampler].grid in ("karras", "exponential") else None
        )  # what is not called Karras is not
        karras = isinstance(name, str) and name.endswith("_k")
        values |= {"sampler": sampler, "schedule": "karras" if karras else spaced, "brownian": draws_brownian(sampler)}
    texts = (values.get(name) for name in ("prompt", "negative_prompt"))
    if any(mark in text for text in texts if isinstance(text, str) for mark in ("(", "++", "--")):
        lost.add("weights of words, which InvokeAI writes otherwise")
    warn_lost(printable(name) for name in lost)
    return Origin(Request(**values), stem(model), stem(vae))


def _name(model: object) -> object:
    """A model's name: itself in the first versions, then one of an object's fields."""
    if not isinstance(model, dict):
        return model
    return next((model[key] for key in ("model_name", "name", "key") if key in model), None)
