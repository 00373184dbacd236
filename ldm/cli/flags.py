"""Flags that several commands share: what to make, with which model, and where to; and what is made of them."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from ldm.adapters.folders import find_loras
from ldm.errors import CheckpointError, RequestError
from ldm.prompt import split_loras
from ldm.request import DEFAULT_STRENGTH, Request

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import StableDiffusion

log = logging.getLogger(__name__)

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
OF_AN_IMAGE = {  # fields that only a picture with an initial image has use for
    "strength", "exact_steps", "mask_blur", "fill", "only_masked", "mask_padding",
    "outpaint_left", "outpaint_right", "outpaint_top", "outpaint_bottom", "image_cfg_scale",
}  # fmt: skip
MODEL_CHOICES = ("vae", "text_encoder", "ema", "prediction_type", "zero_terminal_snr")
FORMATS = ("png", "jpg", "webp")


def add_request_flags(parser: Any, *, of_an_image: bool) -> None:
    """A flag for each field of Request, with or without those of an initial image."""
    for f in fields(Request):
        if f.name in OF_AN_IMAGE and not of_an_image:
            continue
        default = {"prompt": None}.get(f.name, f.default)
        flags = [*([SHORT[f.name]] if f.name in SHORT else []), "--" + f.name.replace("_", "-")]
        kind = str(f.type).split(" | ")[0]
        if kind == "bool":
            parser.add_argument(*flags, action="store_true", help=f.metadata["help"])
            continue
        shown = "" if default in (None, "") else f" (default {default})"
        what = {"dest": f.name, "type": TYPES[kind]}
        if choices := f.metadata["choices"]:
            what["choices"] = choices
        parser.add_argument(*flags, **what, default=default, help=f.metadata["help"] + shown)
        if f.name in COMPVIS:
            add_alias(parser, COMPVIS[f.name], **what)
    add_alias(parser, "--plms", dest="sampler", action="store_const", const="plms")


def add_alias(group: Any, flag: str, **kwargs: Any) -> None:
    group.add_argument(flag, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kwargs)


def add_model_choices(group: Any) -> None:
    """Flags for what to take from where, beyond the model's own; their names are in MODEL_CHOICES."""
    group.add_argument("--vae", metavar="PATH", help="a file or folder whose VAE to use instead of the model's")
    group.add_argument("--text-encoder", metavar="PATH", help="a file or folder whose text encoder to use instead")
    group.add_argument("--ema", action="store_true", help="use the EMA weights of the U-Net")
    group.add_argument(
        "--prediction-type", metavar="TYPE", help="epsilon, v_prediction or sample (default: the file tells)"
    )
    group.add_argument(
        "--zero-terminal-snr",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="end the noise schedule at pure noise (default: the file tells)",
    )


def add_model_flags(group: Any) -> None:
    """Flags for everything that `load` needs."""
    group.add_argument(
        "--model", metavar="PATH", help="a .safetensors or .ckpt file, or a diffusers folder (default: shipped)"
    )
    add_alias(group, "--ckpt", dest="model")
    add_model_choices(group)
    group.add_argument(
        "--lora", action="append", default=[], type=_lora, metavar="PATH[:STRENGTH[:TEXT_STRENGTH]]",
        help="a LoRA or one of its relatives to merge into the model; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--lora-dir", action="append", default=[], type=Path, metavar="DIR",
        help="where the LoRAs are that prompts name, as in <lora:name:0.8>; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--embedding", action="append", default=[], type=Path, metavar="PATH",
        help="a textual inversion, which the name of its file stands for in prompts; repeatable",
    )  # fmt: skip
    group.add_argument("--allow-nonfinite", action="store_true", help="load weights that are NaN or infinite")
    group.add_argument("--taesd", metavar="PATH", help="TAESD's decoder, for better previews")
    group.add_argument(
        "--taesd-finals", action="store_true", help="decode the pictures with it too: faster, less exact"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    group.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default auto)")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="what to get by with, such as 4G or 1500M (default: what is free)",
    )
    add_int8(group)


def add_int8(group: Any) -> None:
    group.add_argument("--int8", action="store_true", help="the U-Net's weights in eight bits: less memory, less exact")


def _lora(text: str) -> tuple[Path, float, float | None]:
    """PATH[:STRENGTH[:TEXT_STRENGTH]], read from its end, because a path may have colons of its own."""
    number = r"([-+]?(?:\d+\.?\d*|\.\d+))"
    match = re.fullmatch(rf"(.+?)(?::{number})?(?::{number})?", text, re.DOTALL)
    if match is None:
        raise argparse.ArgumentTypeError("the path of a file is missing")
    path, strength, text_strength = match.groups()
    return Path(path), float(strength or 1), float(text_strength) if text_strength else None


