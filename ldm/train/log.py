"""The record of a training run: numbers as JSON lines, pictures, TensorBoard where it is installed, and curves."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ldm.errors import CheckpointError, printable
from ldm.files import staged_file
from ldm.train.config import CURVES, METRICS, SAMPLES, TENSORBOARD

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

DECODER = json.JSONDecoder(parse_int=float)


class RunLog:
    """metrics.jsonl and samples/ in a run's folder, TensorBoard's events where that package is there, curves.png.

    Each line of metrics.jsonl is an object: the step, and a number a metric, null where it was NaN or infinite. One
    process writes it.
    """

    def __init__(self, folder: Path, first_step: int):
        """Makes the folder if need be. Lines at or after `first_step` are cut off, and so is half a line at the end:
        the log of a run that was resumed is that of one that never stopped.

        Raises CheckpointError for a metrics.jsonl that is not a run's.
        """
        self.folder = folder
        (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
        cut(folder / METRICS, first_step)
        self._metrics = (folder / METRICS).open("a", encoding="utf-8")
        self._board = _tensorboard(folder / TENSORBOARD, first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line; from then on killing the process does not lose it. No metric may be called step."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
        self._metrics.flush()
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """An RGB image → samples/NAME-STEP.png, in place of one that an earlier run of the same step left there."""
        _save(image, self.folder / SAMPLES / f"{name}-{step:07d}.png")
        if self._board:
            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def draw_curves(self) -> None:
        """Draw curves.png anew, from all that metrics.jsonl holds."""
        _save(curves(self.folder / METRICS), self.folder / CURVES)

    def close(self) -> None:
        self._metrics.close()
        if self._board:
            self._board.close()


def _save(image: Image.Image, path: Path) -> None:
    with staged_file(path, overwrite=True) as temporary:
        image.save(temporary, format="PNG")


def _tensorboard(folder: Path, first_step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed, so that no events are written for it: pip install tensorboard")
        return None
    return SummaryWriter(str(folder), purge_step=first_step)  # hides what an interrupted run wrote from there on


def cut(metrics: Path, first_step: int) -> None:
    """Leave of a metrics.jsonl, if there is one, the lines before `first_step`. Raises CheckpointError."""
    if not metrics.exists():
        return
    kept = b"".join(line for line, record in _records(metrics) if record["step"] < first_step)
    if surplus := metrics.stat().st_size - len(kept):
        log.info("%s: cut off, %d bytes from step %d on", metrics, surplus, first_step)
        with staged_file(metrics, overwrite=True) as temporary:
            temporary.write_bytes(kept)


def read_metrics(metrics: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each metric's steps and values, both (n,) float64, NaN where they were not finite. Raises CheckpointError."""
    found: dict[str, list[tuple[float, float]]] = {}
    for _, record in _records(metrics):
        step = record.pop("step")
        for name, value in record.items():
            found.setdefault(name, []).append((step, math.nan if value is None else value))
    return {name: (array[:, 0], array[:, 1]) for name, array in ((n, np.array(pairs)) for n, pairs in found.items())}


