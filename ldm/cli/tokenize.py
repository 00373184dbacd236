"""`ldm tokenize`: how a prompt is read: its tokens, their weights, chunks and steps. No network is loaded."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.prompt import Chunk, index_at, parse_attention, read_prompt, split_chunks, split_loras
from ldm.prompt.chunks import COMMA
from ldm.request import Request

if TYPE_CHECKING:
    from ldm.models.tokenizer import Tokenizer

COLUMNS = 100


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of `ldm`."""
    parser = commands.add_parser(
        "tokenize",
        help="tell how a prompt is read",
        description="Tell how a prompt is read: its parts, its texts over the steps, their tokens, weights and chunks.",
        allow_abbrev=False,
    )
    parser.add_argument("prompt")
    parser.add_argument("--model", type=Path, metavar="PATH", help="whose tokenizer to use; none given: CLIP's own")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="for texts that change (default: 25)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print what `report` tells."""
    request = Request(prompt=args.prompt, steps=args.steps)
    tokenizer = _tokenizer(args.model)
    for line in report(request, tokenizer):
        print(line)


def _tokenizer(path: Path | None) -> Tokenizer:
    from ldm.models.tokenizer import Tokenizer, shipped_vocabulary

    if path is None:
        return Tokenizer(*shipped_vocabulary(), max_length=77)
    from ldm.checkpoint.sources import open_checkpoint
    from ldm.checkpoint.vocabulary import load_tokenizer

    checkpoint = open_checkpoint(path)
    return load_tokenizer(checkpoint.tokenizer, checkpoint.part("text").read_config(), checkpoint.path)


def report(request: Request, tokenizer: Tokenizer) -> Iterator[str]:
    """Lines for a person: for each part and each of its texts the steps, counted from 1, and the chunks."""
    prompt, loras = split_loras(request.prompt)
    for lora in loras:
        yield f"LoRA {lora.name}: {lora.unet:g} in the U-Net, {lora.text:g} in the text encoder"
    parts = read_prompt(prompt, request.steps)
    for number, part in enumerate(parts, 1):
        if len(parts) > 1:
            yield f"part {number} of {len(parts)}, weight {part.weight:g}"
        ends = [end for end, _ in part.texts]
        for index, steps in groupby(range(request.steps), partial(index_at, ends)):
            first, *others = [step + 1 for step in steps]
            text = part.texts[index][1]
            yield f"steps {first} to {others[-1]}: {text.strip()}" if others else f"step {first}: {text.strip()}"
            yield from _chunks(text, tokenizer)


def _chunks(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    room = tokenizer.max_length - 2

    def units(texts: Sequence[str]) -> list[list[list[int]]]:
        return [[[i] for i in ids] for ids in tokenizer.encode(texts)]

    chunks = split_chunks(parse_attention(text), units, room, tokenizer.vocabulary.get(COMMA))
    for number, chunk in enumerate(chunks, 1):
        yield f"  chunk {number} of {len(chunks)}, {len(chunk.ids)} of {room} tokens"
        yield from textwrap.wrap(
            " ".join(_words(chunk, tokenizer)), COLUMNS, initial_indent=" " * 4, subsequent_indent=" " * 4,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip


def _words(chunk: Chunk, tokenizer: Tokenizer) -> Iterator[str]:
    """Tokens; `·` is where a word goes on, `×` what a token's weight is if it is not 1."""

    @cache
    def show(token: int) -> str:
        return tokenizer.decode([token]) + "·" * (not tokenizer.ends_word(token))

    for token, weight in zip(chunk.ids, chunk.weights, strict=True):
        yield show(token) + (f"×{weight:.4g}" if weight != 1 else "")
