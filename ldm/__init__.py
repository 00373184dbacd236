"""Stable Diffusion v1.x: exact, fast, offline, readable.

    from ldm import StableDiffusion
    sd = StableDiffusion.load("v1-5.safetensors")  # or no argument: the small model shipped with the package
    sd.txt2img("a photograph of an astronaut riding a horse", seed=42)[0].save("astronaut.png")

Importing this package costs nothing: torch is imported when a model is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.config import SD_V1, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
    from ldm.pipeline import StableDiffusion
    from ldm.request import Request

__version__ = "0.1.0"
__all__ = [
    "SD_V1",
    "ModelConfig",
    "Request",
    "ScheduleConfig",
    "StableDiffusion",
    "TextConfig",
    "UNetConfig",
    "VAEConfig",
]

_HOMES = {"StableDiffusion": "ldm.pipeline", "Request": "ldm.request"}  # the rest live in ldm.config


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "ldm.config")), name)
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
