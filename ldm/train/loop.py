"""The loop that every training shares: steps, records, pictures, saves; on one device or, by accelerate, on many."""

from __future__ import annotations

import json
import logging
import math
import subprocess
from collections.abc import Mapping
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

from ldm import __version__
from ldm.checkpoint.convert import check_target
from ldm.checkpoint.files import first_line
from ldm.errors import LdmError, NumericalError, RequestError, is_out_of_memory, printable
from ldm.files import staged_file
from ldm.train.config import ABOUT, CONFIG, CURVES, METRICS, STATE, Optimizer, TrainConfig, to_toml
from ldm.train.curves import draw_curves
from ldm.train.ema import EMA
from ldm.train.feed import Batch, Feed
from ldm.train.log import RunLog
from ldm.train.state import load_state, save_state
from ldm.train.task import Task
from ldm.train.toml import read_toml, to_table

log = logging.getLogger(__name__)

PATIENCE = timedelta(days=1)  # of the other processes, while the first draws pictures or fills caches
WRITTEN_OVER = (ABOUT, METRICS, CURVES)  # by a new run
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # accelerate's names


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The processes and devices of this run, as `accelerate launch` set them up; one without it."""
    AcceleratorState._reset_state()  # of an earlier run in this process, whose precision may have been another
    # What has no part in a loss: the other turn's network, or layers that are skipped.
    partly = bool(config.vae.adversarial) or config.diffusion.clip_skip > 1
    some = DistributedDataParallelKwargs(find_unused_parameters=partly)
    try:
        accelerator = Accelerator(
            mixed_precision=MIXED_PRECISION[config.loop.precision],
            kwargs_handlers=[some, InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        raise RequestError(
            f"loop.precision is {config.loop.precision!r}, which this machine has not ({error})"
        ) from error
    if config.loop.precision == "float16" and accelerator.device.type == "cpu":
        raise RequestError("loop.precision is 'float16', in which CPUs do not train: use bfloat16 or float32")
    return accelerator


def train(config: TrainConfig, task: Task, batches: Any, accelerator: Accelerator, resume: bool) -> Path:
    """Train to the last step of the config, and answer with the path of the result.

    Raises CheckpointError for a state that is not this run's, and NumericalError for a loss that is not finite.
    """
    folder = Path(config.folder)
    feed = Feed(
        batches, task.prepare, config.seed, micro_batch=config.loop.micro_batch,
        process=accelerator.process_index, processes=accelerator.num_processes,
    )  # fmt: skip
    run = Run(config, task, accelerator)
    first = run.load(folder / STATE) if resume and (folder / STATE).is_file() else 0
    target, last = folder / config.output, config.loop.steps
    is_main = accelerator.is_main_process
    if is_main:
        check_target(target, single=bool(target.suffix), overwrite=True)  # now, not at the first save
    if first > last:
        raise RequestError(f"loop.steps is {last}, and the run in {folder} has done {first}: use {first} or more")
    with (
        closing(RunLog(folder, first + 1)) if is_main else nullcontext() as record,
        closing(feed.steps(first, last, config.data.workers)) as batches_ahead,
        tqdm(total=last, initial=first, unit="step", desc=folder.name, disable=not is_main) as bar,
    ):
        if first == 0:
            run.look(record, 0)
        if is_main:
            describe_run(folder, config)
        if first == last:  # all is done; the result may be lost, or wanted under another name
            run.save_result(target, last)
            if is_main:
                draw_curves(folder)
        for step, micro_batches in enumerate(batches_ahead, first):
            values = run.step(micro_batches, step)
            bar.update()
            done = step + 1
            if done % config.loop.log_every == 0 or done == last:
                _report(bar, record, done, run.mean(values), config)
            saves = done % config.loop.save_every == 0 or done == last
            if saves:
                run.check_finite(done)  # before anything is replaced
                run.save_result(target, done)
            if done % config.loop.sample_every == 0 or done == last:
                run.look(record, done)
            if saves:
                run.save(folder / STATE, done)  # last: what is not done yet is done again by a run that goes on
                if is_main:
                    draw_curves(folder)
    return target


def _report(bar: tqdm, record: RunLog | None, step: int, values: Mapping[str, Tensor], config: TrainConfig) -> None:
    numbers = {name: value.item() for name, value in values.items()}
    if not all(math.isfinite(number) for number in numbers.values()):
        raise _diverged(step, printable(str(numbers)))
    rate = bar.format_dict["rate"]
    pictures = {"images/s": rate * config.loop.batch_size} if rate else {}
    bar.set_postfix({"loss": f"{numbers['loss']:.4f}", **{k: f"{v:.1f}" for k, v in pictures.items()}})
    if record is not None:
        record.write(step, numbers | {"learning_rate": learning_rate(config.optimizer, step - 1, config.loop.steps)})


def _diverged(step: int, what: str) -> NumericalError:
    return NumericalError(
        f"step {step}: {what}: not finite; lower optimizer.learning_rate, or use loop.precision float32 or bfloat16"
    )


class Run:
    """What changes from step to step: the parameters, their optimizers and their averages."""

    def __init__(self, config: TrainConfig, task: Task, accelerator: Accelerator):
        self.config, self.task, self.accelerator = config, task, accelerator
        self.parameters = {name: p for name, p in task.named_parameters() if p.requires_grad}
        self.module: nn.Module = accelerator.prepare(task.to(accelerator.device))
        settings = config.optimizer
        first, second = settings.betas
        self.optimizers = {
            turn: accelerator.prepare(
                torch.optim.AdamW(
                    task.learners(turn), settings.learning_rate, (first, second), weight_decay=settings.weight_decay
                )
            )
            for turn in task.turns
        }
        decay = config.loop.ema_decay
        self.ema = None if decay is None else EMA(self.parameters, decay)

    def step(self, micro_batches: list[Batch], step: int) -> Mapping[str, Tensor]:
        """One step of the optimizer of each turn; answers with the losses of this process."""
        recorded: dict[str, Tensor] = {}
        settings = self.config.optimizer
        rate = learning_rate(settings, step, self.config.loop.steps)
        micro_batches = [
            {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()} for batch in micro_batches
        ]
        self.module.train()
        for turn in self.task.turns_at(step):
            optimizer = self.optimizers[turn]
            for group in optimizer.param_groups:  # which a state that was put back may have otherwise
                group |= {"lr": rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
            for number, batch in enumerate(micro_batches):
                is_last = number == len(micro_batches) - 1
                with (
                    nullcontext() if is_last else self.accelerator.no_sync(self.module),
                    self.accelerator.autocast(),
                ):
                    values = self.module(batch, step, turn)
                self.accelerator.backward(values["loss"] / len(micro_batches))
                for name, value in values.items():
                    key = name if turn == self.task.turns[0] else f"{turn}.{name}"
                    recorded[key] = recorded.get(key, 0) + value.detach() / len(micro_batches)
            if settings.clip:
                self.accelerator.clip_grad_norm_(self.task.learners(turn), settings.clip)
            optimizer.step()
            self.module.zero_grad()  # also what other turns' networks got
        if self.ema is not None:
            self.ema.update(self.parameters, step)
        return recorded

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Over all processes."""
        return {name: self.accelerator.reduce(value, "mean") for name, value in values.items()}

    def check_finite(self, step: int) -> None:
        """Raises NumericalError."""
        if damaged := [name for name, parameter in self.parameters.items() if not parameter.isfinite().all()]:
            raise _diverged(step, damaged[0])

    def averaged(self) -> Any:
        """With the averages, if any, as parameters."""
        return nullcontext() if self.ema is None else self.ema.applied(self.parameters)

    def look(self, record: RunLog | None, step: int) -> None:
        """Draw what has been learned so far. A picture that cannot be drawn ends no run."""
        with self.averaged():
            try:
                if record is not None and (sheet := self.task.pictures()) is not None:
                    record.picture(step, "samples", sheet)
            except (NumericalError, OSError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                log.warning("step %d: no samples: %s", step, first_line(error))
        self.accelerator.wait_for_everyone()

    def save_result(self, target: Path, step: int) -> None:
        with self.averaged():
            if not self.accelerator.is_main_process:
                return
            if self.config.loop.keep and step < self.config.loop.steps:
                target = target.with_name(f"{target.stem}-{step:07}{target.suffix}")
            self.task.save(target, self.config.output_dtype)

    def save(self, path: Path, step: int) -> None:
        """Raises LdmError where it cannot be written."""
        content = save_state(self.module, self.optimizers, self.ema, self.accelerator)
        if self.accelerator.is_main_process:
            try:
                with staged_file(path, overwrite=True) as temporary:
                    torch.save({**content, "step": step}, temporary)
            except RuntimeError as error:  # which is what a full disk is to torch
                raise LdmError(
                    f"{path}: cannot be written; is there room on the disk? ({first_line(error)})"
                ) from error

    def load(self, path: Path) -> int:
        """The step to go on with. Raises CheckpointError."""
        return load_state(path, self.module, self.optimizers, self.ema, self.accelerator)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """At a step, from 0: linear up to the warm-up's end, then constant or half a cosine."""
    warmup = min(1.0, (step + 1) / (settings.warmup + 1))
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if settings.decay == "cosine" else 1.0
    return settings.learning_rate * warmup * decay


def check_folder(folder: Path, config: TrainConfig, resume: bool) -> None:
    """Raises RequestError where another run is there, or what a run would write over, or learn from."""
    a_run = any((folder / name).is_file() for name in (CONFIG, STATE))
    if a_run and not resume:
        raise RequestError(f"{folder} holds a run already: go on with it by --resume, or use another (--set folder=…)")
    for name in () if a_run else (config.output, *WRITTEN_OVER):
        path = folder / name
        if any(not p.name.startswith(".") for p in path.glob("*")) or (path.is_file() and path.stat().st_size):
            raise RequestError(f"{path} is there already, and would be written over: choose another folder")
    source, here = Path(config.data.source).resolve(), folder.resolve()
    inside = source.is_dir() and here.is_relative_to(source)
    if inside and not a_run and not any(part.startswith(".") for part in here.relative_to(source).parts):
        raise RequestError(f"folder is {folder}, in data.source: its samples would be learned from; use one outside")
    if resume and not (folder / STATE).is_file():
        log.warning("%s has no %s: there is nothing to go on with, so this begins at step 0", folder, STATE)


def describe_run(folder: Path, config: TrainConfig) -> None:
    """Write the config and the code's version, and tell what of the config was otherwise when the run began."""
    path = folder / CONFIG
    text = to_toml(config)
    if path.is_file():
        before, now = _flat(read_toml(path)), _flat(to_table(config))
        changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if changed:
            told = "; ".join(f"{name} {before.get(name)} → {now.get(name)}" for name in changed)
            log.warning("%s: goes on with another config: %s", folder, printable(told))
    about = {"ldm": __version__, "commit": _commit(), "torch": torch.__version__}
    for name, content in {CONFIG: text, ABOUT: json.dumps(about, indent=2)}.items():
        with staged_file(folder / name, overwrite=True) as temporary:
            temporary.write_text(content, encoding="utf-8")


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """A table whose sections' keys have the sections' names in front."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return flat


def _commit() -> str | None:
    """Of the source tree this runs from; None where it is not one, whatever else may hold it."""
    here = Path(__file__)
    commands = ["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]
    try:
        return [
            subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=True).stdout
            for command in commands
        ][-1].strip()
    except (OSError, subprocess.CalledProcessError):
        return None
