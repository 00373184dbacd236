"""`ldm txt2img` and `ldm img2img`: flags made from the fields of Request, pictures written with their metadata."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from ldm.adapters.folders import find_loras
from ldm.errors import CheckpointError, RequestError
from ldm.prompt import split_loras
from ldm.request import DEFAULT_STRENGTH, SEEDS, Request

if TYPE_CHECKING:
    from PIL import Image

TYPES = {"str": str, "int": int, "float": float}

# Other spellings of a flag. The short ones are shown; the long ones are CompVis's and are not.
SHORT = {"prompt": "-p", "negative_prompt": "-n", "steps": "-s", "width": "-W", "height": "-H"}
COMPVIS = {
    "steps": "--ddim_steps",
    "cfg_scale": "--scale",
    "eta": "--ddim_eta",
    "batch_size": "--n_samples",
    "width": "--W",
    "height": "--H",
}
MAX_BATCHES = 1_000_000


def add_commands(commands: Any) -> None:
    """Add both commands to the subparsers of `ldm`."""
    txt2img = commands.add_parser(
        "txt2img", help="make pictures from a prompt", description="Make pictures from a prompt.", allow_abbrev=False
    )
    _add_flags(txt2img)
    txt2img.set_defaults(run=run, init_img=None, strength=None)

    img2img = commands.add_parser(
        "img2img",
        help="make pictures from a prompt and a picture",
        description="Make pictures from a prompt and a picture.",
        allow_abbrev=False,
    )
    img2img.add_argument("--init-img", required=True, type=Path, metavar="IMAGE", help="the picture to start from")
    _add_flags(img2img, strength=DEFAULT_STRENGTH)
    img2img.set_defaults(run=run)


def _add_flags(parser: argparse.ArgumentParser, strength: float | None = None) -> None:
    what = parser.add_argument_group("what to make")
    for f in fields(Request):
        default = {"prompt": None, "strength": strength}.get(f.name, f.default)
        if f.name == "strength" and strength is None:
            continue
        kind = TYPES[str(f.type).split(" | ")[0]]
        flags = [*([SHORT[f.name]] if f.name in SHORT else []), "--" + f.name.replace("_", "-")]
        shown = "" if default in (None, "") else f" (default {default})"
        what.add_argument(*flags, dest=f.name, type=kind, default=default, help=f.metadata["help"] + shown)
        if f.name in COMPVIS:
            _add_alias(what, COMPVIS[f.name], dest=f.name, type=kind)
    what.add_argument("--from-file", type=Path, metavar="FILE", help="a prompt a line, instead of --prompt")
    what.add_argument("--batch-count", type=int, default=1, metavar="N", help="batches to make (default 1)")
    _add_alias(what, "--n_iter", dest="batch_count", type=int)
    _add_alias(what, "--plms", dest="sampler", action="store_const", const="plms")

    how = parser.add_argument_group("with what, and where to")
    how.add_argument(
        "--model", metavar="PATH", help="a .safetensors or .ckpt file, or a diffusers folder (default: shipped)"
    )
    _add_alias(how, "--ckpt", dest="model")
    add_model_choices(how)
    how.add_argument(
        "--lora", action="append", default=[], type=_lora, metavar="PATH[:STRENGTH[:TEXT_STRENGTH]]",
        help="a LoRA or one of its relatives to merge into the model; repeatable",
    )  # fmt: skip
    how.add_argument(
        "--lora-dir", action="append", default=[], type=Path, metavar="DIR",
        help="where the LoRAs are that prompts name, as in <lora:name:0.8>; repeatable",
    )  # fmt: skip
    how.add_argument(
        "--embedding", action="append", default=[], type=Path, metavar="PATH",
        help="a textual inversion, which the name of its file stands for in prompts; repeatable",
    )  # fmt: skip
    how.add_argument("--allow-nonfinite", action="store_true", help="load weights that are NaN or infinite")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    how.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default auto)")
    how.add_argument("--outdir", type=Path, default=Path("outputs"), help="where pictures go (default outputs)")
    how.add_argument("--grid", action="store_true", help="also write all pictures on one sheet")
    _add_alias(how, "--skip_grid", dest="grid", action="store_false")


MODEL_CHOICES = ("vae", "text_encoder", "ema", "prediction_type", "zero_terminal_snr")


def add_model_choices(group: Any) -> None:
    """Flags for what to take from where, beyond the model's own; their names are in MODEL_CHOICES."""
    group.add_argument("--vae", metavar="PATH", help="a file or folder whose VAE to use instead of the model's")
    group.add_argument("--text-encoder", metavar="PATH", help="a file or folder whose text encoder to use instead")
    group.add_argument("--ema", action="store_true", help="use the EMA weights of the U-Net")
    group.add_argument("--prediction-type", metavar="TYPE", help="epsilon or v_prediction (default: the file tells)")
    group.add_argument(
        "--zero-terminal-snr",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="end the noise schedule at pure noise (default: the file tells)",
    )


