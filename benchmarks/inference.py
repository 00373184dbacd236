"""How long Stable Diffusion v1 takes here and elsewhere: the same random weights and inputs, by turns, in one run.

    python benchmarks/inference.py [--dtype float32] [--size 512] [--rounds 3] [--rows step decode start]
                                   [--peers diffusers compiled openvino stable-diffusion.cpp]

Prints a Markdown table: medians of the rounds after the first, their spread, and the ratio. Steps and decodes have the
same settings of malloc; programs from their start have each their own. The weights are drawn once, as a diffusers
folder in float16, and stay in --model for the next run. Needs diffusers, and Linux for /proc. The peers: diffusers is
as it comes, in channels_last; compiled is that with fused projections, by torch.compile with freezing; openvino is its
U-Net, converted; stable-diffusion.cpp is what stable-diffusion-cpp-python builds on this machine, with flash attention,
of a single file in float16, on its own noise. In bfloat16 a step's error against float32 is told, too. The row picture
is a whole process that draws one in 25 steps; cost tells what a picture takes at several sizes and batches, here alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.runtime import strips
from ldm.runtime.memory import keep_freed

Sides = dict[str, Callable[[], Any]]  # what is to be timed, by whose it is; ours comes first

LOADED = {  # the beginning of programs
    "ours": """
import sys, ldm
sd = ldm.StableDiffusion.load(sys.argv[1], dtype=sys.argv[2], device="cpu")
size = int(sys.argv[3])
request = ldm.Request("a red circle", seed=0, steps=25, width=size, height=size, cfg_scale=7.5)
""",
    "diffusers": """
import sys, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]))
pipeline.unet.to(memory_format=torch.channels_last)
request = dict(prompt="a red circle", num_inference_steps=25, height=int(sys.argv[3]), width=int(sys.argv[3]))
""",
}
FIRST_STEP = {
    "ours": "next(sd.stream(request))",
    "diffusers": """
class Stop(Exception): pass
def stop(*args): raise Stop
try:
    pipeline(**request, callback_on_step_end=stop)
except Stop:
    pass
