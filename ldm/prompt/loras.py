"""What a prompt says besides its words: `<lora:name:strength>`, as AUTOMATIC1111's users write it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ldm.errors import RequestError


@dataclass(frozen=True)
class LoraTag:
    """A LoRA that a prompt asks for, with its strengths in the text encoder and in the U-Net."""

    name: str
    text: float = 1.0
    unet: float = 1.0


# `<` cannot be part of a tag, so that a prompt of many of them is read in linear time.
LORA = re.compile(r"<(?:lora|lyco):([^<>]+)>")


def split_loras(prompt: str) -> tuple[str, list[LoraTag]]:
    """A prompt without its LoRA tags, and the tags. Raises RequestError for one that cannot be read.

    The forms are `<lora:name>`, `<lora:name:te>` and `<lora:name:te:unet>`; `te=` and `unet=` may name the strengths.
    The U-Net's is the text encoder's where it is not given, and that is 1: AUTOMATIC1111, extra_networks_lora.py.
    """
    return LORA.sub("", prompt), [_parse(match[0], match[1]) for match in LORA.finditer(prompt)]


def _parse(tag: str, content: str) -> LoraTag:
    name, *fields = content.split(":")
    strengths: dict[str, float] = {}
    names = iter(("te", "unet"))
    for field in fields:
        key, named, value = field.rpartition("=")
        key = key.strip() if named else next(names, "")
        if key not in ("te", "unet"):
            raise RequestError(f"{tag:.100}: cannot read {field!r:.50}; expected <lora:name:te:unet>")
        strengths[key] = _number(value, tag)
    if not name.strip():
        raise RequestError(f"{tag:.100}: has no name; expected <lora:name:strength>")
    text = strengths.get("te", 1.0)
    return LoraTag(name.strip(), text, strengths.get("unet", text))


def _number(value: str, tag: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"{tag:.100}: the strength {value!r:.50} is not a number")
    return number
