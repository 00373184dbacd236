"""`ldm plot`: pictures whose requests differ in one to three fields, on a labelled sheet."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any

from ldm.cli.flags import (
    OF_AN_IMAGE,
    Outputs,
    add_model_flags,
    add_output_flags,
    add_request_flags,
    check_adapters,
    load,
    with_strength,
)
from ldm.errors import RequestError
from ldm.request import Request

if TYPE_CHECKING:
    from PIL import Image

MAX_CELLS = 1000
MAX_PIXELS = 2**28  # of all pictures: 1024 of 512×512, 0.8 GB
FIELDS = {f.name: f for f in fields(Request)}
READERS: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": {"true": True, "false": False}.__getitem__}


@dataclass(frozen=True)
class Axis:
    """A field of Request, its values as they were typed, and as they are."""

    field: str
    typed: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        return [f"{self.field}={'none' if value is None else value}" if self.field else "" for value in self.values]

    def put(self, value: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Fields with a value of this axis. Raises RequestError where there is nothing to put it in the place of."""
        if self.field != "prompt":
            return given | {self.field: value} if self.field else given
        texts, sought = {name: given[name] for name in ("prompt", "negative_prompt")}, self.values[0]
        if not sought or not any(sought in text for text in texts.values()):
            raise RequestError(
                f"no prompt has {brief(sought)}: the first value of a prompt axis is what others replace"
            )
        return given | {name: text.replace(sought, value) for name, text in texts.items()}


