"""What each way to train an SD v1.x model takes of memory: python benchmarks/training_memory.py MODEL PRECISION

Two steps of each on noise, on the CPU, at 512×512 pixels, one picture at a time; the peak is that of the whole process.
PRECISION is float32 or bfloat16, which takes minutes a step where the CPU does not compute it. Needs Linux, for /proc.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

STEPS = 2  # the optimizer has its state from the first on
LEAN = ("loop.gradient_checkpointing=true", "diffusion.cache=true")
LORA = ("diffusion.method=lora", "lora.rank=16")
WORD = ("diffusion.method=textual_inversion", "inversion.token=<new>", "data.caption=a <new>")
MODES = {
    "LoRA of rank 16": (*LORA, *LEAN),
    "LoRA of rank 16, text encoder too": (*LORA, *LEAN, "diffusion.train_text=true"),
    "LoRA of rank 16, activations kept": (*LORA, *LEAN[1:]),
    "textual inversion": (*WORD, *LEAN),
    "whole U-Net": LEAN,
    "whole U-Net, with averages": (*LEAN, "loop.ema_decay=0.999"),
}


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__.splitlines()[0])
    model, precision = sys.argv[1:]
    print(f"| {precision} | peak, GiB | seconds a step |\n| --- | --- | --- |")
    for name, changes in MODES.items():
        with tempfile.TemporaryDirectory() as folder:
            peak, seconds = measure(Path(folder), model, (*changes, f"loop.precision={precision}"))
        print(f"| {name} | {peak:.1f} | {seconds:.0f} |", flush=True)


def measure(folder: Path, model: str, changes: tuple[str, ...]) -> tuple[float, float]:
    """Peak of the resident memory in GiB, and the seconds of the last step. The run is killed before it would save."""
    (folder / "pictures").mkdir()
    for number in range(2):
        Image.effect_noise((512, 512), 80).save(folder / "pictures" / f"{number}.png")
    config = {
        "task": "diffusion", "folder": str(folder / "run"), "model": model, "output": "result.safetensors",
        "data.source": str(folder / "pictures"), "data.caption": "noise", "data.workers": 0,
        "loop.steps": 1000, "loop.batch_size": 1, "loop.log_every": 1,
    }  # fmt: skip
    (folder / "run.toml").write_text("", encoding="utf-8")
    flags = [f"--set={name}={json.dumps(value)}" for name, value in config.items()]
    command = [sys.executable, "-m", "ldm", "train", str(folder / "run.toml"), *flags, *(f"--set={c}" for c in changes)]
    told = folder / "told"
    process = subprocess.Popen(command, stderr=told.open("w"))
    metrics, times = folder / "run" / "metrics.jsonl", []
    while len(times) < STEPS:
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(command)}\nended early: {told.read_text().splitlines()[-1]}")
        time.sleep(0.05)
        if metrics.is_file() and len(metrics.read_text().splitlines()) > len(times):
            times.append(time.monotonic())
    status = Path(f"/proc/{process.pid}/status").read_text()
    process.kill()
    process.wait()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**20, times[-1] - times[-2]


if __name__ == "__main__":
    main()
