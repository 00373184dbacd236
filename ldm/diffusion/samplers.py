"""Samplers: generators over noise levels that know nothing of prompts, guidance, networks or progress bars.

Each takes a denoiser, the latents at the first level, the levels (noisiest first, the one to end at last) and a source
of noise, and yields a Step for each level it reaches. What people know by name is a row of SAMPLERS: a step function of
`singlestep` or `multistep` with its parameters, on a grid of `grids`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from ldm.diffusion import multistep, singlestep
from ldm.diffusion.grids import GRIDS, fold, visit
from ldm.diffusion.levels import Denoise, Increment, Level, Noise, Step
from ldm.diffusion.schedule import CLEAN, NoiseSchedule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Method:
    """A sampler as people know it by name."""

    label: str  # how AUTOMATIC1111 spells it, where it has it
    sampler: Callable[..., Iterator[Step]]  # a Sampler, which may take eta and the schedule too
    grid: str = "normal"  # a row of grids.GRIDS
    eta: float | None = None  # how much noise it adds back unless told otherwise; None: it adds none, or a fixed amount
    between: bool = False  # whether it evaluates the network between the levels of the grid, and so needs the schedule
    ends_at_zero: bool = False  # at training timestep 0; the others end at a clean image, as k-diffusion does
    noises_above: bool = False  # an initial image, to the level before the first it visits, as the reference does
    from_unit_noise: bool = False  # starts from standard normal latents, where k-diffusion has those of the first level
    repeats: bool = False  # a stretch of its way, with fresh noise: a path of Brownian noise would give the same again
    skips: bool = False  # the last but one level of a grid that has one more, as AUTOMATIC1111 does
    others: tuple[str, ...] = ()  # how other programs spell it


Row = partial(Method, grid="karras")
SAMPLERS: dict[str, Method] = {
    "ddim": Method(
        "DDIM", singlestep.ddim, "uniform", eta=0.0, ends_at_zero=True, noises_above=True, from_unit_noise=True,
        others=("DDIMScheduler",),
    ),
    "plms": Method(
        "PLMS", multistep.plms, "uniform", ends_at_zero=True, noises_above=True, from_unit_noise=True,
        others=("PNDMScheduler", "PNDM"),
    ),
    "ddpm": Method(
        "DDPM", partial(singlestep.ddim, eta=1.0), "linspace", from_unit_noise=True, others=("DDPMScheduler",)
    ),
    "euler": Method("Euler", singlestep.ddim, others=("EulerDiscreteScheduler",)),
    "euler_a": Method(
        "Euler a", singlestep.ddim, eta=1.0, others=("EulerAncestralDiscreteScheduler", "euler_ancestral")
    ),
    "heun": Method("Heun", singlestep.heun, others=("HeunDiscreteScheduler",)),
    "lms": Method(
        "LMS",
        partial(multistep.linear_multistep, weights=multistep.lms_weights, order=4),
        others=("LMSDiscreteScheduler",),
    ),
    "dpm_2": Row("DPM2", partial(singlestep.dpm_2, eta=0.0), between=True, skips=True,
        others=("KDPM2DiscreteScheduler",),
    ),
    "dpm_2_a": Row(
        "DPM2 a", singlestep.dpm_2, eta=1.0, between=True, skips=True,
        others=("KDPM2AncestralDiscreteScheduler", "dpm_2_ancestral"),
    ),
    "dpmpp_2s_a": Row(
        "DPM++ 2S a", singlestep.dpmpp_2s, eta=1.0, between=True,
        others=("DPMSolverSinglestepScheduler", "dpmpp_2s_ancestral"),
    ),
    "dpmpp_2m": Row("DPM++ 2M", multistep.dpmpp_2m, others=("DPMSolverMultistepScheduler",)),
    "dpmpp_sde": Row("DPM++ SDE", singlestep.dpmpp_sde, eta=1.0, between=True, others=("DPMSolverSDEScheduler",)),
    "dpmpp_2m_sde": Method(
        "DPM++ 2M SDE", partial(multistep.dpmpp_2m_sde, second="midpoint"), "exponential", eta=1.0
    ),
    "dpmpp_2m_sde_heun": Method(
        "DPM++ 2M SDE Heun", partial(multistep.dpmpp_2m_sde, second="heun"), "exponential", eta=1.0
    ),
    "dpmpp_3m_sde": Method("DPM++ 3M SDE", multistep.dpmpp_3m_sde, "exponential", eta=1.0),
    "unipc": Method("UniPC", partial(multistep.unipc, order=3, variant="bh1"), others=("uni_pc",)),
    "unipc_bh2": Method(
        "UniPC bh2", partial(multistep.unipc, order=3, variant="bh2"), others=("UniPCMultistepScheduler", "uni_pc_bh2"),
    ),
    "deis": Row(
        "DEIS", partial(multistep.linear_multistep, weights=multistep.deis_weights, order=3),
        others=("DEISMultistepScheduler",),
    ),
    "ipndm": Method(
        "iPNDM", partial(multistep.linear_multistep, weights=multistep.ipndm_weights, order=4),
        others=("IPNDMScheduler",),
    ),
    "lcm": Method("LCM", singlestep.lcm, "lcm", from_unit_noise=True, others=("LCMScheduler",)),
    "tcd": Method(
        "TCD", singlestep.tcd, "lcm", eta=0.3, between=True, ends_at_zero=True, from_unit_noise=True,
        others=("TCDScheduler",),
    ),
    "restart": Row("Restart", singlestep.restart, between=True, repeats=True),
}  # fmt: skip
NAMES = tuple(SAMPLERS)
DEFAULT = "dpmpp_2m"


def find(name: str) -> tuple[str, str | None]:
    """A row of SAMPLERS and, where the name tells it too, a row of GRIDS: "DPM++ 2M Karras" is dpmpp_2m, karras.

    Names are those of the rows, AUTOMATIC1111's, ComfyUI's and diffusers', in any case. Raises ValueError.
    """
    endings = {ending: grid for grid, row in GRIDS.items() for ending in (fold(grid), fold(row.label))}
    for folded in (fold(name), fold(name).removeprefix("k")):  # k_euler is k-diffusion's Euler
        if folded in SPELLINGS:
            return SPELLINGS[folded], None
        for ending, grid in endings.items():
            if folded.endswith(ending) and folded.removesuffix(ending) in SPELLINGS:
                return SPELLINGS[folded.removesuffix(ending)], grid
    near = get_close_matches(fold(name)[:100], SPELLINGS, n=1)
    hint = f"; nearest is {SPELLINGS[near[0]]}" if near else ""
    raise ValueError(f"sampler is {name!r:.100}: use one of {', '.join(NAMES)}{hint}")


SPELLINGS = {
    fold(spelling): name for name, row in SAMPLERS.items() for spelling in (name, row.label, *row.others)
}  # fmt: skip


def levels(name: str, schedule: NoiseSchedule, steps: int, grid: str | None = None) -> list[Level]:
    """The levels that sampler `name` visits, and the one it ends at: one more than the steps it takes.

    `grid` overrides the sampler's own (a name in grids.GRIDS). Raises ValueError for what does not exist.
    """
    method = _method(name)
    if method.skips and steps < schedule.config.timesteps:
        visited = visit(schedule, grid or method.grid, steps + 1)[:-1]
    else:
        visited = visit(schedule, grid or method.grid, steps)
    zero = schedule.level(0)
    end = zero if method.ends_at_zero and visited[-1].ratio > zero.ratio * (1 + 1e-9) else CLEAN
    return [*dict.fromkeys(visited), end]  # a level that comes twice is no step


def run(
    name: str,
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    noise: Noise,
    schedule: NoiseSchedule,
    eta: float | None = None,
    increment: Increment | None = None,
) -> Iterator[Step]:
    """Sampler `name` from latents `x` at `levels[0]` down to `levels[-1]`.

    eta: how much noise is added back, 0 to 1, for the samplers that do; None: as usual. increment: where that noise
    comes from, if it is not to be independent of the grid; otherwise from `noise`. Raises ValueError for an unknown
    name, an eta outside 0 … 1, or one the sampler has no use for.
    """
    method = _method(name)
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: use 0 to 1")
    if eta and method.eta is None:
        raise ValueError(f"eta is {eta}: {name} has none, leave it out")
    options: dict[str, Any] = {"schedule": schedule} if method.between else {}
    if method.eta is not None:
        options["eta"] = method.eta if eta is None else eta
    if increment is None or method.repeats:
        increment = lambda level, after: noise()  # noqa: E731
    return method.sampler(denoise, x, levels, increment, **options)


def sample(
    name: str,
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int,
    noise: Noise,
    eta: float | None = None,
    grid: str | None = None,
) -> Iterator[Step]:
    """The steps of sampler `name` over all the `levels` of a schedule, from standard normal noise `x`.

    `denoise` maps (x, level) to a Prediction (prediction.denoiser makes one of a network); `noise` draws standard
    normal tensors shaped like `x`. Raises ValueError as `levels` and `run` do.
    """
    path = levels(name, schedule, steps, grid)
    return run(name, denoise, start(name, x, path[0]), path, noise, schedule, eta)


def start(name: str, noise: Tensor, level: Level) -> Tensor:
    """The latents that sampler `name` starts from at its first level, from standard normal ones."""
    return noise if _method(name).from_unit_noise else level.sigma * noise


def _method(name: str) -> Method:
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}: use one of {', '.join(NAMES)}")
    return SAMPLERS[name]