NOTHING = Axis("", "", ("",))


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of `ldm`."""
    parser = commands.add_parser(
        "plot",
        help="compare settings on a labelled sheet",
        description="Make a picture for each combination of some values, and a labelled sheet of them. A prompt axis "
        "replaces its first value, which the prompt or the negative prompt must have, by each of its values. Values "
        "with commas are quoted as in CSV: --x 'prompt=red,\"green, blue\"'.",
        allow_abbrev=False,
    )
    for letter, where in {"x": "across", "y": "down", "z": "sheet by sheet"}.items():
        parser.add_argument(
            f"--{letter}", required=letter == "x", type=read_axis, default=NOTHING, metavar="FIELD=VALUE,VALUE…",
            help=f"what differs {where}, such as steps=10,20,30",
        )  # fmt: skip
    parser.add_argument("--init-img", type=Path, metavar="IMAGE", help="the picture to start from")
    parser.add_argument("--mask", type=Path, metavar="IMAGE", help="white where it is to be painted anew")
    add_request_flags(parser.add_argument_group("what to make"), of_an_image=True)
    how = parser.add_argument_group("with what, and where to")
    add_model_flags(how)
    add_output_flags(how)
    parser.set_defaults(run=run)


def read_axis(text: str) -> Axis:
    """`steps=10,20,30`; "none" stands for None. Raises ArgumentTypeError."""
    name, equals, typed = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in FIELDS or not equals:
        raise argparse.ArgumentTypeError(f"{brief(text)}: use FIELD=VALUE,VALUE… with one of {', '.join(FIELDS)}")
    kind, *optional = str(FIELDS[name].type).split(" | ")
    try:
        [texts] = csv.reader([typed], skipinitialspace=True, strict=True)
        values = [None if optional and value.strip() == "none" else READERS[kind](value.strip()) for value in texts]
    except csv.Error as error:
        raise argparse.ArgumentTypeError(f"{brief(text)}: not values as in a line of CSV ({error})") from error
    except (ValueError, KeyError) as error:
        expected = "true or false" if kind == "bool" else f"values of type {kind}"
        raise argparse.ArgumentTypeError(f"{brief(text)}: {name} takes {expected}, with commas between") from error
    if not values:
        raise argparse.ArgumentTypeError(f"{brief(text)}: no value is given")
    return Axis(name, typed, tuple(values))


def run(args: argparse.Namespace) -> None:
    """Make the pictures, then the sheet; print the path of each as soon as it is written."""
    axes = [args.x, args.y, args.z]
    requests = _requests(args, axes)  # every fault is found before anything slow begins
    from tqdm import tqdm

    from ldm import images
    from ldm.metadata import parameters

    sd = load(args)
    init_image = images.load_image(args.init_img) if args.init_img else None
    requests = [sd.complete(with_strength(request, args, sd), init_image, args.mask) for request in requests]
    pixels = sum((r.width or 0) * (r.height or 0) * r.hires_scale**2 * r.batch_size for r in requests)
    if pixels > MAX_PIXELS:
        raise RequestError(
            f"the pictures have {pixels / 1e6:.0f} megapixels: use fewer or smaller ones, {MAX_PIXELS // 10**6} at most"
        )
    outputs = Outputs(args, sd)
    cells: list[Image.Image] = []
    for request in tqdm(requests, unit="cell"):
        pictures = sd.generate(request, init_image, args.mask)
        for image, alone in zip(pictures, request.images(), strict=True):
            with tqdm.external_write_mode():
                outputs.save_picture(image, alone, sd.grid_length(request), masked=args.mask is not None)
        cells.append(images.grid(pictures))
    text = "" if args.no_metadata else parameters(requests[0], sd.grid_length(requests[0]), sd.name) + described(axes)
    outputs.save("plot.png", partial(_save_sheet, image=sheet(cells, axes), text=text))


def _requests(args: argparse.Namespace, axes: Sequence[Axis]) -> list[Request]:
    """A request for each cell, x changing fastest and z slowest, all with one seed unless an axis has others."""
    if args.prompt is None:
        raise RequestError("a plot needs a --prompt")
    names = [axis.field for axis in axes if axis.field not in ("", "prompt")]
    if args.init_img is None and (idle := OF_AN_IMAGE & set(names)):
        raise RequestError(f"an axis of {', '.join(sorted(idle))} needs --init-img")
    if len(names) > len(set(names)):
        raise RequestError(f"the axes are {', '.join(names)}: use each field once")
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_CELLS:
        raise RequestError(f"the axes make {count} pictures: use values for {MAX_CELLS} at most")
    common = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    if common["seed"] is None:
        [common["seed"]] = Request("").seeds()
    requests = []
    for values in itertools.product(*(axis.values for axis in reversed(axes))):
        given = common
        # What is replaced in prompts comes last, so that it is replaced in the values of a negative_prompt axis too.
        for axis, value in sorted(zip(reversed(axes), values, strict=True), key=lambda pair: pair[0].field == "prompt"):
            given = axis.put(value, given)
        requests.append(Request(**given))
    check_adapters(args, requests)
    return requests


def sheet(cells: Sequence[Image.Image], axes: Sequence[Axis]) -> Image.Image:
    """Cells, x changing fastest and z slowest, as one labelled table for each z, one below the other."""
    from ldm.images import contact_sheet

    x, y, z = axes
    size = len(x.values) * len(y.values)
    tables = [contact_sheet(cells[i : i + size], x.labels, y.labels) for i in range(0, len(cells), size)]
    return contact_sheet(tables, [""], z.labels)


def described(axes: Sequence[Axis]) -> str:
    """The axes as AUTOMATIC1111 adds them to the parameters of a sheet."""
    settings = [
        f"{letter} Type: {axis.field}, {letter} Values: {json.dumps(axis.typed, ensure_ascii=False)}"
        for letter, axis in zip("XYZ", axes, strict=True)
        if axis.field
    ]
    return ", ".join([", Script: X/Y/Z plot", *settings])


def _save_sheet(path: Path, image: Image.Image, text: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    from ldm.files import write_new
    from ldm.metadata import PARAMETERS

    info = PngInfo()
    if text:
        info.add_text(PARAMETERS, text)
    write_new(path, lambda file: image.save(file, "PNG", pnginfo=info))
