"""Prompts that change while a picture is made: `[from:to:when]`, and `[a|b]`, which takes turns."""

from __future__ import annotations

import logging
import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Union

log = logging.getLogger(__name__)

TOKEN = re.compile(r"\\.|[\\\[\]():|]|[^\\\[\]():|]+", re.DOTALL)
OPENING = {")": "(", "]": "["}
WHEN = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


@dataclass(frozen=True, slots=True)
class Edit:
    """`[before:after:when]`: `after` takes the place of `before` when step `when`, counted from 1, is over."""

    before: Node
    after: Node
    when: int


@dataclass(frozen=True, slots=True)
class Turns:
    """`[a|b|c]`: each step has the next."""

    options: Sequence[Node]


Node = Union[str, Edit, Turns, "Sequence[Node]"]


class _Bracket:
    """One that is open: itself and what is in it so far, and where in that the separators of its parts are."""

    __slots__ = ("cuts", "nodes")

    def __init__(self, opening: str):
        self.nodes: list[Node] = [opening]
        self.cuts: list[int] = []

    def separate(self, separator: str) -> None:
        self.cuts.append(len(self.nodes))
        self.nodes.append(separator)

    def parts(self) -> list[list[Node]]:
        return [self.nodes[before + 1 : after] for before, after in pairwise([0, *self.cuts, len(self.nodes)])]


def schedule(prompt: str, steps: int, done: int = 0) -> list[tuple[int, str]]:
    """The texts of a prompt, each with the number of the last step it holds for, counted from 1.

    `when` is a share of the steps if it is written with a point, else a number of steps. In a second pass over a
    picture, `done` is the steps of the first: numbers count on from there, and shares from 1. Whatever does not follow
    the grammar is text. As in AUTOMATIC1111's modules/prompt_parser.py, get_learned_conditioning_prompt_schedules;
    its grammar can read some unbalanced brackets in two ways, of which this is the one that keeps the most edits.
    Time is linear in the length of the texts.
    """
    reader = _Reader(steps, done)
    root = reader.read(prompt)
    if root is None:
        if "[" in prompt:
            log.warning(
                "%.100r has a | outside of [a|b], or ends in a backslash: as in AUTOMATIC1111, none of its brackets "
                "change the prompt over the steps; write that part without",
                prompt,
            )
        return [(steps, prompt)]
    changes = sorted(reader.changes)
    period = math.lcm(*reader.turns)
    ends = range(1, steps + 1) if reader.turns else sorted({*changes, steps})
    texts: dict[tuple[int, int], str] = {}  # by what they depend on, so that none is put together twice
    result = []
    for end in ends:
        key = bisect_left(changes, end), (end - 1) % period
        if key not in texts:
            texts[key] = _text_at(end, root)
        result.append((end, texts[key]))
    return result


def index_at(ends: Sequence[int], step: int) -> int:
    """Which of a schedule's texts holds during a step counted from 0; the last one after the end.

    AUTOMATIC1111 looks for a step counted from 0 among ends counted from 1 (reconstruct_cond_batch there), so that the
    first text holds for a step more than is written. So it does here: its users' pictures depend on it.
    """
    return min(bisect_left(ends, step), len(ends) - 1)


class _Reader:
    """Reads a prompt in one pass; a bracket that breaks the grammar makes text of itself and of all around it."""

    def __init__(self, steps: int, done: int):
        self.steps, self.done = steps, done
        self.changes: set[int] = set()  # after which steps an edit takes place
        self.turns: set[int] = set()  # of how many options there are

    def read(self, prompt: str) -> Node | None:
        """What the prompt is made of; None if the grammar has no place for something in it."""
        root: list[Node] = []
        open_: list[_Bracket] = []
        inside = root  # the innermost bracket that is open
        for token in TOKEN.findall(prompt):
            if token in ("(", "["):
                open_.append(_Bracket(token))
            elif token in (":", "|") and open_:
                open_[-1].separate(token)
            elif token in ("\\", "|"):
                return None
            elif token not in OPENING:
                inside.append(token)
            elif open_ and (node := self._close(open_[-1], token)) is not None:
                open_.pop()
                (open_[-1].nodes if open_ else root).append(node)
            elif not _give_up(open_, root):
                return None
            else:
                root.append(token)
            inside = open_[-1].nodes if open_ else root
        return root if _give_up(open_, root) else None

    def _close(self, bracket: _Bracket, closing: str) -> Node | None:
        """What a bracket is, or None if it is nothing."""
        nodes, cuts = bracket.nodes, bracket.cuts
        if nodes[0] != OPENING[closing]:
            return None
        if not cuts or (closing == ")" and len(cuts) == 1 and nodes[cuts[0]] == ":"):
            nodes.append(closing)
            return nodes
        separators = {nodes[cut] for cut in cuts}
        if closing == ")" or len(separators) > 1 or (":" in separators and len(cuts) > 2):
            return None
        parts = bracket.parts()
        if "|" in separators:
            self.turns.add(len(parts))
            return Turns(parts)
        if (when := _number(parts[-1])) is None:
            return None
        step = self._step(when)
        if step >= 1:
            self.changes.add(step)
        return Edit(parts[0] if len(parts) == 3 else "", parts[-2], step)

    def _step(self, when: str) -> int:
        value = (float(when) - (self.done > 0)) * self.steps if "." in when else float(when) - self.done
        return int(max(0.0, min(self.steps, value)))


def _give_up(open_: list[_Bracket], root: list[Node]) -> bool:
    """Make text of the brackets that are open; false if one holds a |, which no text may."""
    readable = not any(bracket.nodes[cut] == "|" for bracket in open_ for cut in bracket.cuts)
    root += [bracket.nodes for bracket in open_]
    open_.clear()
    return readable


def _number(nodes: Sequence[Node]) -> str | None:
    match = WHEN.fullmatch(nodes[0]) if len(nodes) == 1 and isinstance(nodes[0], str) else None
    return match and match[1]


def _text_at(step: int, root: Node) -> str:
    texts, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            texts.append(node)
        elif isinstance(node, Edit):
            waiting.append(node.before if step <= node.when else node.after)
        elif isinstance(node, Turns):
            waiting.append(node.options[(step - 1) % len(node.options)])
        else:
            waiting.extend(reversed(node))
    return "".join(texts)
