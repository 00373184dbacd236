"""The log of a run: what is written is there, a resumed log is an uninterrupted one, and curves lie as they should."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from ldm.errors import CheckpointError
from ldm.train import log as module
from ldm.train.log import COLOURS, Axis, Curve, RunLog, _outline, curves, cut, read_metrics, shown

SIDE, HEIGHT = 440, 275  # of a panel
PLOT = (62, 36 + 34, 440 - 18, 36 + 275 - 30)  # left, top, right, bottom of the first panel's


TENSORBOARD = module._tensorboard


@pytest.fixture(autouse=True)
def no_board(monkeypatch):
    """TensorBoard takes seconds to import, and two tests are about it."""
    monkeypatch.setattr(module, "_tensorboard", lambda folder, first_step: None)


def write(folder: Path, steps: dict[int, dict[str, float]], first_step: int = 0) -> Path:
    with closing(RunLog(folder, first_step)) as log:
        for step, values in steps.items():
            log.write(step, values)
    return folder / "metrics.jsonl"


def test_lines_are_there_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path / "new" / "run", 0)
    log.write(10, {"loss": 0.5, "rate": 1e-4})
    log.write(20, {"loss": 0.25})
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 10, "loss": 0.5, "rate": 1e-4}, {"step": 20, "loss": 0.25}]
    log.close()


def test_what_is_not_finite_is_null(tmp_path):
    metrics = write(tmp_path, {1: {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(2)}})
    assert metrics.read_text() == '{"step": 1, "a": null, "b": null, "c": null, "d": 2.0}\n'
    steps, values = read_metrics(metrics)["a"]
    assert steps.tolist() == [1]
    assert np.isnan(values).all()


NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)
RUNS = st.lists(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), NUMBERS, max_size=3), max_size=8)


@settings(deadline=None)
@given(RUNS, st.data())
def test_a_resumed_log_is_an_uninterrupted_one(tmp_path_factory, rows, data):
    folder = tmp_path_factory.mktemp("run")
    steps = {10 * i: {f"m/{name}": value for name, value in row.items()} for i, row in enumerate(rows)}
    whole = write(folder / "whole", steps).read_bytes()
    resumed_at = data.draw(st.integers(0, len(rows)))  # the last checkpoint's step, by its line
    lines = whole.splitlines(keepends=True)
    least = len(b"".join(lines[:resumed_at]))
    killed_at = data.draw(st.integers(least, len(whole)))  # a byte after the checkpoint's
    (folder / "cut").mkdir()
    (folder / "cut" / "metrics.jsonl").write_bytes(whole[:killed_at])
    rest = {step: values for step, values in steps.items() if step >= 10 * resumed_at}
    assert write(folder / "cut", rest, first_step=10 * resumed_at).read_bytes() == whole
    shutil.rmtree(folder)


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=20), st.sampled_from([
    b'{"step": 1}\n', b'{"step": 2, "a": 3}\n', b'{"step": 1e999, "a": 3}\n', b'{"step": true}\n', b'{"step": NaN}\n',
    b'{"a": 1}\n', b'{"step": 1, "a": "b"}\n', b'[' * 100_000 + b"\n", b"\n", b'{"step": 0.5}\n', b'{"step": null}\n',
    b'{"step": 3, "a": ' + b"9" * 5000 + b"}\n",
])), max_size=4))  # fmt: skip
def test_whatever_the_file_holds_it_is_cut_or_refused(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("run")
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(b"".join(parts))
    try:
        cut(metrics, 2)
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert metrics.read_bytes() == b"".join(parts)
    else:
        assert all(steps.max() < 2 for steps, _ in read_metrics(metrics).values())
        for line in metrics.read_bytes().splitlines():
            assert json.loads(line)["step"] < 2
    shutil.rmtree(folder)


def test_half_a_line_is_left_out_and_told(tmp_path, caplog):
    metrics = write(tmp_path, {1: {"a": 0.5}, 2: {"a": 0.25}})
    metrics.write_bytes(metrics.read_bytes()[:-5])
    with caplog.at_level(logging.INFO):
        cut(metrics, 5)
    assert metrics.read_text() == '{"step": 1, "a": 0.5}\n'
    assert "not finished" in caplog.text


def test_a_file_that_is_no_log_is_refused_with_the_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\nstep,loss\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"line 2 is .*step,loss.*move the file away"):
        RunLog(tmp_path, 0)


def test_cutting_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    metrics = write(tmp_path, {step: {"a": 1.0} for step in range(5)})
    before = metrics.read_bytes()

    def fail(*args):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="gone"):
        cut(metrics, 2)
    assert metrics.read_bytes() == before
    assert [path.name for path in tmp_path.glob("*.jsonl*")] == ["metrics.jsonl"]


def test_pictures_have_names_by_step_and_replace_those_of_the_same(tmp_path):
    with closing(RunLog(tmp_path, 0)) as log:
        log.picture(500, "samples", Image.new("RGB", (4, 4), "red"))
        log.picture(500, "samples", Image.new("RGB", (4, 4), "teal"))
    [path] = (tmp_path / "samples").iterdir()
    assert path.name == "samples-0000500.png"
    assert Image.open(path).tobytes() == Image.new("RGB", (4, 4), "teal").tobytes()


def test_curves_are_a_file_beside(tmp_path):
    with closing(RunLog(tmp_path, 0)) as log:
        log.write(0, {"a": 1.0})
        log.draw_curves()
        log.write(1, {"a": 2.0, "b": 3.0})
        log.draw_curves()
    assert Image.open(tmp_path / "curves.png").tobytes() == curves(tmp_path / "metrics.jsonl").tobytes()


def test_without_tensorboard_a_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_tensorboard", TENSORBOARD)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.INFO):
        write(tmp_path, {1: {"a": 1.0}})
    [record] = caplog.records
    assert "pip install tensorboard" in record.message
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_has_the_same_numbers_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(module, "_tensorboard", TENSORBOARD)
    for first_step in (0, 2):  # interrupted after step 3, resumed from step 2
        with closing(RunLog(tmp_path, first_step)) as log:
            for step in range(first_step, 4):
                log.write(step, {"loss": step + first_step / 8})
            log.picture(3, "samples", Image.new("RGB", (5, 3), "teal"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 2.25), (3, 3.25)]
    assert [(e.step, e.width, e.height) for e in events.Images("samples")] == [(3, 5, 3)]


# Curves


def strong(sheet: Image.Image, box: tuple[int, int, int, int] = PLOT, colour: str = COLOURS[0]) -> np.ndarray:
    """Where a part of a sheet has the colour of the smoothed line: (height, width)."""
    pixels = np.asarray(sheet.crop(box), dtype=float)
    return np.abs(pixels - ImageColor.getrgb(colour)).max(axis=2) < 60


def test_a_line_lies_where_its_axes_say(tmp_path):
    metrics = write(tmp_path, {step: {"ramp": 5 + step / 10} for step in range(0, 1001, 2)})
    sheet = curves(metrics)
    assert sheet.size == (SIDE, 36 + HEIGHT)
    ink = strong(sheet)
    height, width = ink.shape
    for x in range(10, width - 10, 25):
        fraction = ((x + 0.5) / width * 1.02 - 0.01) / 1  # of the steps, which have a hundredth of room at both ends
        expected = height * (1 - (fraction + 0.06) / 1.12)  # of the values, which have 6
        assert abs(np.flatnonzero(ink[:, x]).mean() + 0.5 - expected) < 1.5


def test_values_are_faint_and_the_smoothed_line_runs_through_their_middle(tmp_path):
    values = np.random.default_rng(0).normal(size=2000)
    metrics = write(tmp_path, {step: {"noise": float(value)} for step, value in enumerate(values)})
    sheet = curves(metrics)
    middle = np.argwhere(strong(sheet))[:, 0].mean() / (PLOT[3] - PLOT[1])
    assert abs(middle - 0.5) < 0.1
    coloured = np.ptp(np.asarray(sheet.crop(PLOT), dtype=float), axis=2) > 20
    assert coloured.mean() > 4 * strong(sheet).mean()


def test_no_spike_among_many_values_is_lost():
    steps = np.arange(40_000.0)
    values = np.where(steps == 20_000, 2, steps % 2)
    kept, outline = _outline(steps, values, steps / 40_000 * 1080)
    assert len(kept) <= 2 * 1080
    assert outline[kept == 20_000] == 2
    for column in (0, 539, 1079):
        assert {0, 1} <= set(outline[kept * 1080 // 40_000 == column])
    few = np.arange(5.0), np.array([3.0, 1.0, 2.0, 2.0, 0.0])
    assert all(np.array_equal(a, b) for a, b in zip(_outline(*few, 10 * few[0]), few, strict=True))


def test_a_panel_a_metric(tmp_path):
    names = ["a", "b", "c", "d", "e", "f", "g"]
    for count, (columns, rows) in {0: (1, 1), 1: (1, 1), 2: (2, 1), 3: (2, 2), 4: (2, 2), 7: (3, 3)}.items():
        run = {step: dict.fromkeys(names[:count], 0.1 * step) for step in range(3)}
        sheet = curves(write(tmp_path / str(count), run))
        assert sheet.size == (SIDE * columns, 36 + HEIGHT * rows)
        for i in range(count):
            x, y = i % columns * SIDE, i // columns * HEIGHT
            box = PLOT[0] + x, PLOT[1] + y, PLOT[2] + x, PLOT[3] + y
            assert strong(sheet, box, COLOURS[i % len(COLOURS)]).sum() > 300


def test_a_run_that_was_not_finite_is_marked_in_red(tmp_path):
    run = {step: {"loss": math.nan if step == 50 else 1.0 + step} for step in range(101)}
    sheet = curves(write(tmp_path, run))
    red = np.argwhere(strong(sheet, PLOT, "#d1242f"))
    width = PLOT[2] - PLOT[0]
    assert abs(red[:, 1].mean() - width / 2) < 1.5
    assert strong(sheet, (0, 36, SIDE, PLOT[1]), "#d1242f").sum() > 20  # and told beside the name
    assert strong(curves(write(tmp_path / "none", {1: {"loss": math.nan}})), (0, 36, SIDE, PLOT[1]), "#d1242f").any()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 10**9), NUMBERS), max_size=12))
def test_curves_can_be_drawn_of_anything(tmp_path_factory, points):
    folder = tmp_path_factory.mktemp("run")
    curves(write(folder, {step: {"a": value} for step, value in points}))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("values", "log"),
    [
        (np.geomspace(1, 1e-3, 100), True),
        (np.exp(-np.arange(100) / 5) + 0.01, True),
        (np.linspace(1, 2, 100), False),
        (np.linspace(1e-6, 1e-4, 100), False),
        (np.exp(-np.arange(100) / 5), True),
        (np.exp(-np.arange(100) / 5) - 0.001, False),  # below 0 at the end
        (np.exp(-np.arange(100) / 5) + 1, False),  # no decade, nothing to be seen
    ],
)
def test_logarithms_where_a_curve_would_hug_the_floor(values, log):
    curve = Curve(np.arange(100.0), values)
    assert curve.log == log
    assert curve.last == pytest.approx(values[-1], rel=0.05)


def test_smoothing_is_weighted_least_squares():
    """numpy's fit of a line at each of some steps, with the weights of a Gaussian of 1.5 % of the run."""
    steps = np.arange(0.0, 250.0)
    values = np.random.default_rng(0).normal(size=250) + 0.02 * steps
    at, line = Curve(steps, values).smoothed
    assert np.array_equal(at, steps)
    for i in (0, 5, 100, 248, 249):
        apart = (steps - steps[i]) / (0.015 * 249)
        slope, expected = np.polyfit(apart, values, 1, w=np.exp(-(apart**2) / 4))  # which squares its weights
        assert abs(line[i] - expected) < 2e-3 * (1 + abs(slope))


