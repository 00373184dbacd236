"""`ldm plot`: axes are read, requests made and told apart, and the sheet has each picture in its place."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm import Request, StableDiffusion
from ldm.cli import main
from ldm.cli.plot import FIELDS, MAX_CELLS, NOTHING, Axis, described, read_axis, sheet
from ldm.errors import RequestError
from ldm.metadata import read_request


class Stub:
    """Draws a picture whose colour tells its request: red the steps, green the guidance, blue the seed."""

    name = "stub"

    def __init__(self):
        self.requests: list[Request] = []

    def complete(self, request: Request, image: None = None, mask: None = None) -> Request:
        if request.steps == 999:
            raise RequestError("steps is 999: this model has fewer")
        chosen = {"width": 64, "height": 64, "cfg_scale": 7.5}
        given = {name: value for name in FIELDS if (value := getattr(request, name)) is not None}
        return Request(**chosen | given)

    def grid_length(self, request: Request) -> int:
        return request.steps

    def generate(self, request: Request, *args, **kwargs) -> list[Image.Image]:
        self.requests.append(request)
        colour = request.steps, int(request.cfg_scale), request.seed % 256
        return [Image.new("RGB", (request.width, request.height), colour)] * request.batch_size


@pytest.fixture
def stub(monkeypatch) -> Stub:
    stub = Stub()
    monkeypatch.setattr(StableDiffusion, "load", lambda *args, **kwargs: stub)
    return stub


def plot(capsys, *args: object) -> list[Path]:
    """Run `ldm plot` and return the paths it printed."""
    assert main(["plot", *map(str, args)]) == 0
    return [Path(line) for line in capsys.readouterr().out.splitlines()]


def colours(image: Image.Image) -> list[tuple[int, int, int]]:
    """Of the squares of one colour on a sheet, in the order of reading."""
    pixels = np.asarray(image).astype(int)
    solid = (pixels[:-1, :-1] == pixels[1:, 1:]).all(-1) & (pixels[:-1, :-1].max(-1) < 250)
    seen = {}
    for y, x in np.argwhere(solid):
        seen.setdefault(tuple(map(int, pixels[y, x])), []).append((y, x))
    squares = {colour: places for colour, places in seen.items() if len(places) == 63 * 63}
    return sorted(squares, key=lambda colour: squares[colour][0])


# Reading an axis


@pytest.mark.parametrize(
    ("text", "field", "values"),
    [
        ("steps=10,20,30", "steps", (10, 20, 30)),
        ("cfg-scale= 5, 7.5 ", "cfg_scale", (5.0, 7.5)),
        ("sampler=DPM++ 2M Karras,Euler a", "sampler", ("DPM++ 2M Karras", "Euler a")),
        ('prompt="a red, round fruit",an egg', "prompt", ("a red, round fruit", "an egg")),
        ('prompt=say ""hi"",b', "prompt", ('say ""hi""', "b")),
        ('negative_prompt=,"a=b"', "negative_prompt", ("", "a=b")),
        ("schedule=none,karras", "schedule", (None, "karras")),
        ("eta=none,0.5", "eta", (None, 0.5)),
        ("exact_steps=true,false", "exact_steps", (True, False)),
        ("seed=0,18446744073709551615", "seed", (0, 2**64 - 1)),
    ],
)
def test_values_are_read_by_the_type_of_their_field(text, field, values):
    axis = read_axis(text)
    assert (axis.field, axis.values) == (field, values)
    assert not any("None" in label for label in axis.labels)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps", "use FIELD=VALUE,VALUE… with one of prompt, negative_prompt, steps"),
        ("=1", "use FIELD=VALUE"),
        ("colour=1,2", "use FIELD=VALUE"),
        ("steps=1,two", "steps takes values of type int"),
        ("steps=1,,2", "steps takes values of type int"),
        ("steps=", "no value is given"),
        ("steps=none", "steps takes values of type int"),
        ("cfg_scale=x", "cfg_scale takes values of type float"),
        ("exact_steps=yes", "exact_steps takes true or false"),
        ('prompt="a', "as in a line of CSV"),
        ('prompt="a"b', "as in a line of CSV"),
        ("prompt=a\nb", "as in a line of CSV"),
        ("prompt=" + "a" * 200_000, "as in a line of CSV"),
        ("seed=" + "9" * 100_000, "seed takes values of type int"),
    ],
)
def test_faults_of_an_axis_are_one_line(text, expected):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        read_axis(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@given(st.text(), st.sampled_from(sorted(FIELDS)))
def test_any_text_is_an_axis_or_one_fault(text, name):
    for candidate in (text, f"{name}={text}"):
        try:
            axis = read_axis(candidate)
        except argparse.ArgumentTypeError as error:
            assert str(error).isprintable()
        else:
            assert len(axis.labels) == len(axis.values) > 0


@given(st.lists(st.text("abc,\"' \t=é").map(str.strip), min_size=1))
def test_quoted_values_come_back_as_they_were(values):
    quoted = ",".join('"' + value.replace('"', '""') + '"' for value in values)
    assert read_axis(f"prompt={quoted}").values == tuple(values)


# Putting values into a request


def test_a_prompt_axis_replaces_in_both_prompts():
    given = {"prompt": "a red ball, red sky", "negative_prompt": "not red", "steps": 5}
    axis = Axis("prompt", "red,blue", ("red", "blue"))
    assert axis.put("red", given) == given
    assert axis.put("blue", given) == {"prompt": "a blue ball, blue sky", "negative_prompt": "not blue", "steps": 5}
    assert Axis("steps", "7", (7,)).put(7, given) == given | {"steps": 7}
    assert NOTHING.put("", given) == given
    for sought in ("green", ""):
        with pytest.raises(RequestError, match=f"no prompt has '{sought}'"):
            Axis("prompt", "", (sought, "blue")).put("blue", given)


def test_axes_are_described_as_automatic1111_does():
    axes = [read_axis("steps=1,2"), read_axis('prompt="a, b",c'), NOTHING]
    assert described(axes) == (
        ', Script: X/Y/Z plot, X Type: steps, X Values: "1,2", Y Type: prompt, Y Values: "\\"a, b\\",c"'
    )


def test_a_sheet_has_each_cell_at_its_place():
    axes = [read_axis("steps=1,2,3"), read_axis("cfg_scale=1,2"), read_axis("seed=1,2")]
    cells = [Image.new("RGB", (64, 64), (x, y, z)) for z in (1, 2) for y in (1, 2) for x in (1, 2, 3)]
    made = sheet(cells, axes)
    assert colours(made) == [(x, y, z) for z in (1, 2) for y in (1, 2) for x in (1, 2, 3)]
    assert colours(sheet(cells[:3], [axes[0], NOTHING, NOTHING])) == [(1, 1, 1), (2, 1, 1), (3, 1, 1)]


# The command


def test_every_combination_is_drawn_once_saved_and_placed(capsys, tmp_path, stub):
    paths = plot(
        capsys, "-p", "a", "--seed", 4, "--x", "steps=10,20,30", "--y", "cfg-scale=5,7", "--z", "seed=8,9",
        "--outdir", tmp_path,
    )  # fmt: skip
    expected = [(steps, cfg, seed) for seed in (8, 9) for cfg in (5, 7) for steps in (10, 20, 30)]
    assert [(r.steps, r.cfg_scale, r.seed) for r in stub.requests] == expected
    assert [path.name for path in paths] == [
        *(f"{i:05d}-{seed}.png" for i, (_, _, seed) in enumerate(expected)), "00012-plot.png"
    ]  # fmt: skip
    assert [read_request(path) for path in paths[:-1]] == stub.requests
    with Image.open(paths[-1]) as made:
        assert colours(made) == expected
        text = made.info["parameters"]
    assert text.startswith("a\nSteps: 10, ")
    assert text.endswith(
        'Script: X/Y/Z plot, X Type: steps, X Values: "10,20,30", Y Type: cfg_scale, Y Values: "5,7", '
        'Z Type: seed, Z Values: "8,9"'
    )


def test_samplers_and_prompts_take_turns(capsys, tmp_path, stub):
    plot(
        capsys, "-p", "a red ball", "-n", "red", "--x", "sampler=DPM++ 2M Karras,Euler a", "--y", "prompt=red,blue",
        "--z", "negative_prompt=red,green", "--outdir", tmp_path,
    )  # fmt: skip
    made = [(r.sampler, r.schedule, r.prompt, r.negative_prompt) for r in stub.requests]
    assert made == [
        ("dpmpp_2m", "karras", "a red ball", "red"), ("euler_a", None, "a red ball", "red"),
        ("dpmpp_2m", "karras", "a blue ball", "blue"), ("euler_a", None, "a blue ball", "blue"),
        ("dpmpp_2m", "karras", "a red ball", "green"), ("euler_a", None, "a red ball", "green"),
        ("dpmpp_2m", "karras", "a blue ball", "green"), ("euler_a", None, "a blue ball", "green"),
    ]  # fmt: skip
    assert len({r.seed for r in stub.requests}) == 1  # a random one, but the same


def test_a_cell_holds_its_whole_batch(capsys, tmp_path, stub):
    paths = plot(capsys, "-p", "a", "--seed", 1, "--x", "batch_size=1,4", "--outdir", tmp_path)
    assert [path.name for path in paths] == [
        "00000-1.png", "00001-1.png", "00002-2.png", "00003-3.png", "00004-4.png", "00005-plot.png"
    ]  # fmt: skip
    with Image.open(paths[-1]) as made:
        assert made.height > 128


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "--x"),
        (["--x", "steps=1,2"], "a plot needs a --prompt"),
        (["-p", "a", "--x", "steps=1,2", "--grid"], "unrecognized arguments: --grid"),
        (["-p", "a", "--x", "steps=a"], "argument --x: 'steps=a': steps takes values of type int"),
        (["-p", "a", "--x", "steps=10,2000"], "steps is 2000: use a whole number from 1 to 1000"),
        (["-p", "a", "--x", "steps=10,20", "--y", "sampler=ddim,magic"], "sampler is 'magic'"),
        (["-p", "a", "--x", "eta=0,1", "--y", "sampler=ddim,plms"], "plms has none"),
        (["-p", "a", "--x", "steps=1", "--y", "steps=2"], "the axes are steps, steps: use each field once"),
        (["-p", "a", "--x", "prompt=b,c"], "no prompt has 'b'"),
        (["-p", "a", "--x", "prompt=a,<lora:ink:1>"], "no LoRA is called 'ink'"),
        (["-p", "a", "--x", "steps=" + "1," * MAX_CELLS + "1"], "the axes make 1001 pictures"),
        (["-p", "a", "--x", "steps=10,999"], "this model has fewer"),
        (["-p", "a", "--x", "width=8192", "--y", "height=8192", "--z", "seed=1,2,3,4,5"], "336 megapixels"),
        (["-p", "a", "--x", "hires_scale=1,8", "-W", "2048", "-H", "2048"], "273 megapixels"),
    ],
)
def test_faults_are_found_before_the_first_picture(capsys, tmp_path, stub, args, expected):
    assert main(["plot", "--outdir", str(tmp_path / "o"), *args]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert not stub.requests
    assert not (tmp_path / "o").exists()


def test_the_shipped_model_draws_a_plot(capsys, tmp_path, monkeypatch, shipped):
    monkeypatch.setattr(StableDiffusion, "load", lambda *args, **kwargs: shipped)
    paths = plot(
        capsys, "-p", "a large red circle on a blue background", "--seed", 1, "--x", "steps=1,2",
        "--y", "sampler=DDIM,Euler a", "--outdir", tmp_path,
    )  # fmt: skip
    assert len(paths) == 5
    cells = []
    for path in paths[:-1]:
        [again] = shipped.generate(read_request(path))
        cells.append(Image.open(path))
        assert again.tobytes() == cells[-1].tobytes()
    axes = [read_axis("steps=1,2"), read_axis("sampler=DDIM,Euler a"), NOTHING]
    assert Image.open(paths[-1]).tobytes() == sheet(cells, axes).tobytes()


def test_one_bar_counts_the_cells(capsys, tmp_path, stub):
    assert main(["plot", "-p", "a", "--x", "steps=1,2,3", "--outdir", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert "3/3" in err
    assert err.count("100%") == 1


def test_what_is_taken_is_not_written_over(capsys, tmp_path, stub):
    first = plot(capsys, "-p", "a", "--seed", 1, "--x", "steps=1,2", "--outdir", tmp_path)
    second = plot(capsys, "-p", "a", "--seed", 1, "--x", "steps=1,2", "--outdir", tmp_path)
    assert len({*first, *second}) == 6
    assert second[-1].name == "00005-plot.png"
