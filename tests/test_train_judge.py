"""The judge of shapes tells right pictures from wrong ones, in every kind of scene, worn or not."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from conftest import MEASURED
from PIL import Image, ImageFilter

from ldm.train.judge import judge, look
from ldm.train.shapes import (
    COLOURS,
    KINDS,
    NEW_SHAPES,
    PATTERNS,
    SHAPES,
    Background,
    Scene,
    Thing,
    draw_scene,
    thing_mask,
)

EACH = 15  # scenes of each kind and background; 2400 in all were tried with EACH = 200
SEED = 7
OPPOSITES = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def scenes(kind: str, pattern: str) -> list[Scene]:
    """Of all splits."""
    found, number = [], 0
    while len(found) < EACH:
        number += 1
        scene = draw_scene(SEED, number, "unseen" if number % 5 == 0 else "train", kind)
        if scene.background.pattern == pattern:
            found.append(scene)
    return found


def worn(picture: Image.Image, number: int) -> Image.Image:
    """Blurred by a pixel, with noise of 4 levels, and through JPEG at quality 85."""
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), dtype=float)
    noisy = pixels + np.random.default_rng(number).normal(0, 4, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return Image.open(buffer)


def wrong(scene: Scene) -> dict[str, Scene]:
    """Scenes with other captions: each has one attribute changed."""
    first, *rest = scene.things
    colours = {thing.colour for thing in scene.things} | set(scene.background.colours)
    other, another, *_ = (colour for colour in COLOURS if colour not in colours)

    def with_first(**changes: str) -> Scene:  # equal things stay equal
        changed = [replace(thing, **changes) for thing in (rest if scene.relation == "count" else ())]
        return replace(scene, things=(replace(first, **changes), *(changed or rest)))

    background = scene.background
    patterns = [pattern for pattern in PATTERNS if pattern != background.pattern]
    pattern = Random(scene.content()).choice(patterns)
    painted = (*background.colours, another)[: 1 if pattern == "plain" else 2]
    shape = Random(scene.content()).choice([shape for shape in (*SHAPES, *NEW_SHAPES) if shape != first.shape])
    changed = {
        "colour": with_first(colour=other),
        "shape": with_first(shape=shape),
        "background": replace(scene, background=replace(background, colours=(other, *background.colours[1:]))),
        "pattern": replace(scene, background=Background(pattern, painted)),
        "count": miscounted(scene, other),
    }
    if scene.tells_size:
        changed["size"] = with_first(size={"small": "large", "large": "small"}[first.size])
    if scene.relation in OPPOSITES:
        changed["relation"] = replace(scene, relation=OPPOSITES[scene.relation])
    elif scene.relation in ("inside", "row"):
        changed["relation"] = replace(scene, things=scene.things[::-1])
    if background.pattern == "gradient":
        changed["order"] = replace(scene, background=replace(background, colours=background.colours[::-1]))
    if len({(thing.size, thing.colour, thing.shape) for thing in scene.things}) > 1:
        swapped = (replace(first, shape=rest[0].shape), replace(rest[0], shape=first.shape), *rest[1:])
        changed["binding"] = replace(scene, things=swapped)
    return {name: each for name, each in changed.items() if each.content() != scene.content()}


@pytest.fixture(scope="module")
def pictures() -> list[tuple[Scene, Image.Image]]:
    return [(scene, scene.draw()) for kind in KINDS for pattern in PATTERNS for scene in scenes(kind, pattern)]


@pytest.mark.parametrize(("wear", "bound"), [(False, 0.99), (True, 0.97)])
def test_right_pictures_are_right(pictures, wear, bound):
    shown = [worn(picture, i) if wear else picture for i, (_, picture) in enumerate(pictures)]
    judge(shown[0], pictures[0][0])  # what is computed once
    start = time.process_time()
    verdicts = [judge(picture, scene) for picture, (scene, _) in zip(shown, pictures, strict=True)]
    seconds = (time.process_time() - start) / len(shown)
    share = sum(verdict.right for verdict in verdicts) / len(verdicts)
    kind = "worn" if wear else "clean"
    MEASURED.append(f"judge, {kind} pictures: {share:.1%} of {len(shown)} right, {1000 * seconds:.0f} ms each")
    assert share >= bound
    assert seconds < 0.1  # a fifth of that on an idle machine


@pytest.mark.parametrize("wear", [False, True])
def test_wrong_captions_are_wrong(pictures, wear):
    results: dict[str, list[bool]] = {}
    for i, (scene, picture) in enumerate(pictures[::3]):
        for name, other in wrong(scene).items():
            verdict = judge(worn(picture, i) if wear else picture, other)
            results.setdefault(name, []).append(not verdict.right)
    found = [each for shares in results.values() for each in shares]
    MEASURED.append(
        f"judge, wrong captions of {'worn' if wear else 'clean'} pictures: {np.mean(found):.1%} of {len(found)} found; "
        + ", ".join(f"{name} {np.mean(shares):.0%}" for name, shares in results.items())
    )
    assert np.mean(found) >= 0.99
    assert all(np.mean(shares) >= 0.95 for shares in results.values())


def miscounted(scene: Scene, colour: str) -> Scene:
    """With a thing more, or one less."""
    first, *rest = scene.things
    if scene.relation == "count":
        return replace(scene, things=(first,) * (3 if len(rest) == 1 else 2))
    if not rest:
        return replace(scene, things=(first, replace(first, colour=colour)), relation="left of")
    return replace(scene, things=(first, *rest[:-1]), relation="left of" if rest[1:] else None)


SWAPS = {"colour": "colours", "shape": "shapes", "size": "sizes", "background": "background", "relation": "relation"}


@pytest.mark.parametrize("attribute", SWAPS)
def test_the_verdict_names_what_is_wrong(pictures, attribute):
    """And nothing else, of a scene where things are told apart by more than one attribute."""
    scene, picture = next(
        (scene, picture)
        for scene, picture in pictures
        if scene.relation in OPPOSITES and scene.tells_size and len({thing.shape for thing in scene.things}) == 2
    )
    verdict = judge(picture, wrong(scene)[attribute])
    flags = {name: getattr(verdict, name) for name in ("background", "count", *SWAPS.values())}
    assert [name for name, flag in flags.items() if flag is False] == [SWAPS[attribute]]


@pytest.mark.parametrize("side", [64, 192, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_other_sizes(kind, side):
    chosen = [scene for pattern in PATTERNS for scene in scenes(kind, pattern)[:5]]
    assert sum(judge(scene.draw(side), scene).right for scene in chosen) >= len(chosen) - 1


@pytest.mark.parametrize("shape", [*SHAPES, *NEW_SHAPES])
def test_what_is_found_is_what_was_drawn(shape):
    """Colour, shape, place and radius of things anywhere, the shape that training never shows included."""
    random = Random(shape)
    for _ in range(5):
        radius = random.uniform(0.09, 0.3)
        thing = Thing(shape, "blue", "", *(random.uniform(1.15 * radius, 1 - 1.15 * radius) for _ in "xy"), radius)
        background, [found] = look(Scene((thing,), Background("striped", ("white", "red"))).draw())
        assert background == Background("striped", ("white", "red"))
        assert (found.shape, found.colour) == (shape, "blue")
        ys, xs = np.nonzero(np.asarray(thing_mask(thing, 128)) > 127)
        middle = [(each.min() + each.max() + 1) / 256 for each in (xs, ys)]
        assert [found.x, found.y] == pytest.approx(middle, abs=0.02)
        assert found.radius == pytest.approx(radius, rel=0.06)


def test_a_ring_shows_what_is_around():
    """A ring inside a square is one thing in another: the square that shows through it is no third."""
    square = Thing("square", "blue", "large", 0.5, 0.5, 0.38)
    ring = Thing("ring", "pink", "small", 0.5, 0.5, 0.14)
    _, found = look(Scene((ring, square), Background("plain", ("white",)), "inside").draw())
    assert [(each.shape, each.colour) for each in found] == [("square", "blue"), ("ring", "pink")]


def test_stripes_may_begin_with_either_colour():
    scene = Scene((Thing("star", "pink", "large", 0.5, 0.5, 0.38),), Background("striped", ("white", "red")))
    turned = replace(scene, background=Background("striped", ("red", "white")))
    assert judge(turned.draw(), scene).right


@pytest.mark.parametrize("seed", range(3))
def test_noise_shows_nothing(seed):
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    assert look(noise)[0] is None
    assert not any(judge(noise, draw_scene(0, number)).right for number in range(20))


@pytest.mark.parametrize("colour", COLOURS)
def test_an_empty_picture_has_nothing_on_it(colour):
    background, things = look(Image.new("RGB", (128, 128), COLOURS[colour]))
    assert background == Background("plain", (colour,))
    assert things == []


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_a_picture_of_crumbs_is_judged(period):
    """Where nothing is large enough to be anything, or where there are far too many things."""
    y, x = np.indices((128, 128)) // period
    pixels = np.array(list(COLOURS.values()), dtype=np.uint8)[(3 * y + 7 * x + y * x) % len(COLOURS)]
    assert not judge(Image.fromarray(pixels), draw_scene(0, 0, kind="three")).right