def test_smoothing_of_many_values_neither_lags_nor_leaves_the_ends():
    steps = np.arange(0.0, 100_000.0)
    at, line = Curve(steps, 3 * steps - 7).smoothed
    assert len(at) == 300
    assert np.abs(line - (3 * at - 7)).max() < 0.001 * 300_000


def test_few_values_are_not_smoothed():
    values = np.array([3.0, -1.0, 4.0, -1.0, 5.0])
    assert np.allclose(Curve(np.arange(5.0), values).smoothed[1], values)


def test_outliers_are_out_of_view_and_few_values_never():
    values = np.sin(np.arange(1000.0))
    values[500] = 1e6
    assert Curve(np.arange(1000.0), values).range()[1] < 1e5  # where the smoothed line is drawn to
    assert Curve(np.arange(5.0), np.array([1.0, 60, 70, 80, 100])).range() == (1, 100)


UNITS = {"k": 1e3, "M": 1e6}


def meant(text: str) -> float:
    return float(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else float(text)


@given(st.floats(-1e30, 1e30))
def test_a_number_is_what_it_is_shown_as(number):
    assert meant(shown(number)) == pytest.approx(number, rel=1e-8, abs=0)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (1500, "1.5k"), (999, "999"), (2e6, "2M"), (0.00025, "2.5e-4"), (0.001, "0.001"), (-0.5, "-0.5"),
        (3 * 0.1, "0.3"), (1e9, "1e9"), (9.9999999999e-6, "1e-5"), (999.9999999999, "1k"),
        *((10.0**power, f"1e{power}") for power in (-30, -12, -5, 12, 30)),
    ],
)  # fmt: skip
def test_numbers_are_short(number, text):
    assert shown(number) == text


@given(st.floats(1e-3, 1e3), st.floats(-1e6, 1e6), st.booleans())
def test_ticks_are_round_within_and_not_too_many(span, low, log):
    if log:
        low, span = low / 1e5, min(span, 20.0)
    axis = Axis(low, low + span, 200, margin=0.05, log=log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 6
    assert all(-1e-6 <= at <= 200 + 1e-6 for at, _ in ticks)
    numbers = [meant(text) for _, text in ticks]
    for (at, _), number in zip(ticks, numbers, strict=True):
        drawn = math.log10(number) if log else number
        assert abs(axis.pixels(np.array(drawn)) - at) < 0.5 + 200 * 1e-8 * abs(low) / span
    assert [at for at, _ in ticks] == sorted(at for at, _ in ticks)
    if not log:
        step = (ticks[1][0] - ticks[0][0]) / 200 * (axis.high - axis.low)
        assert f"{step:.3e}"[:5] in ("1.000", "2.000", "5.000")