def _records(metrics: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a metrics.jsonl, as they are and as what they say. A last one that was not finished is left out."""
    lines = metrics.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            yield line, record
        elif number == len(lines):
            log.warning("%s: left out, a last line that was not finished: %s", metrics, printable(repr(line[:80])))
        else:
            raise CheckpointError(
                f'{metrics}: line {number} is {printable(repr(line[:80]))}, expected {{"step": 1, "NAME": 0.5, …}}; '
                f"move the file away"
            )


def _parse(line: bytes) -> dict[str, Any] | None:
    """A record, all of its numbers floats, or None for anything else."""
    try:
        record = DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(record, dict):
        return None
    step, numbers = record.get("step"), all(value is None or isinstance(value, float) for value in record.values())
    return record if numbers and step is not None and step.is_integer() else None


COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#0a7a83")  # one a panel, in turn
INK, FAINT_INK, GRID, ALARM = "#24292f", "#6e7781", "#e7eaee", "#d1242f"
RAW_OPACITY = 0.3
LEFT, TOP, RIGHT, BOTTOM, HEADER = 62, 34, 18, 30, 36  # pixels around a panel's plot, and above all panels
TITLE, LABEL = 15, 12  # pixels, of the fonts
FINER = 3  # lines are drawn so many times larger, and made smaller: Pillow has no other way to smooth them
DOT = 2.5 * FINER
BINS, SMOOTHING = 300, 0.015  # the smoothed line's points, and the kernel's deviation, of the steps there are
OUTLIERS = 0.5  # percent of the values on either side, which need not be in view
FEW = 40  # values, which are marked each
MOST_TICKS = 6
MOST_COLUMNS = 3


def curves(metrics: Path, side: int = 440) -> Image.Image:
    """A panel for each metric of a metrics.jsonl, `side` pixels wide: its values, faintly, and a smoothed line.

    All panels have the same steps. A metric that keeps near its least value for half of the run, such as a loss, is
    drawn on a logarithmic scale; red marks are values that were not finite. Raises CheckpointError.
    """
    series = read_metrics(metrics)
    columns = math.ceil(math.sqrt(min(max(len(series), 1), MOST_COLUMNS**2)))
    height = side * 5 // 8
    sheet = Image.new("RGB", (columns * side, HEADER + max(math.ceil(len(series) / columns), 1) * height), "white")
    steps = np.concatenate([steps for steps, _ in series.values()] or [np.zeros(1)])
    write = partial(ImageDraw.Draw(sheet).text, fill=FAINT_INK, font=ImageFont.load_default(LABEL))
    write((LEFT, HEADER / 2), f"{printable(metrics.parent.name, 40)}, to step {steps.max():,.0f}", anchor="lm")
    for i, (name, (own_steps, values)) in enumerate(series.items()):
        x = Axis(steps.min(), max(steps.max(), steps.min() + 1), side - LEFT - RIGHT, margin=0.01)
        panel = _panel(name, Curve(own_steps, values), x, height, COLOURS[i % len(COLOURS)])
        sheet.paste(panel, (i % columns * side, HEADER + i // columns * height))
    return sheet


def _panel(name: str, curve: Curve, x: Axis, height: int, colour: str) -> Image.Image:
    """A metric's name and last smoothed value, axes, and lines."""
    panel = Image.new("RGB", (LEFT + x.length + RIGHT, height), "white")
    title, label = ImageFont.load_default(TITLE), ImageFont.load_default(LABEL)
    write = ImageDraw.Draw(panel).text
    write((LEFT, TOP / 2), name := printable(name, 28), INK, title, anchor="lm")
    notes = [("log", FAINT_INK)] * curve.log + [(f"{len(curve.lost)} not finite", ALARM)] * bool(len(curve.lost))
    end = LEFT + title.getlength(name)
    for text, ink in notes:
        write((end + 10, TOP / 2 + 1), text, ink, label, anchor="lm")
        end += 10 + label.getlength(text)
    if not len(curve.steps):
        return panel

    write((panel.width - RIGHT, TOP / 2), shown(curve.last, 4), colour, title, anchor="rm")
    y = Axis(*curve.range(), height - TOP - BOTTOM, margin=0.06, log=curve.log)
    panel.paste(_plot(curve, x, y, colour), (LEFT, TOP))
    for at, text in x.ticks():
        write((LEFT + at, TOP + y.length + 8), text, FAINT_INK, label, anchor="mt")
    for at, text in y.ticks():
        write((LEFT - 8, TOP + y.length - at), text, FAINT_INK, label, anchor="rm")
    return panel


def _plot(curve: Curve, x: Axis, y: Axis, colour: str) -> Image.Image:
    """The inside of a panel: a grid, the values, the smoothed line, and marks where a value was not finite."""
    width, height = x.length * FINER, y.length * FINER
    plot = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(plot)
    for at, _ in x.ticks():
        draw.rectangle((left := round(at) * FINER, 0, left + FINER - 1, height), GRID)
    for at, _ in y.ticks():
        draw.rectangle((0, top := height - round(at) * FINER, width, top + FINER - 1), GRID)

    def points(steps: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
        return list(zip(x.pixels(steps) * FINER, height - y.pixels(values) * FINER, strict=True))

    raw = points(*_outline(curve.steps, curve.values, x.pixels(curve.steps) * FINER))
    red, green, blue = ImageColor.getrgb(colour)[:3]
    red, green, blue = (round(255 + RAW_OPACITY * (channel - 255)) for channel in (red, green, blue))
    draw.line(raw, (red, green, blue), width=FINER)
    draw.line(points(*curve.smoothed), colour, width=2 * FINER, joint="curve")
    for across, down in raw if len(raw) <= FEW else ():
        draw.ellipse((across - DOT, down - DOT, across + DOT, down + DOT), colour)
    for foot in x.pixels(curve.lost) * FINER:
        draw.polygon([(foot - 4 * FINER, height), (foot + 4 * FINER, height), (foot, height - 8 * FINER)], ALARM)
    return plot.reduce(FINER)


def _outline(steps: np.ndarray, values: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value of each column of pixels: drawing 100000 lines would take seconds."""
    by_value = np.lexsort((values, columns.astype(int)))
    first = np.flatnonzero(np.diff(columns.astype(int)[by_value], prepend=-1))
    last = np.append(first[1:] - 1, len(by_value) - 1)
    kept = np.unique(by_value[np.concatenate([first, last])])
    return steps[kept], values[kept]


class Curve:
    """What is drawn of a metric: finite values, or their logarithms, by step; a smoothed line; the steps of others."""

    def __init__(self, steps: np.ndarray, values: np.ndarray):
        finite = np.isfinite(values)
        self.steps, self.lost = steps[finite], steps[~finite]
        self.log = _wants_logarithms(values[finite])
        self.values = np.log10(values[finite]) if self.log else values[finite]
        self.smoothed = _smoothed(self.steps, self.values)

    @property
    def last(self) -> float:
        """Where the smoothed line ends, as a value."""
        end = float(self.smoothed[1][-1])
        return 10**end if self.log else end

    def range(self) -> tuple[float, float]:
        """What must be in view: the smoothed line, and all values but outliers."""
        low, line, high = np.percentile(self.values, OUTLIERS, method="lower"), self.smoothed[1], _high(self.values)
        return min(low, line.min()), max(high, line.max())


class Axis:
    """Numbers, or their logarithms to base 10, along a number of pixels."""

    def __init__(self, low: float, high: float, length: int, margin: float, log: bool = False):
        """From `low` to `high`, as they are drawn, and `margin` of what is between on both sides."""
        room = (high - low) * margin or abs(low) * margin or margin
        self.low, self.high, self.length, self.log = low - room, high + room, length, log

    def pixels(self, drawn: np.ndarray) -> np.ndarray:
        return (drawn - self.low) / (self.high - self.low) * self.length

    def ticks(self) -> list[tuple[float, str]]:
        """Where round numbers lie, and what they are called."""
        numbers = _round_powers(self.low, self.high) if self.log else []
        if len(numbers) < 3:  # less than a decade has no round powers
            low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
            numbers = _round_numbers(low, high)
        drawn = np.log10(numbers) if self.log else np.array(numbers)
        return [(float(at), shown(number)) for at, number in zip(self.pixels(drawn), numbers, strict=True)]


def _round_numbers(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten: as many as may be, at most MOST_TICKS."""
    power = 10.0 ** math.floor(math.log10((high - low) / MOST_TICKS))
    for step in (power * factor for factor in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step), math.floor(high / step)
        if last - first < MOST_TICKS:
            return [i * step for i in range(first, last + 1)]
    raise AssertionError("one of the steps is long enough")


def _round_powers(low: float, high: float) -> list[float]:
    """1, 2 and 5, 1 and 3, or 1 times powers of ten, or every so many powers, within the logarithms given."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors, stride in ((1, 2, 5), 1), ((1, 3), 1), *(((1,), stride) for stride in range(1, len(powers) + 1)):
        numbers = [factor * 10.0**power for power in powers if power % stride == 0 for factor in factors]
        inside = [number for number in numbers if low <= math.log10(number) <= high]
        if len(inside) <= MOST_TICKS:
            return inside
    raise AssertionError("one of the strides is long enough")


def shown(number: float, digits: int = 9) -> str:
    """1500 → 1.5k, 2000000 → 2M, 0.00025 → 2.5e-4, and what is between as it is, to so many digits."""
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    power = int(exponent)
    if not -3 <= power < 9:
        return f"{float(mantissa):.{digits}g}e{power}"
    for least, unit in (6, "M"), (3, "k"):
        if power >= least:
            return f"{number / 10**least:.{digits}g}{unit}"
    return f"{number:.{digits}g}"


def _wants_logarithms(values: np.ndarray) -> bool:
    """Whether half of the values, all above 0, would lie in the lowest tenth of a linear axis that is not short."""
    if not len(values) or (low := values.min()) <= 0:
        return False
    high = _high(values)
    return bool(high > 3 * low and np.median(values) - low < 0.1 * (high - low))


def _high(values: np.ndarray) -> float:
    """The largest value but for outliers: one of the values, so that of few none is out of view."""
    return np.percentile(values, 100 - OUTLIERS, method="higher")


def _smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Local linear regression with a Gaussian kernel (Cleveland and Loader 1996): (m,) and (m,), m at most BINS.

    Unlike a moving average it neither lags nor flattens the steep first steps of a loss. Where values are further
    apart than the kernel is wide, they are what they were.
    """
    if not len(steps):
        return steps, values
    span = max(np.ptp(steps), 1.0)
    bins = np.minimum((steps - steps.min()) / span * BINS, BINS - 1).astype(int)
    counts = np.bincount(bins)
    filled = counts > 0
    at, means = (np.bincount(bins, weights)[filled] / counts[filled] for weights in (steps, values))
    apart = (at - at[:, None]) / (SMOOTHING * span)
    weights = np.exp(-(apart**2) / 2) * counts[filled]
    s0, s1, s2 = (np.sum(weights * apart**power, axis=1) for power in range(3))
    t0, t1 = weights @ means, (weights * apart) @ means
    s2 = s2 + 1e-3 * s0  # a slope of nothing where there is one value
    line = (s2 * t0 - s1 * t1) / (s2 * s0 - s1**2)
    return at, line.clip(values.min(), values.max())
