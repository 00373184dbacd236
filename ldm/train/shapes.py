"""The shapes world: endless captioned pictures of coloured shapes, each a pure function of a seed and a number.

Small enough to learn on a plain CPU, and yet with everything that a text-to-image model is asked for: colours, shapes,
sizes, places, counts, backgrounds, in many wordings. Everything is drawn here; there is no data to download.

Some pairs of a colour and a shape (`UNSEEN`) never occur in training, so that it can be told whether a model composes
what it has learned; and a tenth of all other scenes is held out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from PIL import Image, ImageDraw

from ldm.request import MAX_SIZE

COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (250, 220, 50),
    "orange": (250, 130, 30), "purple": (140, 60, 180), "pink": (250, 150, 190), "white": (245, 245, 245),
    "black": (25, 25, 25), "brown": (130, 80, 45),
}  # fmt: skip

Point = tuple[float, float]
Outline = list[Point]


def polygon(corners: int, radius: float = 1.0, turn: float = 0.0, centre: Point = (0.0, 0.0)) -> Outline:
    """The corners of a regular polygon, clockwise; the first points up, `turn` of a full turn later."""
    angles = [2 * math.pi * (i / corners + turn) for i in range(corners)]
    return [(centre[0] + radius * math.sin(angle), centre[1] - radius * math.cos(angle)) for angle in angles]


def star(points: int = 5, inner: float = 0.45) -> Outline:
    pairs = zip(polygon(points), polygon(points, inner, 0.5 / points), strict=True)
    return [corner for pair in pairs for corner in pair]


def heart() -> Outline:
    angles = [2 * math.pi * i / 64 for i in range(64)]
    x = [math.sin(a) ** 3 for a in angles]
    y = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(horizontal, -(vertical + 2.5) / 14.5) for horizontal, vertical in zip(x, y, strict=True)]


def cross(arm: float = 0.32) -> Outline:
    a = arm
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


# Outlines within the unit circle or nearly so, y downwards: what is filled, and what is cut out of it.
SHAPES: dict[str, tuple[Outline, Outline]] = {
    "circle": (polygon(96), []),
    "square": (polygon(4, 1.2, 0.125), []),
    "triangle": ([(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)], []),
    "star": (star(), []),
    "heart": (heart(), []),
    "diamond": ([(0.0, -1.05), (0.68, 0.0), (0.0, 1.05), (-0.68, 0.0)], []),
    "ring": (polygon(96), polygon(96, 0.55)),
    "cross": (cross(), []),
}
NEW_SHAPES = {"moon": (polygon(96), polygon(96, 0.85, centre=(0.5, -0.2)))}  # never in training: to be fine-tuned on

# One colour of each shape is kept from training, and each colour but two from one shape at most.
UNSEEN = frozenset(zip(("pink", "orange", "purple", "blue", "green", "red", "yellow", "brown"), SHAPES, strict=True))

SIZES = {1: {"small": 0.2, "large": 0.38}, 2: {"small": 0.125, "large": 0.19}, 3: {"small": 0.085, "large": 0.125}}
HOLDERS = ("circle", "square", "diamond", "heart")  # shapes that another fits into
STRIPES = 8  # across a picture
SUPERSAMPLING = 4
SIDES = range(8, MAX_SIZE + 1)  # pixels


@dataclass(frozen=True)
class Thing:
    """A shape in a picture; lengths are in sides of the picture, (0, 0) is its upper left corner."""

    shape: str
    colour: str
    size: str  # "small" or "large"
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Background:
    """Plain: one colour. Gradient: from the first at the top to the second. Striped: both in turn, from the top."""

    pattern: str
    colours: tuple[str, ...]

    def paint(self, side: int) -> Image.Image:
        first, last = COLOURS[self.colours[0]], COLOURS[self.colours[-1]]
        if self.pattern == "striped":
            rows = [first if row * STRIPES // side % 2 == 0 else last for row in range(side)]
        else:
            shares = [row / (side - 1) for row in range(side)]
            rows = [tuple(round(a + (b - a) * share) for a, b in zip(first, last, strict=True)) for share in shares]  # type: ignore[misc]
        column = Image.new("RGB", (1, side))
        column.putdata(rows)
        return column.resize((side, side), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    relation: that of the first of two things to the second; "row" for three from left to right, "count" for two or
    three that are equal, None for one alone.
    """

    things: tuple[Thing, ...]
    background: Background
    relation: str | None = None
    tells_size: bool = True  # whether the caption has it

    def draw(self, side: int = 128) -> Image.Image:
        """An RGB picture of side×side pixels, with smooth edges."""
        picture = self.background.paint(side)
        for thing in sorted(self.things, key=lambda thing: -thing.radius):  # what is inside is on top
            colour = Image.new("RGB", (side, side), COLOURS[thing.colour])
            picture.paste(colour, mask=thing_mask(thing, side))
        return picture

    def content(self) -> str:
        """What the caption tells, in one fixed wording: scenes that tell the same have the same."""
        things = [f"{thing.size if self.tells_size else ''} {thing.colour} {thing.shape}" for thing in self.things]
        return f"{self.relation}: {', '.join(things)}: {self.background.pattern} {' '.join(self.background.colours)}"

    def with_shape(self, shape: str) -> Scene:
        """The same, but for the shape of its first thing."""
        return replace(self, things=(replace(self.things[0], shape=shape), *self.things[1:]))

    def caption(self, random: Random | None = None) -> str:
        """One of many wordings; the plainest without `random`."""
        return caption_of(self, random)


