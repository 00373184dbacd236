"""Whether a picture shows what a scene of the shapes world says, measured by its pixels; no network is asked.

What is in the picture is found first, without a look at the scene: one of the world's backgrounds, and things on it
with a colour, a shape, a size and a place. Then it is compared with what the caption tells, so that a thing may be
anywhere that the caption allows. Needs scipy, which the extra `evaluate` brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from PIL import Image

from ldm.train.shapes import COLOURS, NEW_SHAPES, PATTERNS, SHAPES, SIZES, Background, Scene, Thing, thing_mask

Array = np.ndarray

SIDE = 128  # of the picture that is looked at: others are resized to it
BORDER = 2  # columns at each side that mostly show the background
FAR = 60.0  # RGB distance from which a pixel is something else than a candidate for the background
STRANGE = 40.0  # mean RGB distance, none counted as more than FAR, from which a border is of no background there is
LEAST_AREA = 50  # pixels of a thing: the world's smallest has three times as many
SPECK = 0.8 * min(SIZES[3].values())  # radius up to which what has no shape is no thing: a broad edge, say
LEAST_LIKENESS = 0.5  # intersection over union with the most similar shape, below which it is none
MOST_PAIRED = 6  # things, the largest, of a picture that has too many
TEMPLATE, REACH = 64, 2.0  # pixels along a side, and what they reach from the middle, in radii of a circle as large


@dataclass(frozen=True)
class Verdict:
    """What of a caption a picture shows; None for what the caption does not tell."""

    background: bool
    count: bool
    colours: bool
    shapes: bool
    sizes: bool | None
    relation: bool | None

    @property
    def right(self) -> bool:
        return False not in astuple(self)


@dataclass(frozen=True, eq=False)
class Found:
    """A thing in a picture; lengths are in sides of the picture, (0, 0) is its upper left corner."""

    shape: str | None  # None: unlike every shape
    colour: str
    x: float
    y: float
    radius: float
    outline: Array  # (SIDE, SIDE) bool, holes filled


def judge(picture: Image.Image, scene: Scene) -> Verdict:
    """Compare a picture, RGB and of any size, with what the caption of a scene tells.

    Found things are paired with told ones so that most is right. Stripes may begin with either colour: the caption
    does not tell which.
    """
    background, found = look(picture)
    told = len(scene.things)
    pairings = permutations([*found[:MOST_PAIRED], *[None] * (told - len(found))], told)
    attributes = max((_compare(scene, pairing) for pairing in pairings), key=lambda each: sum(map(bool, each.values())))
    return Verdict(background=_same(background, scene.background), count=len(found) == told, **attributes)


def _same(found: Background | None, told: Background) -> bool:
    if found is None or found.pattern != told.pattern:
        return False
    if told.pattern == "striped":
        return set(found.colours) == set(told.colours)
    return found.colours == told.colours


def _compare(scene: Scene, pairing: Sequence[Found | None]) -> dict[str, Any]:
    found = [each for each in pairing if each is not None]
    whole = len(found) == len(pairing)
    pairs = [(told, each) for told, each in zip(scene.things, pairing, strict=True) if each is not None]
    crowd = 1 if scene.relation == "inside" else len(scene.things)
    return {
        "colours": whole and all(told.colour == each.colour for told, each in pairs),
        "shapes": whole and all(told.shape == each.shape for told, each in pairs),
        "sizes": whole and all(told.size == size_of(each, crowd) for told, each in pairs) if scene.tells_size else None,
        "relation": whole and RELATES[scene.relation](found) if scene.relation in RELATES else None,
    }


def size_of(found: Found, crowd: int) -> str:
    """Which of the sizes of so many things is nearer, by ratio."""
    small, large = SIZES[crowd]["small"], SIZES[crowd]["large"]
    return "large" if found.radius**2 > small * large else "small"


def _beside(lower: Found, higher: Found, along: str, across: str) -> bool:
    """Whether two things are in this order along one axis, and further from each other than along the other axis."""
    distance = getattr(higher, along) - getattr(lower, along)
    return distance > abs(getattr(higher, across) - getattr(lower, across))


def _inside(inner: Found, outer: Found) -> bool:
    return bool((inner.outline & outer.outline).sum() > 0.9 * inner.outline.sum()) and inner.radius < outer.radius


RELATES = {
    "above": lambda found: _beside(found[0], found[1], "y", "x"),
    "below": lambda found: _beside(found[1], found[0], "y", "x"),
    "left of": lambda found: _beside(found[0], found[1], "x", "y"),
    "right of": lambda found: _beside(found[1], found[0], "x", "y"),
    "inside": lambda found: _inside(found[0], found[1]),
    "row": lambda found: _beside(found[0], found[1], "x", "y") and _beside(found[1], found[2], "x", "y"),
}


# ----------------------------------------------------------------------------------------------------------- looking


def look(picture: Image.Image) -> tuple[Background | None, list[Found]]:
    """What a picture shows: its background, None if it is of none there is, and the things on it, largest first."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    background, fits, rows = _find_background(pixels)
    things = _find_things(_label(pixels, rows, [name for name in COLOURS if name not in background.colours]))
    return background if fits else None, things


