"""`ldm train`: an autoencoder or latent diffusion, from nothing or from a model, as a TOML file says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.errors import RequestError


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of `ldm`."""
    parser = commands.add_parser(
        "train",
        help="train or fine-tune a model",
        description="Train as CONFIG says, a TOML file; docs/training.md explains it, configs/ has some to start from. "
        "Everything goes to the folder that it names; the path of the result is printed at the end.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a .toml file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="change a value of the config, such as loop.steps=100; repeatable",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on where the run in the folder was when last saved")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train, and print the path of the result, from one process of all. Raises LdmError."""
    try:
        import matplotlib  # noqa: F401 (these two are needed late)
        import tomli_w  # noqa: F401
        from accelerate import PartialState

        from ldm.train.config import read_train_config

        config = read_train_config(args.config, args.changes)
        from ldm.train import start
    except ModuleNotFoundError as error:
        raise RequestError(f"training needs {error.name}: pip install -e '.[train]'") from error
    target = start.run(config, args.resume)
    if PartialState().is_main_process:
        print(target)