def thing_mask(thing: Thing, side: int) -> Image.Image:
    """How much of each pixel a thing covers: (side, side), 0 to 255."""
    fine = side * SUPERSAMPLING
    mask = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(mask)
    for outline, value in zip({**SHAPES, **NEW_SHAPES}[thing.shape], (255, 0), strict=True):
        if outline:
            points = [(fine * (thing.x + thing.radius * x), fine * (thing.y + thing.radius * y)) for x, y in outline]
            draw.polygon(points, fill=value)
    return mask.reduce(SUPERSAMPLING)


# ---------------------------------------------------------------------------------------------------------- wording

PLURALS = {"cross": "crosses"}
NUMBERS = {2: "two", 3: "three"}
RELATIONS = {
    "above": ("{a} above {b}", "{a} over {b}", "{b} with {a} above it", "{b} below {a}"),
    "below": ("{a} below {b}", "{a} under {b}", "{b} with {a} below it", "{b} above {a}"),
    "left of": ("{a} to the left of {b}", "{a} left of {b}", "{b} to the right of {a}"),
    "right of": ("{a} to the right of {b}", "{a} right of {b}", "{b} to the left of {a}"),
    "inside": ("{a} inside {b}", "{b} with {a} inside it", "{b} around {a}"),
}
FRAMES = (
    "{things} on {background}",
    "a picture of {things} on {background}",
    "{things}, {background}",
    "{background} with {things} on it",
    "{background}, and on it {things}",
    "a drawing of {things} in front of {background}",
)
BACKGROUNDS = {
    "plain": ("a {0} background", "a plain {0} background"),
    "gradient": ("a {0} to {1} gradient background", "a background that fades from {0} to {1}"),
    "striped": ("a {0} and {1} striped background", "a background of {0} and {1} stripes"),
}
PLAINEST = 0.4  # how often a choice is the first of its list


def caption_of(scene: Scene, random: Random | None) -> str:
    """What a scene shows, in words; the first of every list of wordings without `random`."""

    def choose(options: tuple[str, ...]) -> str:
        return options[0] if random is None or random.random() < PLAINEST else random.choice(options)

    background = choose(BACKGROUNDS[scene.background.pattern]).format(*scene.background.colours)
    words = [_words(thing, scene.tells_size) for thing in scene.things]
    if scene.relation == "count":
        _, *adjectives, shape = words[0].split()
        things = " ".join([NUMBERS[len(words)], *adjectives, PLURALS.get(shape, f"{shape}s")])
    elif scene.relation in RELATIONS:
        things = choose(RELATIONS[scene.relation]).format(a=words[0], b=words[1])
    elif scene.relation == "row":
        things = "{}, {} and {} in a row".format(*words)
    else:
        things = words[0]
    return choose(FRAMES).format(things=things, background=background).replace("a orange", "an orange")


def _words(thing: Thing, tells_size: bool) -> str:
    return " ".join(["a", *([thing.size] if tells_size else []), thing.colour, thing.shape])


# ------------------------------------------------------------------------------------------------------------ chance

KINDS = {"one": 0.4, "two": 0.4, "count": 0.1, "three": 0.1}  # of scenes, and how often each is drawn
TELLS_SIZE = {"one": 0.8, "two": 0.3, "inside": 0.3, "count": 0.3, "three": 0.0}  # how often captions do
PATTERNS = {"plain": 0.7, "gradient": 0.15, "striped": 0.15}
SPLITS = ("train", "test", "unseen")
HELD_OUT_SHARE = 10  # one in so many scenes is never trained on


