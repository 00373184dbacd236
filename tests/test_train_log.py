"""The log of a run: what is written is there, a resumed log is an uninterrupted one, and curves show it."""

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
from PIL import Image

from ldm.errors import CheckpointError
from ldm.train import log as module
from ldm.train.curves import ALARM, curves, draw_curves
from ldm.train.log import RunLog, cut, read_metrics

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


def lines(panel) -> tuple[np.ndarray, np.ndarray]:
    """The values and the smoothed line, each (n, 2)."""
    values, smoothed = (line.get_xydata() for line in panel.get_lines()[-2:])
    return values, smoothed


@pytest.mark.parametrize(("count", "shape"), [(0, (1, 1)), (1, (1, 1)), (2, (1, 2)), (5, (2, 3)), (7, (3, 3))])
def test_a_panel_a_metric(count, shape, tmp_path):
    run = {step: {name: 0.1 * step + ord(name) for name in "abcdefg"[:count]} for step in range(3)}
    write(tmp_path, run)
    draw_curves(tmp_path)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (440 * shape[1], 280 * shape[0])
    panels = curves(tmp_path / "metrics.jsonl").axes
    assert [panel.get_title() for panel in panels] == list("abcdefg"[:count])
    for panel, name in zip(panels, "abcdefg", strict=False):
        expected = [[step, 0.1 * step + ord(name)] for step in range(3)]
        assert all(line.tolist() == expected for line in lines(panel))


def test_the_smoothed_line_is_a_running_mean(tmp_path):
    values = np.random.default_rng(0).normal(size=200)
    [panel] = curves(write(tmp_path, {step: {"loss": value} for step, value in enumerate(values)})).axes
    plain, smoothed = lines(panel)
    np.testing.assert_array_equal(plain[:, 1], values)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(200)]  # five of 200, fewer at the ends
    np.testing.assert_allclose(smoothed[:, 1], expected, atol=1e-12)
    assert panel.get_yscale() == "linear"
    [panel] = curves(write(tmp_path / "positive", {step: {"loss": 1 / (1 + step)} for step in range(9)})).axes
    assert panel.get_yscale() == "log"


def test_steps_that_were_not_finite_are_marked(tmp_path):
    run = {step: {"loss": math.nan if step == 5 else 1.0 + step} for step in range(10)}
    [panel] = curves(write(tmp_path, run)).axes
    mark, *rest = panel.get_lines()
    assert list(mark.get_xdata()) == [5, 5] and mark.get_color() == ALARM and len(rest) == 2
    assert 5 not in lines(panel)[0][:, 0]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 10**9), NUMBERS), max_size=12), st.text("ab$_^\\{"))
def test_curves_can_be_drawn_of_anything(tmp_path_factory, points, name):
    folder = tmp_path_factory.mktemp("run")
    write(folder, {step: {f"${name}": value} for step, value in points})
    draw_curves(folder)
    shutil.rmtree(folder)
