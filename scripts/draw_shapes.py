"""Draw scenes of the shapes world into a folder, with their captions: python scripts/draw_shapes.py --help"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from random import Random

from tqdm import tqdm

from ldm.cli.app import Parser, exit_code
from ldm.errors import RequestError
from ldm.files import made_folder, staged_folder
from ldm.train.shapes import KINDS, NEW_SHAPES, SHAPES, SIDES, SPLITS, draw_scene


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, sys.argv's where none is given, and return its exit code."""
    return exit_code("draw_shapes", lambda: draw(build_parser().parse_args(argv)))


def build_parser() -> Parser:
    parser = Parser(prog="draw_shapes", description=__doc__.split(":")[0] + ", as ldm train reads them.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--count", type=int, default=20, help="pictures (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the world (default 0)")
    parser.add_argument("--side", type=int, default=128, help="pixels (default 128)")
    parser.add_argument("--kind", choices=KINDS, help="of scenes (default: all)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="of the world (default train)")
    parser.add_argument(
        "--shape", choices=[*SHAPES, *NEW_SHAPES], help="of the one thing in each picture, such as moon, which is new"
    )
    return parser


def draw(args: Namespace) -> None:
    if args.count < 1 or args.side not in SIDES:
        raise RequestError(
            f"--count is {args.count} and --side {args.side}: use 1 or more, and {SIDES[0]} to {SIDES[-1]}"
        )
    if args.shape and args.kind not in (None, "one"):
        raise RequestError(f"--shape is for pictures of one thing, --kind is {args.kind}: leave one of both out")
    if os.path.lexists(args.folder):
        raise RequestError(f"{args.folder} exists: give a new folder")
    lines = []
    with made_folder(args.folder), staged_folder(args.folder) as folder:
        for number in tqdm(range(args.count), unit="picture"):
            scene = draw_scene(args.seed, number, args.split, "one" if args.shape else args.kind)
            if args.shape:
                scene = scene.with_shape(args.shape)
            name = f"{number:05d}.png"
            scene.draw(args.side).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": scene.caption(Random(number))}))
        (folder / "metadata.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(args.folder)


if __name__ == "__main__":
    sys.exit(main())