def add_output_flags(group: Any) -> None:
    group.add_argument("--outdir", type=Path, default=Path("outputs"), help="where pictures go (default outputs)")
    group.add_argument("--format", choices=FORMATS, default="png", help="of the files (default png)")
    group.add_argument("--no-metadata", action="store_true", help="write pictures without their settings")


def check_adapters(args: argparse.Namespace, requests: Iterable[Request]) -> None:
    """Raises CheckpointError and RequestError for LoRAs and embeddings that are not there, before anything slow."""
    for path in [*(path for path, _, _ in args.lora), *args.embedding]:
        if not path.is_file():
            file, _, strength = str(path).rpartition(":")
            hint = f"; {strength!r} is no strength of {file}: use numbers" if Path(file).is_file() else ""
            raise CheckpointError(f"{path}: no such file{hint}")
    tags = [tag.name for request in requests for tag in split_loras(request.prompt)[1]]
    find_loras(tags, args.lora_dir, [path.stem for path, _, _ in args.lora])


def with_strength(request: Request, args: argparse.Namespace, sd: StableDiffusion) -> Request:
    """With img2img's default, unless the model edits pictures, which it starts from noise."""
    if args.init_img is None or request.strength is not None or sd.config.edits:
        return request
    return replace(request, strength=DEFAULT_STRENGTH)


def load(args: argparse.Namespace, largest: Request | None = None) -> StableDiffusion:
    """The model that the flags name, with its LoRAs and embeddings; `largest` is what --memory has to be enough for."""
    from ldm.pipeline import StableDiffusion

    sd = StableDiffusion.load(
        args.model,
        **{name: getattr(args, name) for name in MODEL_CHOICES},
        allow_nonfinite=args.allow_nonfinite,
        device=args.device,
        dtype=args.dtype,
        lora_folders=args.lora_dir,
        taesd=args.taesd,
        taesd_finals=args.taesd_finals,
        memory=args.memory,
        int8=args.int8,
        largest=largest,
    )
    for path, strength, text_strength in args.lora:
        sd.load_lora(path, strength, text_strength=text_strength, allow_nonfinite=args.allow_nonfinite)
    for path in args.embedding:
        sd.load_embedding(path, allow_nonfinite=args.allow_nonfinite)
    return sd


def vae_name(args: argparse.Namespace) -> str | None:
    """Of the one that stands in for the model's, where there is one."""
    return None if args.vae is None else Path(args.vae).stem


class Outputs:
    """The folder that pictures go to, under numbered names that are never written over. Raises OSError."""

    def __init__(self, args: argparse.Namespace, sd: StableDiffusion):
        self.args, self.model = args, sd.name
        args.outdir.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=args.outdir).close()  # fails where nothing can be written

    def save(self, name: str, write: Callable[[Path], None]) -> None:
        """Write as 00000-name, or the first higher number that is free in the folder, and print the path."""
        folder = self.args.outdir
        taken = (re.match(r"(\d{5,})-", file.name) for file in folder.iterdir())
        number = max((int(match[1]) + 1 for match in taken if match), default=0)
        while True:
            path = folder / f"{number:05d}-{name}"
            try:
                write(path)
            except FileExistsError:  # another process was faster
                number += 1
            else:
                print(path, flush=True)
                return

    def save_picture(self, image: Image.Image, request: Request, steps: int, masked: bool = False) -> None:
        """With the request that makes it again, LoRAs that the command line named as tags of the prompt."""
        from ldm.metadata import save_image

        vae = vae_name(self.args)
        write = partial(
            save_image, image=image, request=self._recorded(request), steps=steps, model=self.model, vae=vae,
            metadata=not self.args.no_metadata, masked=masked,
        )  # fmt: skip
        self.save(f"{request.seed}.{self.args.format}", write)

    def _recorded(self, request: Request) -> Request:
        named = {tag.name for tag in split_loras(request.prompt)[1]}
        unnamed = [(path, *strengths) for path, *strengths in self.args.lora if path.stem not in named]
        if lost := [path.stem for path, *_ in unnamed if set(path.stem) & set(":<>")]:
            log.warning("not recorded in the picture, because no tag can have such a name: %s", ", ".join(lost))
        tags = [
            f" <lora:{path.stem}:{strength if text is None else text!r}:{strength!r}>"
            for path, strength, text in unnamed
            if path.stem not in lost
        ]
        return replace(request, prompt=request.prompt + "".join(tags))


def read_prompts(args: argparse.Namespace) -> list[str]:
    """From --prompt, or from the lines of --from-file. Raises RequestError."""
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
