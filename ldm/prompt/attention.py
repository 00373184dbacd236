"""Weights of words: `(word)`, `[word]`, `(word:1.3)`, and BREAK."""

from __future__ import annotations

import re
from itertools import groupby

ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies by
BREAK = ("BREAK", -1.0)  # what stands where a chunk ends

TOKEN = re.compile(r"\\[()\[\]\\]?|[()\[\]]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|:|[^\\()\[\]:]+")
BREAK_WORD = re.compile(r"\bBREAK\b\s*")


def parse_attention(text: str) -> list[tuple[str, float]]:
    """A text's pieces, each with its weight; neighbours of one weight are one piece. Every text has some.

    Brackets that nest multiply; one that is never closed holds to the end, one that was never opened is text. Round and
    square ones need not nest in each other. A backslash before a bracket or a backslash makes text of it, and is
    dropped elsewhere. A piece that is `BREAK` starts a new chunk; within brackets the word has another weight than -1
    and is a word like others. All as parse_prompt_attention in AUTOMATIC1111's modules/prompt_parser.py has it.
    """
    tokens = list(TOKEN.finditer(text))
    factors = _match_brackets(tokens)
    around: dict[str, list[float]] = {"(": [1.0], "[": [1.0]}  # products of the brackets that are open
    pieces: list[tuple[str, float]] = []
    for i, match in enumerate(tokens):
        token = match[0]
        weight = around["("][-1] * around["["][-1]
        if i in factors and token in around:
            around[token].append(around[token][-1] * factors[i])
        elif i in factors:
            around[_opening(token)].pop()
        elif token[0] == "\\":
            pieces.append((token[1:], weight))
        else:
            *ended, last = BREAK_WORD.split(token)
            for text_before in ended:
                pieces += [(text_before.rstrip(), weight), (BREAK[0], BREAK[1] * weight)]
            pieces.append((last, weight))
    runs = groupby(pieces, key=lambda piece: piece[1])
    return [("".join(piece for piece, _ in run), weight) for weight, run in runs] or [("", 1.0)]


def _match_brackets(tokens: list[re.Match[str]]) -> dict[int, float]:
    """The numbers of the tokens that are brackets, those never opened left out, and the factor of each."""
    factors: dict[int, float] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for i, match in enumerate(tokens):
        token = match[0]
        if token in opened:
            opened[token].append(i)
            factors[i] = ROUND if token == "(" else SQUARE
        elif token[-1] in ")]" and token[0] != "\\" and (openings := opened[_opening(token)]):
            opening = openings.pop()
            factors[i] = factors[opening] = float(match[1]) if match[1] else factors[opening]
    return factors


def _opening(closing: str) -> str:
    return "[" if closing == "]" else "("
