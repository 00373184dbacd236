"""A whole prompt: cleaned, split at AND, each part with its texts over the steps."""

from __future__ import annotations

import logging
import re
import unicodedata
from typing import NamedTuple

from ldm.prompt.schedule import schedule

log = logging.getLogger(__name__)

AND = re.compile(r"\bAND\b")
WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?|\d*\.\d+))")
TAG = re.compile(r"<\w+:[^<>]+>")
INVISIBLE = {"Cc", "Cf", "Cs"}  # control, format (zero-width spaces and joiners) and surrogate characters


class Part(NamedTuple):
    """What AND joins: its weight in guidance, and its texts, each with the last step it holds for, counted from 1."""

    weight: float
    texts: tuple[tuple[int, str], ...]


def read_prompt(prompt: str, steps: int, *, negative: bool = False, done: int = 0) -> list[Part]:
    """The parts of a prompt without LoRA tags; a negative one has no AND. Every string can be read.

    done: the steps of the first pass, in a second one. Tags that nothing here reads are named in a warning.
    """
    prompt = clean(prompt)
    if tags := TAG.findall(prompt):
        log.warning("no tags but <lora:…> and <lyco:…> are read, these are encoded as text: %.200s", ", ".join(tags))
    parts = [(prompt, 1.0)] if negative else split_and(prompt)
    if len(parts) == 1 and parts[0][1] != 1:
        log.warning("the end of %.100r is read as the prompt's weight in guidance: %g", prompt, parts[0][1])
    return [Part(weight, tuple(schedule(text, steps, done))) for text, weight in parts]


def clean(prompt: str) -> str:
    """A prompt with plain spaces, line breaks being such, and without characters that show nothing."""
    if prompt.isprintable():
        return prompt
    return "".join(
        " " if character.isspace() else character
        for character in prompt
        if character.isspace() or unicodedata.category(character) not in INVISIBLE
    )


def split_and(prompt: str) -> list[tuple[str, float]]:
    """The texts that AND joins, and their weights: `a AND b:1.2`. One text alone may have a weight too.

    As get_multicond_prompt_list in AUTOMATIC1111's modules/prompt_parser.py has it.
    """
    return [_split_weight(text.rstrip()) for text in AND.split(prompt)]


def _split_weight(text: str) -> tuple[str, float]:
    before, colon, weight = text.rpartition(":")
    if colon and (match := WEIGHT.fullmatch(weight)):
        return before.rstrip(), float(match[1])
    return text, 1.0
