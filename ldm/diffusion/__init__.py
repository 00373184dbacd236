"""The mathematics of diffusion: noise schedule, predictions, samplers, guidance. No networks; imports no torch."""

from ldm.diffusion import samplers
from ldm.diffusion.levels import Denoise, Increment, Level, Noise, Prediction, Sampler, Step
from ldm.diffusion.schedule import NoiseSchedule

__all__ = ["Denoise", "Increment", "Level", "Noise", "NoiseSchedule", "Prediction", "Sampler", "Step", "samplers"]
