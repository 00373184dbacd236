"""The numbers of a run, drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.files import staged_file
from ldm.train.config import CURVES, METRICS
from ldm.train.log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW = 50  # a smoothed line's share of the values: each point is the mean of a fiftieth of them around it
PANEL = 4.4, 2.8  # inches
RAW, SMOOTHED, ALARM = "#a8cdf0", "#0969da", "#d1242f"


def draw_curves(folder: Path) -> None:
    """Draw curves.png of a run's folder anew, from all that its metrics.jsonl holds. Raises CheckpointError."""
    with staged_file(folder / CURVES, overwrite=True) as temporary:
        curves(folder / METRICS).savefig(temporary, format="png")


def curves(metrics: Path) -> Figure:
    """A panel for each metric of a metrics.jsonl: its values, faintly, and their running mean. Raises CheckpointError.

    Values that are all above 0 have a logarithmic axis; red lines mark steps whose value was not finite.
    """
    from matplotlib.figure import Figure

    series = read_metrics(metrics)
    columns = max(1, math.ceil(math.sqrt(len(series))))
    rows = max(1, math.ceil(len(series) / columns))
    figure = Figure((columns * PANEL[0], rows * PANEL[1]), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, (steps, values)) in zip(panels, series.items(), strict=False):
        axes.set_title(name, parse_math=False)
        _draw(axes, steps, values)
    for axes in panels[len(series) :]:
        axes.remove()
    return figure


def _draw(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    for step in steps[~finite]:
        axes.axvline(step, color=ALARM)
    steps, values = steps[finite], values[finite]
    if not len(values):
        return
    window = np.ones(min(len(values), 1 + len(values) // WINDOW))
    mean = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
    marker = "." if len(values) < WINDOW else None
    axes.plot(steps, values, color=RAW, marker=marker)
    axes.plot(steps, mean, color=SMOOTHED)
    if values.min() > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
