"""`ldm download`: a public model by its short name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm import hub
from ldm.errors import RequestError


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of `ldm`."""
    parser = commands.add_parser(
        "download",
        help="download a public model",
        description="Download a public model, check it, and print its path. HF_HOME says where models are kept; "
        "HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold too.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="which model: see --list")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="put the file there, not into Hugging Face's cache")
    parser.add_argument("--list", action="store_true", help="show the models: name, size, licence, what it is")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the path of the model, or the table of them all."""
    if args.list:
        for line in _table():
            print(line)
        return
    if args.name is None:
        raise RequestError(f"give the name of a model, {', '.join(hub.MODELS)}, or --list")
    print(hub.download(args.name, args.to))


def _table() -> list[str]:
    rows = [(name, hub.format_size(model.size), model.licence, model.about) for name, model in hub.MODELS.items()]
    name, size, licence, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"{a:<{name}}  {b:>{size}}  {c:<{licence}}  {d}" for a, b, c, d in rows]
