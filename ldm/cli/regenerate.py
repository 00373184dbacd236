"""`ldm regenerate`: make a picture again, from the request in its metadata."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.flags import Outputs, add_model_flags, add_output_flags, check_adapters, load, vae_name
from ldm.errors import RequestError, printable
from ldm.prompt import split_loras

if TYPE_CHECKING:
    from ldm.metadata import Origin

log = logging.getLogger(__name__)


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of `ldm`."""
    parser = commands.add_parser(
        "regenerate",
        help="make a picture again from its metadata",
        description="Make a picture again, from the request that IMAGE carries: a PNG, JPEG or WebP of this program's, "
        "AUTOMATIC1111's, ComfyUI's or InvokeAI's. Flags of the model, such as --int8, have to be given again.",
        allow_abbrev=False,
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the picture to make again")
    parser.add_argument("--init-img", type=Path, metavar="IMAGE", help="the picture it was made from, if it was")
    parser.add_argument("--mask", type=Path, metavar="IMAGE", help="the mask it was painted under, if it was")
    how = parser.add_argument_group("with what, and where to")
    add_model_flags(how)
    add_output_flags(how)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the picture and write it with its metadata; what is missing is told before anything slow."""
    from ldm import images, metadata

    origin = metadata.read_origin(args.image)
    _check_pictures(args, origin)
    check_adapters(args, [origin.request])
    given = {path.stem for path, *_ in args.lora}
    for tag in split_loras(origin.request.prompt)[1]:
        if tag.name in given:
            log.info("%s: names %s at %s, which counts, not --lora's strength", args.image, tag.name, tag.unet)
    init_image = images.load_image(args.init_img) if args.init_img else None
    sd = load(args)
    _compare_models(args, origin, sd.name)
    outputs = Outputs(args, sd)
    request = sd.complete(origin.request, init_image, args.mask)
    pictures = sd.generate(request, init_image, args.mask, progress=True)
    for image, alone in zip(pictures, request.images(), strict=True):
        outputs.save_picture(image, alone, sd.grid_length(request), masked=args.mask is not None)


def _check_pictures(args: argparse.Namespace, origin: Origin) -> None:
    """Raises RequestError where a picture is missing that this one was made from."""
    if origin.request.strength is not None and args.init_img is None:
        raise RequestError(f"{args.image}: was made from another picture, which it does not carry: give --init-img")
    if origin.masked and args.mask is None:
        raise RequestError(f"{args.image}: was painted under a mask, which it does not carry: give --mask")
    if origin.request.seed is None:
        log.warning("%s: carries no seed: this will be another picture of its request", args.image)
    if origin.request.cfg_scale is None:
        log.warning("%s: carries no guidance scale: the model's own counts", args.image)


def _compare_models(args: argparse.Namespace, origin: Origin, loaded: str) -> None:
    """Tell where the picture names another model, or another VAE, than the ones at hand."""
    vae = vae_name(args)
    for what, flag, named, used in (("model", "--model", origin.model, loaded), ("VAE", "--vae", origin.vae, vae)):
        if named and named != used:
            log.warning(
                "%s was made with the %s %s, this one with %s: give %s for the same picture",
                *(args.image, what, printable(named), used or "the model's own", flag),
            )
