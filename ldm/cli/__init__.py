"""The command line. Parsing imports nothing heavy, so that `--help` answers at once."""

from ldm.cli.app import main

__all__ = ["main"]
