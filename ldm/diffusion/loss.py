"""The training objective of diffusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ldm.diffusion.schedule import NoiseSchedule

if TYPE_CHECKING:
    from torch import Tensor


def diffusion_loss(
    network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """Mean squared error of the network's prediction, for each element of the batch: (b,).

    `network` maps (x_t, t) to eps or v, whichever the schedule names (DDPM, arXiv:2006.11239, equation 14).
    x0 and noise: (b, c, h, w); t: (b,) integers.
    """
    target = {"epsilon": lambda: noise, "v_prediction": lambda: schedule.velocity(x0, noise, t)}
    error = network(schedule.add_noise(x0, noise, t), t) - target[schedule.config.prediction_type]()
    return error.square().mean(dim=(1, 2, 3))
