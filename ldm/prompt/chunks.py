"""Where the tokens of a prompt go: the text encoder takes 75 at once in SD v1, longer prompts several times as many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ldm.prompt.attention import BREAK

COMMA = ",</w>"  # in CLIP's vocabulary
BACKTRACK = 20  # AUTOMATIC1111's default of comma_padding_backtrack


class Chunk(NamedTuple):
    """Token ids without ends and padding, and the weight of each."""

    ids: list[int]
    weights: list[float]


def split_chunks(
    pieces: Sequence[tuple[str, float]],
    tokenize: Callable[[Sequence[str]], Sequence[Sequence[Sequence[int]]]],
    room: int,
    comma: int | None,
) -> list[Chunk]:
    """Chunks of at most `room` tokens, at least one.

    pieces: of parse_attention. tokenize: texts → their ids, in units that stay together. comma: its id. Where a chunk
    is full, whatever is after a comma among its last 20 tokens moves to the next. As tokenize_line in AUTOMATIC1111's
    modules/sd_hijack_clip.py has it.
    """
    chunks: list[Chunk] = []
    chunk, last_comma = Chunk([], []), -1
    for (piece, weight), units in zip(pieces, tokenize([piece for piece, _ in pieces]), strict=True):
        if (piece, weight) == BREAK:
            chunks.append(chunk)
            chunk, last_comma = Chunk([], []), -1
            continue
        for unit in units:
            used = len(chunk.ids)
            if unit[0] == comma:
                last_comma = used
            elif used == room and last_comma != -1 and used - last_comma <= BACKTRACK:
                kept = last_comma + 1
                chunks.append(Chunk(chunk.ids[:kept], chunk.weights[:kept]))
                chunk, last_comma = Chunk(chunk.ids[kept:], chunk.weights[kept:]), -1
            if len(chunk.ids) + len(unit) > room:
                chunks.append(chunk)
                chunk, last_comma = Chunk([], []), -1
            chunk.ids.extend(unit)
            chunk.weights.extend([weight] * len(unit))
    return [*chunks, chunk] if chunk.ids or not chunks else chunks
