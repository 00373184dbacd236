"""`ldm inspect`: what a file is and holds, without loading it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ldm.errors import CheckpointError, RequestError


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of `ldm`."""
    parser = commands.add_parser(
        "inspect",
        help="tell what a model file or folder holds",
        description="Tell what a model file or folder is and holds, from its header alone.",
        allow_abbrev=False,
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a model file, or a diffusers folder")
    parser.add_argument("--hash", action="store_true", help="also the sha256, and the short hash AUTOMATIC1111 shows")
    parser.add_argument("--json", action="store_true", help="as JSON, with the name of every missing tensor")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """A report of each path; those that cannot be read are named, and fail the command after the others are told."""
    from ldm.checkpoint.inspect import inspect, to_text

    if args.hash and (folder := next((path for path in args.paths if path.is_dir()), None)):
        raise RequestError(f"{folder}: --hash is of files: give one of the folder's")
    failures = []
    for path in args.paths:
        try:
            report = inspect(path) | (_hashes(path) if args.hash else {})
        except CheckpointError as error:
            failures.append(error)
            if len(args.paths) > 1:
                print(f"ldm: {error}", file=sys.stderr)
            continue
        print(json.dumps(report, ensure_ascii=False, indent=1) if args.json else to_text(report))
    if len(args.paths) > 1 and failures:
        raise CheckpointError(f"{len(failures)} of {len(args.paths)} cannot be read")
    for failure in failures:
        raise failure


def _hashes(path: Path) -> dict[str, str]:
    from ldm.checkpoint.inspect import SHORT_HASH
    from ldm.files import sha256

    digest = sha256(path)
    return {"sha256": digest, "short hash": digest[:SHORT_HASH]}
