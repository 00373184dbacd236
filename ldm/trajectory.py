"""Which noise levels a request goes through, in one pass or in two."""

from __future__ import annotations

from dataclasses import replace

from ldm.diffusion import Level, NoiseSchedule, samplers
from ldm.errors import RequestError
from ldm.request import SIZE_MULTIPLE, Request


def whole_grid(request: Request, schedule: NoiseSchedule) -> list[Level]:
    """The levels of a run from noise, of which an initial image leaves out the first."""
    steps = request.steps
    if request.exact_steps and request.strength:
        steps = min(int(steps / request.strength), schedule.config.timesteps)
    return samplers.levels(request.sampler, schedule, steps, request.schedule)


def trajectory(request: Request, schedule: NoiseSchedule) -> tuple[Level, list[Level]]:
    """The level to noise an initial image to, and the levels to denoise through.

    The reference runs the last int(strength · steps) steps, from an image noised to the level before the first of them
    (where there is one); k-diffusion noises to the first of them.
    """
    levels = whole_grid(request, schedule)
    if request.strength is None:
        return levels[0], levels
    first = max(len(levels) - 1 - _steps_to_run(request, request.strength, len(levels) - 1), 0)
    above = samplers.SAMPLERS[request.sampler].noises_above
    return levels[max(first - 1, 0) if above else first], levels[first:]


def _steps_to_run(request: Request, strength: float, most: int) -> int:
    """Of a grid with `most` of them. Where that is as fine as there is, exact_steps cannot add any for the strength."""
    if request.exact_steps and strength and int(request.steps / strength) <= most:
        return request.steps
    return int(strength * (most if request.exact_steps else request.steps))


def second_pass(request: Request) -> Request:
    """Image to image at the larger size, with the same seeds; of a request that has a size. Raises RequestError."""
    assert request.width is not None and request.height is not None
    width, height = (
        max(round(side * request.hires_scale / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE
        for side in (request.width, request.height)
    )
    try:
        return replace(
            request, width=width, height=height, hires_scale=1.0, strength=request.hires_strength,
            steps=request.hires_steps or request.steps,
        )  # fmt: skip
    except RequestError as error:
        raise RequestError(f"hires_scale is {request.hires_scale}, so that {error}") from error
