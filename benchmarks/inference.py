"""How long Stable Diffusion v1 takes here and in diffusers: the same random weights and inputs, by turns, in one run.

    python benchmarks/inference.py [--dtype float32] [--size 512] [--rounds 3] [--rows step decode start]

Prints a Markdown table: medians of the rounds after the first, their spread, and the ratio. Steps
and decodes have the same settings of malloc; programs from their start have each their own. The weights are drawn once,
as a diffusers folder in float16, and stay in --model for the next run. Needs diffusers, and Linux for /proc.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ldm.runtime.memory import keep_freed

Sides = dict[str, Callable[[], object]]  # what is to be timed, by whose it is; ours comes first

FIRST_STEP = {  # programs that end at their first finished step, and tell the peak of their memory
    "ours": """
import sys, ldm
sd = ldm.StableDiffusion.load(sys.argv[1], dtype=sys.argv[2], device="cpu")
next(sd.stream(ldm.Request("a red circle", steps=25, width=int(sys.argv[3]), height=int(sys.argv[3]), cfg_scale=7.5)))
""",
    "diffusers": """
import os, sys, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]))
pipeline.unet.to(memory_format=torch.channels_last)
class Stop(Exception): pass
def stop(*args): raise Stop
try:
    size = int(sys.argv[3])
    pipeline("a red circle", num_inference_steps=25, height=size, width=size, callback_on_step_end=stop)
except Stop:
    pass
""",
}
PEAK = """
import re
print(re.findall(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[0])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("outputs/random-v1"), help="where the weights are, or go")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--size", type=int, default=512, help="a side of the picture in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="that count, after one that does not")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    args = parser.parse_args()
    if not args.model.exists():
        draw_model(args.model)
    keep_freed(True)  # for both
    print(f"| {args.dtype}, {args.size}², {torch.get_num_threads()} threads | ours | diffusers | ratio |")
    print("| --- | --- | --- | --- |")
    for row in args.rows:
        for what, ours, theirs, unit in ROWS[row](args):
            ratio = statistics.median(ours) / statistics.median(theirs)
            print(f"| {what} | {told(ours)} {unit} | {told(theirs)} {unit} | {ratio:.2f} |", flush=True)


def told(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def by_turns(sides: Sides, rounds: int) -> tuple[list[list[float]], list[object]]:
    """The seconds of each side in each round after the first, and what each answered last."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(1 + rounds):
        answers = []
        for times, run in zip(seconds, sides.values(), strict=True):
            start = time.perf_counter()
            answers.append(run())
            times.append(time.perf_counter() - start)
    return [times[1:] for times in seconds], answers


Row = Iterator[tuple[str, list[float], list[float], str]]


@torch.no_grad()
def step(args: argparse.Namespace) -> Row:
    """One evaluation of the U-Net with guidance."""
    from diffusers import UNet2DConditionModel

    from ldm.checkpoint.load import load_unet
    from ldm.config import ScheduleConfig
    from ldm.diffusion import NoiseSchedule
    from ldm.sampling import Branch, Predictor

    dtype, side = getattr(torch, args.dtype), args.size // 8
    generator = torch.Generator().manual_seed(0)
    x, texts = (torch.randn(*size, generator=generator) for size in ((1, 4, side, side), (2, 77, 768)))
    schedule = NoiseSchedule(ScheduleConfig())
    level = schedule.level(500)
    predictor = Predictor(load_unet(args.model, dtype=dtype), "epsilon", [level])
    branches = [Branch(text) for text in texts.split(1)]
    theirs = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet", torch_dtype=dtype)
    theirs = theirs.to(memory_format=torch.channels_last)
    inputs, states = torch.cat([x, x]).to(dtype), texts.to(dtype)
    sides = {
        "ours": lambda: torch.cat([prediction.eps for prediction in predictor.together(x, level, branches)]),
        "theirs": lambda: theirs(inputs, 500, states).sample.float(),
    }
    (ours, other), answers = by_turns(sides, args.rounds)
    yield f"U-Net step, guidance (apart by {apart(*answers):.1e})", ours, other, "s"


@torch.no_grad()
def decode(args: argparse.Namespace) -> Row:
    """From latents to pixels."""
    from diffusers import AutoencoderKL

    from ldm.checkpoint.load import load_vae
    from ldm.runtime import strips

    dtype, side = getattr(torch, args.dtype), args.size // 8
    z = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    vae = load_vae(args.model, dtype=dtype)
    theirs = AutoencoderKL.from_pretrained(args.model, subfolder="vae", torch_dtype=dtype)
    theirs = theirs.to(memory_format=torch.channels_last)
    sides = {"ours": lambda: strips.decode(vae, z), "theirs": lambda: theirs.decode(z).sample}
    (ours, other), answers = by_turns(sides, args.rounds)
    yield f"VAE decode (apart by {apart(*answers):.1e})", ours, other, "s"


def start(args: argparse.Namespace) -> Row:
    """From the start of a process to its first finished step, its files in the page cache."""
    peaks: dict[str, list[float]] = {side: [] for side in FIRST_STEP}

    def run(side: str) -> None:
        command = [sys.executable, "-c", FIRST_STEP[side] + PEAK, str(args.model), args.dtype, str(args.size)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[side].append(int(told) / 2**20)

    (ours, other), _ = by_turns({side: lambda side=side: run(side) for side in FIRST_STEP}, args.rounds)
    yield "process start to first step", ours, other, "s"
    yield "its peak memory", *peaks.values(), "GiB"


ROWS: dict[str, Callable[[argparse.Namespace], Row]] = {"step": step, "decode": decode, "start": start}


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def draw_model(folder: Path) -> None:
    """Stable Diffusion v1's networks with random weights, written by diffusers in float16."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm.models.tokenizer import build_tokenizer, shipped_vocabulary

    torch.manual_seed(0)
    parts = {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ),
    }  # fmt: skip
    StableDiffusionPipeline(
        **{name: part.half() for name, part in parts.items()}, tokenizer=build_tokenizer(*shipped_vocabulary(), 77),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    main()
