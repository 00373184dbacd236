"""`ldm plan`: how a model would be in memory, without reading its weights."""

from __future__ import annotations

import argparse
from typing import Any

from ldm.cli.flags import MODEL_CHOICES, add_int8, add_model_choices
from ldm.config import LABELS
from ldm.errors import RequestError


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of `ldm`."""
    parser = commands.add_parser(
        "plan",
        help="tell how a model would be in memory",
        description="Tell what txt2img would keep in memory, what it would stream from the file, and its peak.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="PATH", help="a file or a diffusers folder (default: shipped)")
    add_model_choices(parser)
    parser.add_argument("-W", "--width", type=int, metavar="PIXELS", help="of the picture (default: the model's)")
    parser.add_argument("-H", "--height", type=int, metavar="PIXELS", help="of the picture (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="pictures at once (default 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default auto)")
    parser.add_argument("--memory", metavar="SIZE", help="such as 4G or 1500M (default: what is free)")
    add_int8(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the plan as a table, in MiB."""
    from ldm.checkpoint.load import plan_model
    from ldm.checkpoint.sources import Choices
    from ldm.pipeline import shipped_model
    from ldm.request import Request
    from ldm.runtime.device import pick_device, pick_dtype
    from ldm.runtime.memory import available, parse_memory
    from ldm.runtime.plan import MIB, Job

    Request("", width=args.width, height=args.height, batch_size=args.batch_size)  # which refuses what cannot be
    device = pick_device(args.device)
    memory = available(device) if args.memory is None else parse_memory(args.memory)
    if memory is None:
        raise RequestError("how much memory is free is not known here: give --memory")
    plan = plan_model(
        args.model or shipped_model(),
        Job(memory, args.width, args.height, args.batch_size, int8=args.int8),
        Choices(**{name: getattr(args, name) for name in MODEL_CHOICES}),
        device=device,
        dtype=pick_dtype(args.dtype, device),
    )
    assert plan is not None
    rows = [("program", plan.program, 0)]
    rows += [(LABELS[name], size - plan.streamed[name], plan.streamed[name]) for name, size in plan.weights.items()]
    rows += [(stage, size, 0) for stage, size in plan.work.items()]
    rows += [("margin", plan.margin, 0)]
    print(f"{'MiB':14}{'in memory':>10}{'streamed':>10}")
    for name, stays, streamed in rows:
        print(f"{name:14}{stays // MIB:10}{streamed // MIB or '':>10}")
    print(f"{'peak':14}{plan.peak // MIB:10}  of {plan.memory // MIB}")
    print(f"guidance: {'an evaluation for each prompt' if plan.apart else 'one evaluation for both prompts'}")
    if plan.excess:
        raise RequestError(plan.shortage)