@cache
def _backgrounds() -> tuple[list[Background], Array]:
    """All there are, and the colours of their rows (n, SIDE, 3)."""
    pairs = list(permutations(COLOURS, 2))
    backgrounds = [Background("plain", (colour,)) for colour in COLOURS]
    backgrounds += [Background(pattern, pair) for pattern in PATTERNS if pattern != "plain" for pair in pairs]
    rows = [np.asarray(background.paint(SIDE))[:, 0] for background in backgrounds]
    return backgrounds, np.stack(rows).astype(np.float32)


@cache
def _shares(pattern: str) -> Array:
    """How much of each of its colours is in each row of a pattern: (SIDE, 1 or 2)."""
    if pattern == "plain":
        return np.ones((SIDE, 1))
    greys = np.asarray(Background(pattern, ("white", "black")).paint(SIDE))[:, :1, 0].astype(np.float32)
    first = (greys - greys.min()) / (greys.max() - greys.min())
    return np.concatenate([first, 1 - first], axis=1)


def _find_background(pixels: Array) -> tuple[Background, bool, Array]:
    """The background that the border of (SIDE, SIDE, 3) shows best, whether well, and its rows' colours (SIDE, 3).

    Its own colours are fitted to the border, since they may be a little off.
    """
    candidates, rows = _backgrounds()
    sides = np.stack([pixels[:, :BORDER].mean(axis=1), pixels[:, -BORDER:].mean(axis=1)], axis=1)  # (SIDE, 2, 3)
    distance = np.sqrt(((sides - rows[:, :, None]) ** 2).sum(axis=-1))  # (n, SIDE, 2)
    misfit = np.minimum(distance, FAR).mean(axis=(1, 2))
    best = int(misfit.argmin())
    if misfit[best] > STRANGE:
        return candidates[best], False, rows[best]
    y, x = np.nonzero(distance[best] < FAR)
    shares = _shares(candidates[best].pattern)
    return candidates[best], True, shares @ np.linalg.lstsq(shares[y], sides[y, x], rcond=None)[0]


def _label(pixels: Array, rows: Array, colours: Sequence[str]) -> Array:
    """What each pixel of (SIDE, SIDE, 3) shows: "" is the background, else one of `colours`. (SIDE, SIDE)

    Edges pass through colours of neither side, and noise makes specks: what is small or thin becomes what is beside it.
    """
    from scipy import ndimage

    palette = np.array([COLOURS[colour] for colour in colours], dtype=np.float32)
    ground = (rows**2).sum(axis=1)[:, None] - 2 * (pixels * rows[:, None]).sum(axis=-1)  # squared distance, less that
    others = (palette**2).sum(axis=1) - 2 * pixels @ palette.T  # of the pixel itself to black
    labels = np.concatenate([ground[..., None], others], axis=-1).argmin(axis=-1)
    even = ndimage.minimum_filter(labels, 3) == ndimage.maximum_filter(labels, 3)
    labels = _spread(labels, (labels == 0) | ndimage.maximum_filter(even, 3))  # no thing is less than 3 pixels wide
    large = np.zeros(labels.shape, dtype=bool)
    for label in np.unique(labels):
        parts, _ = ndimage.label(labels == label)
        large |= (np.bincount(parts.ravel()) >= LEAST_AREA)[parts] & (parts > 0)
    return np.array(["", *colours])[_spread(labels, large)]


