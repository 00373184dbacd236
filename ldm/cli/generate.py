"""`ldm txt2img` and `ldm img2img`: flags made from the fields of Request, pictures written with their metadata."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.flags import (
    OF_AN_IMAGE,
    Outputs,
    add_alias,
    add_model_flags,
    add_output_flags,
    add_request_flags,
    check_adapters,
    load,
    read_prompts,
    with_strength,
)
from ldm.errors import RequestError
from ldm.request import Request

if TYPE_CHECKING:
    from PIL import Image

    from ldm.diffusion import Step
    from ldm.pipeline import StableDiffusion

MAX_BATCHES = 1_000_000


def add_commands(commands: Any) -> None:
    """Add both commands to the subparsers of `ldm`."""
    txt2img = commands.add_parser(
        "txt2img", help="make pictures from a prompt", description="Make pictures from a prompt.", allow_abbrev=False
    )
    _add_flags(txt2img, of_an_image=False)
    txt2img.set_defaults(run=run, init_img=None, mask=None)

    img2img = commands.add_parser(
        "img2img",
        help="make pictures from a prompt and a picture; paint under a mask, or beyond its sides",
        description="Make pictures from a prompt and a picture. With a mask, or outpainting, the rest stays as it is.",
        allow_abbrev=False,
    )
    img2img.add_argument("--init-img", required=True, type=Path, metavar="IMAGE", help="the picture to start from")
    img2img.add_argument("--mask", type=Path, metavar="IMAGE", help="white where it is to be painted anew")
    _add_flags(img2img, of_an_image=True)
    img2img.set_defaults(run=run)


def _add_flags(parser: argparse.ArgumentParser, of_an_image: bool) -> None:
    what = parser.add_argument_group("what to make")
    add_request_flags(what, of_an_image=of_an_image)
    what.add_argument("--from-file", type=Path, metavar="FILE", help="a prompt a line, instead of --prompt")
    what.add_argument("--batch-count", type=int, default=1, metavar="N", help="batches to make (default 1)")
    add_alias(what, "--n_iter", dest="batch_count", type=int)

    how = parser.add_argument_group("with what, and where to")
    add_model_flags(how)
    add_output_flags(how)
    how.add_argument("--grid", action="store_true", help="also write all pictures on one sheet")
    add_alias(how, "--skip_grid", dest="grid", action="store_false")
    how.add_argument("--preview-every", type=int, metavar="N", help="also write what is seen after every N steps")


def run(args: argparse.Namespace) -> None:
    """Make the pictures, one batch after the other; print the path of each as soon as it is written."""
    firsts = _first_requests(args)  # every fault is found before anything slow begins
    from ldm import images
    from ldm.files import write_new

    init_image = images.load_image(args.init_img) if args.init_img else None
    sd = load(args, _sized(firsts[0], init_image, args.mask))
    outputs = Outputs(args, sd)
    made: list[Image.Image] = []
    for first, number in itertools.product(firsts, range(args.batch_count)):
        request = sd.complete(with_strength(first.batch(number), args, sd), init_image, args.mask)
        watch = partial(_save_preview, sd, outputs, request) if args.preview_every else None
        pictures = sd.generate(request, init_image, args.mask, progress=True, watch=watch)
        for image, alone in zip(pictures, request.images(), strict=True):
            outputs.save_picture(image, alone, sd.grid_length(request), masked=args.mask is not None)
        if args.grid:
            made += pictures
    if args.grid:
        write = partial(images.grid(made).save, format="PNG")
        outputs.save("grid.png", lambda path: write_new(path, write))


def _sized(request: Request, init_image: Image.Image | None, mask: Path | None) -> Request:
    """A request with the size that its initial image, if any, and what is added at its sides give it."""
    from ldm.canvas import multiples, open_canvas, proportioned

    picture = open_canvas(request, init_image, mask).picture
    if picture is None:
        return request
    width, height = multiples(proportioned(request, picture.size))
    return replace(request, width=request.width or max(width, 8), height=request.height or max(height, 8))


def _save_preview(sd: StableDiffusion, outputs: Outputs, request: Request, step: Step) -> None:
    from ldm.files import write_new

    if (step.index + 1) % outputs.args.preview_every == 0:
        assert request.width is not None and request.height is not None
        write = partial(sd.preview(step).resize((request.width, request.height)).save, format="PNG")
        outputs.save(f"{request.seed}-step{step.index + 1:03d}.png", lambda path: write_new(path, write))


def _first_requests(args: argparse.Namespace) -> list[Request]:
    """The first request of each prompt, its seed chosen; those of later batches differ in the seed alone."""
    for name, most in (("batch_count", MAX_BATCHES), ("preview_every", MAX_BATCHES)):
        if (value := getattr(args, name)) is not None and not 1 <= value <= most:
            raise RequestError(f"{name} is {value}: use 1 to {most}")
    left_out = OF_AN_IMAGE if args.init_img is None else ()
    given = {f.name: getattr(args, f.name) for f in fields(Request) if f.name not in left_out}
    requests = [Request(**given | {"prompt": prompt}) for prompt in read_prompts(args)]
    check_adapters(args, requests)
    return [replace(request, seed=request.seeds()[0]) for request in requests]
