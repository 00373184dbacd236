"""`ldm inspect`: what a file is and holds, without loading it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ldm.errors import RequestError


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of `ldm`."""
    parser = commands.add_parser(
        "inspect",
        help="tell what a model file or folder holds",
        description="Tell what a model file or folder is and holds, from its header alone.",
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, help="a .safetensors or .ckpt file, or a diffusers folder")
    parser.add_argument("--hash", action="store_true", help="also the sha256, and the short hash AUTOMATIC1111 shows")
    parser.add_argument("--json", action="store_true", help="as JSON, with the name of every missing tensor")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ldm.checkpoint.inspect import SHORT_HASH, inspect, to_text
    from ldm.files import sha256

    if args.hash and args.path.is_dir():
        raise RequestError("--hash is of one file: give one of the folder's")
    report = inspect(args.path)
    if args.hash:
        report["sha256"] = sha256(args.path)
        report["short hash"] = report["sha256"][:SHORT_HASH]
    print(json.dumps(report, ensure_ascii=False, indent=1) if args.json else to_text(report))