def _spread(labels: Array, known: Array) -> Array:
    """Each pixel as the nearest one that is known, or as background where none is."""
    from scipy import ndimage

    if not known.any():
        return np.zeros_like(labels)
    nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return labels[tuple(nearest)]


def _find_things(labels: Array) -> list[Found]:
    """What is on the background of labels (SIDE, SIDE), largest first."""
    from scipy import ndimage

    parts = []
    for label in np.unique(labels[labels != ""]):
        components, n = ndimage.label(labels == label)
        parts += [(label, components == i) for i in range(1, n + 1)]
    outlines = [ndimage.binary_fill_holes(part) for _, part in parts]
    found = []
    for (label, part), outline in zip(parts, outlines, strict=True):
        around = [
            (other.sum(), name)
            for (name, _), other in zip(parts, outlines, strict=True)
            if other is not outline and not (part & ~other).any()
        ]
        if any(name == label for _, name in around):
            continue  # it is what is around, seen through a ring
        ground = min(around)[1] if around else ""
        found.append(_measure(part | (outline & (labels != ground)), outline, str(label)))
    return sorted((each for each in found if each.shape or each.radius > SPECK), key=lambda each: -each.radius)


def _measure(mask: Array, outline: Array, colour: str) -> Found:
    """The shape most like a mask (SIDE, SIDE), by intersection over union, and the radius at which it has its area."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    fitted = _fit(mask)
    radii = {shape: np.sqrt(mask.sum() / area) for shape, area in _areas().items()}
    templates = {shape: _template(shape, round(max(radius, SPECK * SIDE))) for shape, radius in radii.items()}
    likeness = {shape: np.minimum(t, fitted).sum() / np.maximum(t, fitted).sum() for shape, t in templates.items()}
    best = max(likeness, key=likeness.__getitem__)
    return Found(
        shape=best if likeness[best] >= LEAST_LIKENESS else None,
        colour=colour,
        x=(int(columns[0]) + int(columns[-1]) + 1) / 2 / SIDE,
        y=(int(rows[0]) + int(rows[-1]) + 1) / 2 / SIDE,
        radius=float(radii[best]) / SIDE,
        outline=outline,
    )


@cache
def _areas() -> dict[str, float]:
    """The area of each shape at radius 1."""
    return {shape: _drawn(shape, 0.4 * SIDE).sum() / (0.4 * SIDE) ** 2 for shape in (*SHAPES, *NEW_SHAPES)}


def _drawn(shape: str, radius: float) -> Array:
    """The mask of a shape, from 0 to 1, with a radius in pixels."""
    return np.asarray(thing_mask(Thing(shape, "", "", 0.5, 0.5, radius / SIDE), SIDE)) / 255


@cache
def _template(shape: str, radius: int) -> Array:
    """What `_fit` makes of a shape with this radius in pixels, as `_label` leaves it: without its finest tips."""
    from scipy import ndimage

    return _fit(ndimage.binary_opening(_drawn(shape, radius) > 0.5, np.ones((3, 3))))


def _fit(mask: Array) -> Array:
    """A mask from 0 to 1 moved and scaled, by its centroid and area, so that shapes match where their tips are worn."""
    weight = mask.sum()
    x, y = ((mask.sum(axis=axis) @ (np.arange(SIDE) + 0.5)) / weight for axis in (0, 1))
    half = REACH * np.sqrt(weight / np.pi)
    picture = Image.fromarray((mask * 255).astype(np.uint8))
    box = (x - half, y - half, x + half, y + half)
    fitted = picture.transform((TEMPLATE, TEMPLATE), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return np.asarray(fitted) / np.float32(255)
