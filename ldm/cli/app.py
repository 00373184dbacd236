"""`ldm`: one command, a subcommand each for what it does. Paths go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ldm import __version__
from ldm.cli import convert, download, generate, inspect, plan, plot, regenerate, tokenize, train
from ldm.errors import LdmError, RequestError, is_out_of_memory

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Faults are one line, without the usage in front."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but a command tells itself what it does not know: it has the flags that could be meant."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            asked = [word.split("=")[0] for word in unknown if word.startswith("--")]
            near = [match for flag in asked for match in difflib.get_close_matches(flag, flags, 1, cutoff=0.75)]
            hint = f"; nearest is {', '.join(near)}" if near else "" if asked else "; quote texts that have spaces"
            self.error(f"unrecognized arguments: {' '.join(unknown):.200}{hint}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


class BesideBars(logging.Handler):
    """Messages to stderr, on lines of their own where a progress bar is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # not imported where there is none
        if tqdm is None:
            print(self.format(record), file=sys.stderr)
        else:
            tqdm.tqdm.write(self.format(record), file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `ldm`, with all its commands; each sets `run` to what carries it out."""
    parser = Parser(prog="ldm", description="Stable Diffusion v1.x on your own machine.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ldm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    generate.add_commands(commands)
    inspect.add_commands(commands)
    plan.add_commands(commands)
    convert.add_commands(commands)
    download.add_commands(commands)
    plot.add_commands(commands)
    regenerate.add_commands(commands)
    tokenize.add_commands(commands)
    train.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, sys.argv's where none is given, and return its exit code."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        args.run(args)

    return exit_code("ldm", run)


def exit_code(program: str, run: Callable[[], None]) -> int:
    """Run what a program does; what goes wrong is told in one line, by the program's name."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # What is printed are paths, which need not be text in the terminal's encoding.
            sys.stdout.reconfigure(encoding=sys.getfilesystemencoding(), errors=sys.getfilesystemencodeerrors())
        logging.basicConfig(format="%(message)s", handlers=[BesideBars()])
        logging.getLogger("ldm").setLevel(logging.INFO)
        run()
        return 0
    except SystemExit as stop:  # from argparse
        return int(stop.code or 0)
    except BrokenPipeError:  # whoever read the paths has read enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it at exit)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        told, code = "interrupted", EXIT_INTERRUPTED
    except LdmError as error:
        told, code = str(error), EXIT_USAGE if isinstance(error, RequestError) else EXIT_FAILURE
    except OSError as error:
        parts = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
        told, code = parts or str(error), EXIT_FAILURE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told, code = "out of memory: use a smaller size or batch, or close other programs", EXIT_FAILURE
    print(f"{program}: {told}", file=sys.stderr)
    return code
