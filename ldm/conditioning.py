"""From a prompt to what the U-Net attends to: weights, long prompts, clip skip, AND, texts that change over steps."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import RequestError
from ldm.models.text import TextEncoder
from ldm.prompt import BREAK, Chunk, index_at, parse_attention, read_prompt, split_chunks
from ldm.prompt.chunks import COMMA

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 32  # chunks in one evaluation of the text encoder


@dataclass(frozen=True, eq=False)
class Conditioned:
    """A part's weight, and its contexts, each with the last step it holds for."""

    weight: float
    ends: tuple[int, ...]
    contexts: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The contexts of a prompt over the steps."""

    parts: tuple[Conditioned, ...]

    def at(self, step: int) -> tuple[tuple[float, Tensor], ...]:
        """For each part that AND joins, its weight in guidance and its context (1, n · chunks, width) at a step.

        n is the text encoder's max_length. Steps count from 0; contexts of equal texts of a part are one object.
        `index_at` tells which text holds.
        """
        return tuple((part.weight, part.contexts[index_at(part.ends, step)]) for part in self.parts)


@torch.no_grad()
def encode_prompt(
    text: TextEncoder,
    prompt: str,
    steps: int,
    *,
    clip_skip: int = 1,
    emphasis: str = "original",
    negative: bool = False,
    done: int = 0,
) -> Conditioning:
    """The contexts of a prompt without LoRA tags, in the text encoder's dtype, all of one length.

    clip_skip: which layer to take, from the end; 1 is the last. emphasis: how weights are applied: "original" restores
    the mean, "no norm" does not, "ignore" has none. negative: AND is a word. done: the steps of the first pass, in a
    second. An empty prompt is the unconditional one. As in AUTOMATIC1111's modules/sd_hijack_clip.py and
    modules/sd_emphasis.py. Raises RequestError for a layer that there is not, and for weights that overflow.
    """
    if not 1 <= clip_skip <= text.config.layers:
        raise RequestError(f"clip_skip is {clip_skip}: this model's text encoder has {text.config.layers} layers")
    parts = read_prompt(prompt, steps, negative=negative, done=done)
    rows = _rows(text, list(dict.fromkeys(words for part in parts for _, words in part.texts)))
    tables = {part.texts: _table(text, part.texts, rows) for part in parts}  # so that equal parts have equal contexts
    states = _encode(text, [row for table in tables.values() for row in chain(*table.values())], clip_skip)
    contexts = {texts: _weigh(texts, table, states, emphasis) for texts, table in tables.items()}
    longest = max(context.shape[1] for by_text in contexts.values() for context in by_text.values())
    for by_text in contexts.values():
        by_text.update({words: _lengthen(context, longest) for words, context in by_text.items()})
    return Conditioning(
        tuple(
            Conditioned(
                part.weight,
                tuple(end for end, _ in part.texts),
                tuple(contexts[part.texts][words] for _, words in part.texts),
            )
            for part in parts
        )
    )


class _Row(NamedTuple):
    """A chunk with its ends and padding: max_length ids, and as many weights."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


Texts = tuple[tuple[int, str], ...]  # of a part, with the last step of each
Table = dict[str, list[_Row]]  # the chunks of texts


def _rows(text: TextEncoder, texts: Sequence[str]) -> Table:
    """The chunks of each text."""
    pieces = {words: parse_attention(words) for words in texts}
    if any(piece == BREAK[0] and weight != BREAK[1] for split in pieces.values() for piece, weight in split):
        log.warning("BREAK within brackets is a word, as in AUTOMATIC1111: close the brackets before it")
    comma, room = text.tokenizer.vocabulary.get(COMMA), text.config.max_length - 2
    return {
        words: [_row(text, chunk) for chunk in split_chunks(split, text.units, room, comma)]
        for words, split in pieces.items()
    }


def _row(text: TextEncoder, chunk: Chunk) -> _Row:
    ids = (text.tokenizer.start, *chunk.ids, text.tokenizer.end)
    missing = text.config.max_length - len(ids)
    return _Row(ids + (text.tokenizer.end,) * missing, (1.0, *chunk.weights, 1.0) + (1.0,) * missing)


def _table(text: TextEncoder, texts: Texts, rows: Table) -> Table:
    """The chunks of a part's texts, empty ones added so that all have as many; AUTOMATIC1111 encodes them together."""
    longest = max(len(rows[words]) for _, words in texts)
    empty = _row(text, Chunk([], []))
    return {words: rows[words] + [empty] * (longest - len(rows[words])) for _, words in texts}


def _encode(text: TextEncoder, rows: Sequence[_Row], clip_skip: int) -> dict[tuple[int, ...], Tensor]:
    """The hidden states (n, width) of each chunk's ids."""
    distinct = list(dict.fromkeys(row.ids for row in rows))
    ids = torch.tensor(distinct, device=next(text.parameters()).device)
    states = torch.cat([text(some, clip_skip) for some in ids.split(ROWS_AT_ONCE)])
    return dict(zip(distinct, states, strict=True))


def _weigh(texts: Texts, table: Table, states: Mapping[tuple[int, ...], Tensor], emphasis: str) -> dict[str, Tensor]:
    """The contexts (1, n · chunks, width) of a part's texts.

    The mean that is restored is that of all of them, each counting as often as it comes: AUTOMATIC1111 has them in one
    tensor.
    """
    times = Counter(words for _, words in texts)
    share = torch.tensor([times[words] / len(texts) for words in table])
    contexts = []
    for column in zip(*table.values(), strict=True):
        z = torch.stack([states[row.ids] for row in column])
        weights = torch.tensor([row.weights for row in column], device=z.device)[..., None]
        if emphasis != "ignore" and (weights != 1).any():
            z = _apply_weights(z, weights, share.to(z.device), emphasis)
        contexts.append(z)
    return dict(zip(table, torch.cat(contexts, dim=1).split(1), strict=True))


def _apply_weights(z: Tensor, weights: Tensor, share: Tensor, emphasis: str) -> Tensor:
    """States (b, n, width) times weights (b, n, 1), computed in float32; `share` (b,) is each text's in the mean."""
    weighted = z.float() * weights
    if emphasis == "original":
        weighted = weighted * ((z.float().mean((1, 2)) @ share) / (weighted.mean((1, 2)) @ share))
    weighted = weighted.to(z.dtype)
    if not weighted.isfinite().all():
        raise RequestError(f"a prompt's weights, up to {weights.abs().max():g}, overflow: use smaller ones")
    return weighted


def _lengthen(context: Tensor, length: int) -> Tensor:
    """A context (1, n, width) with its last vector repeated, as in AUTOMATIC1111, so that parts can be batched."""
    missing = length - context.shape[1]
    return torch.cat([context, context[:, -1:].expand(-1, missing, -1)], dim=1) if missing else context