""",
}
PICTURE = {"ours": "sd.generate(request)", "diffusers": "pipeline(**request)"}
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
    parser.add_argument("--rows", nargs="+", default=["step", "decode", "start"], choices=ROWS)
    parser.add_argument("--peers", nargs="+", default=["diffusers"], choices=UNETS)
    args = parser.parse_args()
    if not args.model.exists():
        draw_model(args.model)
    keep_freed("all")  # for all
    print(f"| {args.dtype}, {args.size}², {torch.get_num_threads()} threads | ours | | theirs | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for row in args.rows:
        for line in ROWS[row](args):
            print(line, flush=True)


class Line(NamedTuple):
    """A line of the table."""

    what: str
    ours: list[float]
    peer: str = ""
    theirs: Sequence[float] = ()
    unit: str = "s"

    def __str__(self) -> str:
        ratio = f"{statistics.median(self.ours) / statistics.median(self.theirs):.2f}" if self.theirs else ""
        return f"| {self.what} | {self._told(self.ours)} | {self.peer} | {self._told(self.theirs)} | {ratio} |"

    def _told(self, values: Sequence[float]) -> str:
        return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g}) {self.unit}" if values else ""


def by_turns(sides: Sides, rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The seconds of each side in each round after the first, and what each answered last."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(1 + rounds):
        answers = {}
        for side, run in sides.items():
            start = time.perf_counter()
            answers[side] = run()
            seconds[side].append(time.perf_counter() - start)
    return {side: times[1:] for side, times in seconds.items()}, answers


@torch.no_grad()
def step(args: argparse.Namespace) -> Iterator[Line]:
    """One evaluation of the U-Net with guidance."""
    dtype, side = getattr(torch, args.dtype), args.size // 8
    generator = torch.Generator().manual_seed(0)
    x, texts = (torch.randn(*size, generator=generator) for size in ((1, 4, side, side), (2, 77, 768)))
    inputs = torch.cat([x, x]).to(dtype), texts.to(dtype)
    sides: Sides = {"ours": guided_step(args, x, texts)}
    for peer in args.peers:
        sides[peer] = UNETS[peer](args, *inputs)
    seconds, answers = by_turns(sides, args.rounds)
    best = min(seconds["ours"])
    yield Line(
        f"nominal arithmetic at so much of the rate of matrix products, {share_of_products(args, best):.0%}",
        seconds["ours"],
    )
    for peer in args.peers:
        told = "" if answers[peer] is None else f" (apart by {apart(answers['ours'], answers[peer]):.1e})"
        yield Line(f"U-Net step, guidance{told}", seconds["ours"], peer, seconds[peer])
    if args.dtype != "float32":
        del sides
        exact = diffusers_step(argparse.Namespace(**vars(args) | {"dtype": "float32"}), torch.cat([x, x]), texts)()
        errors = {side: apart(answer, exact) for side, answer in answers.items() if answer is not None}
        ours = errors.pop("ours")
        for peer, error in errors.items():
            yield Line("its error against float32", [ours], peer, [error], "")


def guided_step(args: argparse.Namespace, x: Tensor, texts: Tensor) -> Callable[[], Tensor]:
    """Ours, as pictures are made: what both prompts of guidance have in common is computed once."""
    from ldm import StableDiffusion
    from ldm.sampling import Branch, Predictor

    sd = StableDiffusion.load(args.model, dtype=args.dtype, device="cpu")
    level = sd.schedule.level(500)
    predictor = Predictor(sd.unet, "epsilon", [level])
    branches = [Branch(text) for text in texts.split(1)]
    return lambda: torch.cat([prediction.eps for prediction in predictor.together(x, level, branches)])


def their_unet(args: argparse.Namespace) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet", torch_dtype=getattr(torch, args.dtype))
    return unet.eval().to(memory_format=torch.channels_last)


def diffusers_step(args: argparse.Namespace, x: Tensor, states: Tensor) -> Callable[[], Tensor]:
    unet = their_unet(args)
    return lambda: unet(x, 500, states).sample.float()


def compiled_step(args: argparse.Namespace, x: Tensor, states: Tensor) -> Callable[[], Tensor]:
    import torch._inductor.config as inductor

    inductor.freezing = True
    unet = their_unet(args)
    unet.fuse_qkv_projections()
    run = torch.compile(unet)
    t = torch.tensor(500)
    return lambda: run(x.contiguous(memory_format=torch.channels_last), t, states).sample.float()


def openvino_step(args: argparse.Namespace, x: Tensor, states: Tensor) -> Callable[[], Tensor]:
    import openvino

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = their_unet(args).float()

        def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
            return self.unet(x, t, states).sample

    example = (x.float(), torch.tensor(500), states.float())
    model = openvino.convert_model(Plain(), example_input=example, input=[list(each.shape) for each in example])
    precision = {"float32": "f32", "bfloat16": "bf16"}[args.dtype]
    run = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return lambda: torch.from_numpy(run([each.numpy() for each in example])[0])


def cpp_step(args: argparse.Namespace, x: Tensor, states: Tensor) -> Callable[[], None]:
    """A step of a picture that it makes in a thread, which waits after each for the next to be asked for."""
    from stable_diffusion_cpp import StableDiffusion

    file = args.model.with_suffix(".safetensors")
    if not file.exists():
        subprocess.run([sys.executable, "-m", "ldm", "convert", str(args.model), str(file)], check=True)
    sd = StableDiffusion(str(file), n_threads=torch.get_num_threads(), diffusion_flash_attn=True, verbose=False)
    sd.verbose = True  # or it would take our stdout away, too, while its thread waits
    asked, done, ended = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def wait(step: int, steps: int, seconds: float) -> None:
        done.release()
        asked.acquire()

    def draw() -> None:
        steps = args.rounds + 3  # more than are asked for
        fields = {"width": args.size, "height": args.size, "sample_method": "euler", "sample_steps": steps}
        try:
            sd.generate_image("", **fields, progress_callback=wait)
        finally:
            ended.set()
            done.release()

    def await_step() -> None:
        done.acquire()
        if ended.is_set():
            raise RuntimeError("stable-diffusion.cpp stopped: what it says is above")

    def run() -> None:
        asked.release()
        await_step()

    threading.Thread(target=draw, daemon=True).start()
    await_step()  # it calls before the first, too
    return run


UNETS = {
    "diffusers": diffusers_step, "compiled": compiled_step, "openvino": openvino_step, "stable-diffusion.cpp": cpp_step,
}  # fmt: skip


def share_of_products(args: argparse.Namespace, seconds: float) -> float:
    """The operations of a step in a second, to those of products of 4096×4096 matrices."""
    from ldm.config import SD_V1
    from ldm.models.unet import UNet

    with torch.device("meta"):
        side = args.size // 8
        unet = UNet(SD_V1.unet)
        shifts = unet.embed_time(torch.empty(1))
        keys_values = unet.embed_context(torch.empty(2, 77, SD_V1.unet.context_dim))
        with FlopCounterMode(display=False) as counter:
            unet.predict(torch.empty(1, 4, side, side), shifts, keys_values)
    a = torch.randn(4096, 4096).to(getattr(torch, args.dtype))
    times, _ = by_turns({"product": lambda: a @ a}, 5)
    return counter.get_total_flops() / seconds / (2 * 4096**3 / min(times["product"]))


@torch.no_grad()
def decode(args: argparse.Namespace) -> Iterator[Line]:
    """From latents to pixels."""
    from diffusers import AutoencoderKL

    from ldm import StableDiffusion

    dtype, side = getattr(torch, args.dtype), args.size // 8
    z = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    vae = StableDiffusion.load(args.model, dtype=dtype, device="cpu").vae
    theirs = AutoencoderKL.from_pretrained(args.model, subfolder="vae", torch_dtype=dtype)
    theirs = theirs.to(memory_format=torch.channels_last)
    sides = {"ours": lambda: strips.decode(vae, z), "diffusers": lambda: theirs.decode(z).sample}
    seconds, answers = by_turns(sides, args.rounds)
    yield Line(
        f"VAE decode (apart by {apart(*answers.values()):.1e})", seconds["ours"], "diffusers", seconds["diffusers"]
    )


def start(args: argparse.Namespace) -> Iterator[Line]:
    """From the start of a process to its first finished step, its files in the page cache."""
    return programs(args, "process start to first step", FIRST_STEP)


def picture(args: argparse.Namespace) -> Iterator[Line]:
    """From the start of a process to a picture of 25 steps."""
    return programs(args, "process start to picture", PICTURE)


def programs(args: argparse.Namespace, what: str, ends: dict[str, str]) -> Iterator[Line]:
    """How long they take, and the most memory that each has had."""
    peaks: dict[str, list[float]] = {side: [] for side in ends}

    def run(side: str) -> None:
        source = LOADED[side] + ends[side] + PEAK
        command = [sys.executable, "-c", source, str(args.model), args.dtype, str(args.size)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[side].append(int(told) / 2**20)

    seconds, _ = by_turns({side: lambda side=side: run(side) for side in ends}, args.rounds)
    for told, values, unit in ((what, seconds, "s"), ("its peak memory", peaks, "GiB")):
        yield Line(told, values["ours"], "diffusers", values["diffusers"], unit)


@torch.no_grad()
def cost(args: argparse.Namespace) -> Iterator[Line]:
    """A step with guidance, for each picture, at several sizes and batches."""
    sizes = {(side, 1): side for side in (256, 512, 768)} | {(args.size, batch): args.size for batch in (2, 4, 8)}
    for side, batch in sizes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, 4, side // 8, side // 8, generator=generator)
        texts = torch.randn(2, 77, 768, generator=generator)
        seconds, _ = by_turns({"ours": guided_step(args, x, texts)}, args.rounds)
        yield Line(f"a step of {side}², batch {batch}, a picture", [each / batch for each in seconds["ours"]])


ROWS: dict[str, Callable[[argparse.Namespace], Iterator[Line]]] = {
    "step": step, "decode": decode, "start": start, "picture": picture, "cost": cost,
}  # fmt: skip


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def draw_model(folder: Path) -> None:
    """Stable Diffusion v1's networks with random weights, written by diffusers in float16."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ldm.models.tokenizer import shipped_vocabulary

    torch.manual_seed(0)
    vocabulary, merges = shipped_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
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
        **{name: part.half() for name, part in parts.items()}, tokenizer=tokenizer,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    main()