def _lora(text: str) -> tuple[Path, float, float | None]:
    """PATH[:STRENGTH[:TEXT_STRENGTH]], read from its end, because a path may have colons of its own."""
    number = r"([-+]?(?:\d+\.?\d*|\.\d+))"
    match = re.fullmatch(rf"(.+?)(?::{number})?(?::{number})?", text, re.DOTALL)
    if match is None:
        raise argparse.ArgumentTypeError("the path of a file is missing")
    path, strength, text_strength = match.groups()
    return Path(path), float(strength or 1), float(text_strength) if text_strength else None


def _add_alias(group: Any, flag: str, **kwargs: Any) -> None:
    group.add_argument(flag, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kwargs)


def run(args: argparse.Namespace) -> None:
    """Make the pictures, one batch after the other; print the path of each as soon as it is written."""
    firsts = _first_requests(args)  # every fault is found before anything slow begins
    from ldm import images, metadata
    from ldm.files import write_new
    from ldm.pipeline import StableDiffusion

    init_image = images.load_image(args.init_img) if args.init_img else None
    sd = StableDiffusion.load(
        args.model,
        **{name: getattr(args, name) for name in MODEL_CHOICES},
        allow_nonfinite=args.allow_nonfinite,
        device=args.device,
        dtype=args.dtype,
        lora_folders=args.lora_dir,
    )
    for path, strength, text_strength in args.lora:
        sd.load_lora(path, strength, text_strength=text_strength, allow_nonfinite=args.allow_nonfinite)
    for path in args.embedding:
        sd.load_embedding(path, allow_nonfinite=args.allow_nonfinite)
    args.outdir.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=args.outdir).close()  # fails where nothing can be written
    made: list[Image.Image] = []
    for first, batch in itertools.product(firsts, range(args.batch_count)):
        seed = (first.seeds()[0] + batch * first.batch_size) % SEEDS
        request = sd.resolve(replace(first, seed=seed), init_image)
        steps = sd.grid_length(request)
        pictures = sd.generate(request, init_image, progress=True)
        for image, alone in zip(pictures, request.images(), strict=True):
            save = partial(metadata.save_png, image=image, request=alone, steps=steps, model=sd.name)
            _save_numbered(args.outdir, f"{alone.seed}", save)
        if args.grid:
            made += pictures
    if args.grid:
        write = partial(images.grid(made).save, format="PNG")
        _save_numbered(args.outdir, "grid", lambda path: write_new(path, write))


def _save_numbered(folder: Path, name: str, save: Callable[[Path], None]) -> None:
    """Save as 00000-name.png, or the first higher number that is free in the folder, and print the path."""
    taken = (re.match(r"(\d{5,})-", file.name) for file in folder.iterdir())
    number = max((int(match[1]) + 1 for match in taken if match), default=0)
    while True:
        path = folder / f"{number:05d}-{name}.png"
        try:
            save(path)
        except FileExistsError:  # another process was faster
            number += 1
        else:
            print(path, flush=True)
            return


def _first_requests(args: argparse.Namespace) -> list[Request]:
    """The first request of each prompt, its seed chosen; those of later batches differ in the seed alone."""
    if not 1 <= args.batch_count <= MAX_BATCHES:
        raise RequestError(f"batch_count is {args.batch_count}: use 1 to {MAX_BATCHES}")
    given = {f.name: getattr(args, f.name) for f in fields(Request)}
    requests = [Request(**given | {"prompt": prompt}) for prompt in _prompts(args)]
    tags = [tag for request in requests for tag in split_loras(request.prompt)[1]]
    for path in [*(path for path, _, _ in args.lora), *args.embedding]:
        if not path.is_file():
            file, _, strength = str(path).rpartition(":")
            hint = f"; {strength!r} is no strength of {file}: use numbers" if Path(file).is_file() else ""
            raise CheckpointError(f"{path}: no such file{hint}")
    find_loras((tag.name for tag in tags), args.lora_dir, [path.stem for path, _, _ in args.lora])
    return [replace(request, seed=request.seeds()[0]) for request in requests]


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompt is None) == (args.from_file is None):
        raise RequestError("give either --prompt or --from-file")
    if args.from_file is None:
        return [args.prompt]
    try:
        lines = args.from_file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would split at U+2028 too
    except UnicodeDecodeError as error:
        raise RequestError(f"{args.from_file}: not a text file in UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise RequestError(f"{args.from_file}: holds no prompt; expected one a line")
    return prompts
