"""`ldm convert`: single file ↔ diffusers folder, .ckpt → .safetensors, dtypes, EMA, pruning, VAE baking."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli.flags import MODEL_CHOICES, add_model_choices


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of `ldm`."""
    parser = commands.add_parser(
        "convert",
        help="write a model in another layout or dtype",
        description="Write a model to TARGET: a file if it ends in .safetensors, a diffusers folder otherwise. SOURCE "
        "and TARGET may be the same; until the new one is whole, the old one stays.",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a .safetensors or .ckpt file, or a folder")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a .safetensors file, or a folder")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: as they are)")
    parser.add_argument("--prune", action="store_true", help="leave out what is not needed to make pictures")
    parser.add_argument("--verify", action="store_true", help="read the result again and compare it bit for bit")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at TARGET")
    parser.add_argument("--allow-nonfinite", action="store_true", help="write weights that are NaN or infinite")
    add_model_choices(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ldm.checkpoint.convert import Conversion, convert
    from ldm.checkpoint.sources import Choices

    choices = Choices(**{name: getattr(args, name) for name in MODEL_CHOICES})
    conversion = Conversion(args.dtype, args.prune, args.verify, args.overwrite, args.allow_nonfinite)
    convert(args.source, args.target, choices, conversion)
    print(args.target)
