"""Measure a model: python scripts/evaluate.py --help"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from ldm.cli.app import Parser, exit_code
from ldm.errors import RequestError
from ldm.files import made_folder, staged_file
from ldm.request import Request

if TYPE_CHECKING:
    from ldm.train.evaluate import Judged

RESULTS = ("table.md", "results.json", "sheet.png")


def build_parser() -> Parser:
    default = Request("")
    parser = Parser(
        prog="evaluate",
        description="Make pictures of held-out captions of the shapes world and measure what they show of them; or, "
        "with --vae, how exact the VAE is; or, with --images, how near a folder of pictures is to one of real ones "
        "(--reference) and to its captions (--clip).",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="PATH", help="a model file or diffusers folder (default: shipped)")
    parser.add_argument("--lora", metavar="PATH", help="to merge into it")
    parser.add_argument(
        "--prompts", type=at_least_one, default=500, metavar="N", help="of all kinds together (default 500)"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help="of scenes: one, two, count, three, unseen (default: these), or moon, which only fine-tuned models know",
    )
    for name, kind in (("sampler", str), ("steps", int), ("cfg_scale", float)):
        value = getattr(default, name)
        told = "the model's" if value is None else value
        parser.add_argument(
            "--" + name.replace("_", "-"), dest=name, nargs="+", type=kind, default=[value], metavar=name.upper(),
            help=f"one or more, each with each of the other settings (default {told})",
        )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of scenes and noise (default 0)")
    parser.add_argument(
        "--batch-size", type=at_least_one, default=16, metavar="N", help="pictures at once (default 16)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where to write {', '.join(RESULTS)}")
    parser.add_argument("--vae", action="store_true", help="measure the VAE on as many pictures as --prompts tells")
    parser.add_argument("--images", metavar="DIR", help="pictures, with captions as for training, to measure instead")
    parser.add_argument("--reference", metavar="DIR", help="real pictures, for FID, which needs --inception")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="torch-fidelity's weights of Inception")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP model of transformers, for the CLIP score")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default auto)")
    return parser


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}: use a whole number from 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, sys.argv's where none is given, and return its exit code."""

    def run() -> None:
        parser = build_parser()
        args = parser.parse_args(argv)
        mode = "--images" if args.images else "--vae" if args.vae else "shapes"
        measure, unused = MODES[mode]
        for name in unused:
            if getattr(args, name) != parser.get_default(name):
                needs = "--images" if mode == "shapes" else f"pictures of shapes, not {mode}"
                parser.error(f"--{name.replace('_', '-')} is for {needs}: leave it out")
        measure(args)

    return exit_code("evaluate", run)


def measure_pictures(args: Namespace) -> None:
    """Print the table and write it, all verdicts and a sheet."""
    from ldm.pipeline import StableDiffusion
    from ldm.train.evaluate import ALL_KINDS, Setting, evaluate, table
    from ldm.train.shapes import NEW_SHAPES

    kinds = list(dict.fromkeys(args.kinds or ALL_KINDS))
    if unknown := set(kinds) - {*ALL_KINDS, *NEW_SHAPES}:
        raise RequestError(
            f"kinds are {', '.join(sorted(unknown))}: use some of {', '.join([*ALL_KINDS, *NEW_SHAPES])}"
        )
    if args.prompts < len(kinds):
        raise RequestError(f"prompts is {args.prompts}: use {len(kinds)} or more, one a kind")
    if args.out and (taken := [name for name in RESULTS if (args.out / name).exists()]):
        raise RequestError(f"{args.out} holds {', '.join(taken)}: give another --out")
    requests = [  # which know other spellings of samplers, and check
        Request("", sampler=sampler, steps=steps, cfg_scale=scale, seed=args.seed)
        for sampler in args.sampler
        for steps in args.steps
        for scale in args.cfg_scale
    ]
    settings = [Setting(request.sampler, request.steps, request.cfg_scale) for request in requests]
    with made_folder(args.out) if args.out else nullcontext():
        if args.out:
            check_writable(args.out)
        sd = StableDiffusion.load(args.model, device=args.device, dtype=args.dtype)
        if args.lora:
            sd.load_lora(args.lora)
        judged = evaluate(sd, settings, kinds, args.prompts // len(kinds), args.seed, args.batch_size)
        print(table(judged), end="")
        if args.out:
            write(args.out, judged)


def check_writable(folder: Path) -> None:
    """Raises RequestError. To try it is the one sure way: permissions do not tell of a root user, or of /proc."""
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RequestError(f"{folder}: no file can be made there ({error.strerror}): give another --out") from error


def write(folder: Path, judged: Sequence[Judged]) -> None:
    from ldm.train.evaluate import sheet, table

    results = json.dumps([each.to_dict() for each in judged], indent=1)
    contents = {
        "table.md": lambda path: path.write_text(table(judged), encoding="utf-8"),
        "results.json": lambda path: path.write_text(results, encoding="utf-8"),
        "sheet.png": lambda path: sheet(judged).save(path, "PNG"),
    }
    for name, fill in contents.items():
        with staged_file(folder / name) as path:
            fill(path)


def measure_vae(args: Namespace) -> None:
    from ldm.pipeline import StableDiffusion
    from ldm.train.evaluate import vae_fidelity

    sd = StableDiffusion.load(args.model, device=args.device, dtype=args.dtype)
    told = vae_fidelity(sd, args.prompts, args.seed)
    print(f"PSNR {told['PSNR']:.2f} dB, SSIM {told['SSIM']:.4f}, n = {args.prompts}")


def measure_folder(args: Namespace) -> None:
    """FID and CLIP score of a folder's pictures."""
    if not (args.reference or args.clip):
        raise RequestError("--images needs --reference, --clip or both, to be measured by")
    if args.reference and not args.inception:
        raise RequestError("--reference needs --inception: the file pt_inception-2015-12-05-6726825d.pth")
    from ldm.runtime.device import pick_device
    from ldm.train.data import open_examples
    from ldm.train.evaluate import clip_score, frechet_distance

    device = pick_device(args.device)
    if args.reference:
        pictures, reference = (open_examples(source, caption="") for source in (args.images, args.reference))
        distance, *counts = frechet_distance(pictures, reference, args.inception, device)
        print(f"FID {distance:.2f}, n = {counts[0]} and {counts[1]}")
    if args.clip:
        score, count = clip_score(open_examples(args.images), args.clip, device)
        print(f"CLIP score {score:.2f}, n = {count}")


OF_FOLDERS = ("reference", "inception", "clip")
OF_SHAPES = ("lora", "kinds", "out", "sampler", "steps", "cfg_scale", "batch_size")
OF_MODELS = ("model", "prompts", "seed", "dtype", "vae")
MODES = {  # what is measured → how, and the flags that it has no use for
    "shapes": (measure_pictures, OF_FOLDERS),
    "--vae": (measure_vae, (*OF_FOLDERS, *OF_SHAPES)),
    "--images": (measure_folder, (*OF_SHAPES, *OF_MODELS)),
}

if __name__ == "__main__":
    sys.exit(main())
