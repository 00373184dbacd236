"""The shapes world: what may occur in it, what never does, and that a number is a picture."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from ldm.errors import RequestError
from ldm.models.tokenizer import Tokenizer
from ldm.train.config import read_train_config
from ldm.train.data import open_examples
from ldm.train.shapes import COLOURS, KINDS, RELATIONS, SHAPES, UNSEEN, draw_scene, split_of, thing_mask
from ldm.train.vocabulary import learn_vocabulary

ROOT = Path(__file__).parent.parent
MANY = 3000


@pytest.fixture(scope="module")
def scenes():
    return {split: [draw_scene(0, number, split) for number in range(MANY)] for split in ("train", "test", "unseen")}


def test_a_number_is_a_scene(scenes):
    assert scenes["train"][7] == draw_scene(0, 7) != draw_scene(1, 7)
    assert np.array_equal(np.asarray(draw_scene(0, 7).draw()), np.asarray(draw_scene(0, 7).draw()))


def test_splits_share_no_content(scenes):
    contents = {split: {scene.content() for scene in found} for split, found in scenes.items()}
    assert not contents["train"] & contents["test"]
    assert all(split_of(scene) == split for split, found in scenes.items() for scene in found)


def test_unseen_pairs_never_occur_in_training(scenes):
    pairs = {split: {(t.colour, t.shape) for s in found for t in s.things} for split, found in scenes.items()}
    assert pairs["train"] == {(colour, shape) for colour in COLOURS for shape in SHAPES} - UNSEEN
    assert pairs["test"] <= pairs["train"]
    assert {(s.things[0].colour, s.things[0].shape) for s in scenes["unseen"]} == UNSEEN
    assert len({colour for colour, _ in UNSEEN}) == len({shape for _, shape in UNSEEN}) == len(SHAPES)


def test_everything_occurs_in_training(scenes):
    train = scenes["train"]
    assert {s.relation for s in train} == {None, "count", "row", *RELATIONS}
    assert Counter(s.background.pattern for s in train)["plain"] == pytest.approx(0.7 * MANY, rel=0.1)
    assert {colour for s in train for colour in s.background.colours} == set(COLOURS)
    for kind in KINDS:
        scene = draw_scene(3, 3, kind=kind)
        assert scene == draw_scene(3, 3, kind=kind)
        assert len(scene.things) in {"one": {1}, "two": {2}, "count": {2, 3}, "three": {3}}[kind]


def test_everything_is_within_the_picture_and_apart(scenes):
    for scene in scenes["train"][:300]:
        masks = [np.asarray(thing_mask(thing, 128)) for thing in scene.things]
        assert all(mask[0].max() == mask[-1].max() == mask[:, 0].max() == mask[:, -1].max() == 0 for mask in masks)
        if scene.relation == "inside":
            inner, outer = masks
            assert outer[inner > 0].min() == 255
        else:
            assert sum((mask > 0).astype(int) for mask in masks).max() == 1


def test_colours_are_those_of_the_palette(scenes):
    scene = next(s for s in scenes["train"] if s.background.pattern == "plain" and s.relation is None)
    pixels = np.asarray(scene.draw())
    assert tuple(pixels[0, 0]) == COLOURS[scene.background.colours[0]]
    covered = np.asarray(thing_mask(scene.things[0], 128)) == 255
    assert (pixels[covered] == COLOURS[scene.things[0].colour]).all()


def test_captions(scenes):
    captions = [scene.caption(Random(i)) for i, scene in enumerate(scenes["train"])]
    assert draw_scene(0, 0, kind="one").caption().endswith("background")
    assert not [caption for caption in captions if "a orange" in caption or "  " in caption]
    assert len({caption.split()[0] for caption in captions}) > 3
    for scene in scenes["train"][:500]:
        words = scene.caption(Random(1)).replace(",", "").split()
        told = {scene.things[0].colour, *scene.background.colours, *(thing.colour for thing in scene.things)}
        assert told <= set(words)
        assert not scene.tells_size or scene.things[0].size in words


def test_the_vocabulary_of_the_shipped_model():
    """Each word of a caption is one token, and every caption fits into the text encoder."""
    config = read_train_config(ROOT / "configs" / "shapes.toml")
    text = config.networks.text
    examples = open_examples("shapes", seed=config.data.seed, count=5000)
    captions = [examples.caption(number) for number in range(5000)]
    tokenizer = Tokenizer(*learn_vocabulary(captions, text.vocab_size), text.max_length)
    assert len(tokenizer.vocabulary) == text.vocab_size
    lengths = [2 + len(ids) for ids in tokenizer.encode(captions)]
    assert max(lengths) <= text.max_length
    assert lengths == [2 + len(caption.replace(",", " ,").split()) for caption in captions]
    assert tokenizer.decode(*tokenizer.encode(["Zebra 7!"])).replace(" ", "") == "zebra7!"


def test_a_vocabulary_needs_words():
    with pytest.raises(RequestError, match=r"words for 516 tokens"):
        learn_vocabulary(["a cat"], 600)


def test_drawing_a_folder(tmp_path):
    folder = tmp_path / "new" / "moons"
    command = [sys.executable, str(ROOT / "scripts" / "draw_shapes.py"), str(folder), "--count", "3", "--shape", "moon"]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all("moon" in line["text"] for line in lines)
    assert len(open_examples(str(folder))) == 3
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (2, f"draw_shapes: {folder} exists: give a new folder\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["taken"], "taken exists: give a new folder"),
        (["file.safetensors"], "file.safetensors exists: give a new folder"),
        (["link"], "link exists: give a new folder"),
        (["."], ". exists: give a new folder"),
        (["file.safetensors/new"], "file.safetensors/new: Not a directory"),
        (["/proc/new"], "/proc/new: "),
        (["x" * 300], f"{'x' * 300}: File name too long"),
        (["new", "--side", "100000"], "--count is 20 and --side 100000: use 1 or more, and 8 to 8192"),
        (["new", "--side", "7"], "--count is 20 and --side 7: use 1 or more, and 8 to 8192"),
    ],
)
def test_what_cannot_be_written_is_not_drawn(tmp_path, monkeypatch, capsys, arguments, message):
    main = runpy.run_path(str(ROOT / "scripts" / "draw_shapes.py"))["main"]
    monkeypatch.setitem(main.__globals__, "draw_scene", lambda *_: pytest.fail("it draws"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    (tmp_path / "file.safetensors").touch()
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"draw_shapes: {message}") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_leaves_no_folder(tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "draw_shapes.py"))["main"]

    def fail(*_):
        raise RequestError("it fails")

    monkeypatch.setitem(main.__globals__, "draw_scene", fail)
    assert main([str(tmp_path / "new" / "moons")]) == 2
    assert list(tmp_path.iterdir()) == []