def draw_scene(seed: int, number: int, split: str = "train", kind: str | None = None) -> Scene:
    """Scene `number` of the world with this seed.

    split: "train"; "test", whose scenes are never in "train" though all they consist of is; or "unseen", whose first
    thing is a pair of colour and shape that is never in either. kind: one of LAYOUTS; of KINDS, by chance, where not
    given.
    """
    random = Random(f"{seed} {number} {split} {kind}")
    while True:
        scene = _any_scene(random, kind or _weighted(random, KINDS))
        if split_of(scene) == split:
            return scene


def split_of(scene: Scene) -> str:
    """Of SPLITS; "unseen" where the first thing, and no other, is of UNSEEN. "none" for what is never drawn."""
    unseen = [(thing.colour, thing.shape) in UNSEEN for thing in scene.things]
    if any(unseen):
        alone = unseen[0] and (scene.relation == "count" or not any(unseen[1:]))
        return "unseen" if alone else "none"
    return "test" if zlib.crc32(scene.content().encode()) % HELD_OUT_SHARE == 0 else "train"


def _weighted(random: Random, weights: dict[str, float]) -> str:
    return random.choices(list(weights), list(weights.values()))[0]


def _any_scene(random: Random, kind: str) -> Scene:
    pattern = _weighted(random, PATTERNS)
    colours = random.sample(list(COLOURS), 5)  # all different, so that nothing hides
    background = Background(pattern, tuple(colours[: 1 if pattern == "plain" else 2]))
    tells_size = random.random() < TELLS_SIZE[kind]
    things, relation = LAYOUTS[kind](random, colours[2:])
    return Scene(things, background, relation, tells_size)


Layout = tuple[tuple[Thing, ...], str | None]


def _place(random: Random, colour: str, x: float, y: float, crowd: int, **chosen: str) -> Thing:
    """A thing near (x, y), smaller and more exactly there in a crowd; shape and size by chance unless chosen."""
    shape = chosen.get("shape") or random.choice(list(SHAPES))
    size = chosen.get("size") or random.choice(("small", "large"))
    slack = {1: 0.06, 2: 0.02, 3: 0.01}[crowd]  # little enough for equal things not to touch
    radius = SIZES[crowd][size] * random.uniform(0.93, 1.07)
    return Thing(shape, colour, size, x + random.uniform(-slack, slack), y + random.uniform(-slack, slack), radius)


def _one(random: Random, colours: list[str]) -> Layout:
    return (_place(random, colours[0], 0.5, 0.5, 1),), None


def _two(random: Random, colours: list[str]) -> Layout:
    relation = random.choice(list(RELATIONS))
    if relation == "inside":
        return _inside(random, colours)
    first, second = PLACES[relation]
    return (_place(random, colours[0], *first, 2), _place(random, colours[1], *second, 2)), relation


def _inside(random: Random, colours: list[str]) -> Layout:
    outer = _place(random, colours[1], 0.5, 0.5, 1, shape=random.choice(HOLDERS), size="large")
    inner = _place(random, colours[0], outer.x, outer.y, 3, size="large")
    return (replace(inner, size="small"), outer), "inside"


def _count(random: Random, colours: list[str]) -> Layout:
    places = random.choice((TWO_IN_A_ROW, THREE_IN_A_ROW))
    first = _place(random, colours[0], *places[0], len(places))
    rest = [_place(random, colours[0], *place, len(places), shape=first.shape, size=first.size) for place in places[1:]]
    return (first, *rest), "count"


def _three(random: Random, colours: list[str]) -> Layout:
    return tuple(
        _place(random, colour, *place, 3) for colour, place in zip(colours, THREE_IN_A_ROW, strict=True)
    ), "row"


TWO_IN_A_ROW: tuple[Point, ...] = ((0.26, 0.5), (0.74, 0.5))
THREE_IN_A_ROW: tuple[Point, ...] = ((0.18, 0.5), (0.5, 0.5), (0.82, 0.5))
PLACES = {
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "below": ((0.5, 0.74), (0.5, 0.26)),
    "left of": TWO_IN_A_ROW,
    "right of": TWO_IN_A_ROW[::-1],
}
LAYOUTS: dict[str, Callable[[Random, list[str]], Layout]] = {
    "one": _one,
    "two": _two,
    "inside": _inside,  # one of two's relations
    "count": _count,
    "three": _three,
}
