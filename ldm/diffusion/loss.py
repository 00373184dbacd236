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

    `network` maps (x_t, t) to eps, v or x0, whichever the schedule names (DDPM, arXiv:2006.11239, equation 14).
    x0 and noise: (b, c, h, w); t: (b,) integers.
    """
    target = {"epsilon": lambda: noise, "v_prediction": lambda: schedule.velocity(x0, noise, t), "sample": lambda: x0}
    error = network(schedule.add_noise(x0, noise, t), t) - target[schedule.config.prediction_type]()
    return error.square().mean(dim=(1, 2, 3))


def min_snr_weights(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """How much the loss at each timestep counts, t (b,) → (b,): min(SNR, gamma) in terms of the error of x0.

    The errors of eps and v are SNR and SNR + 1 times that of x0 (Hang et al. 2023, arXiv:2303.09556, section 3.4).
    """
    alphas_cumprod = schedule.alphas_cumprod[t.cpu()]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    errors = {"epsilon": snr, "v_prediction": snr + 1, "sample": snr.new_ones(())}
    return (snr.clamp(max=gamma) / errors[schedule.config.prediction_type]).float().to(t.device)
