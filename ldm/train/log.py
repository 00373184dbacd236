"""The record of a training run: numbers as JSON lines, pictures, TensorBoard where it is installed, and curves."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldm.errors import CheckpointError, printable
from ldm.files import naming, staged_file
from ldm.train.config import METRICS, SAMPLES, TENSORBOARD

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
        with naming(self.folder / METRICS):
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
