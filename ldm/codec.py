"""Between pictures and latents: the VAE in half precision, or in float32 where that overflows, or TAESD."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.errors import NumericalError
from ldm.images import to_image
from ldm.models.taesd import TAESD
from ldm.models.vae import VAE
from ldm.runtime import strips
from ldm.runtime.memory import first_that_fits, trim
from ldm.runtime.tiling import AXES, seamless

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Codec:
    """A VAE that takes tensors of `dtype` on `device`; latents are scaled, float32."""

    vae: VAE
    scale_factor: float
    device: torch.device
    dtype: torch.dtype
    taesd: TAESD | None = None  # decodes in place of the VAE
    in_strips: bool = True  # whether the VAE runs so from the start, or where memory runs out

    @torch.no_grad()
    def encode(self, pixels: Tensor, tiling: str) -> Tensor:
        """Pixels (b, 3, h, w) in [-1, 1] → the mode of their latents (b, 4, h/8, w/8). Raises NumericalError."""
        with seamless(tiling):
            encode = self._way("encode", tiling)
            mode = self._run(lambda vae, image: encode(vae, image).mode(), pixels.to(self.device))
        return mode * self.scale_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, tiling: str) -> list[Image.Image]:
        """Latents (b, 4, h, w) → pictures, one at a time to save memory. Raises NumericalError."""
        if not latents.isfinite().all():
            if self.dtype == torch.float32:
                raise NumericalError("the sampler diverged: lower cfg_scale or use more steps")
            raise NumericalError(f"the U-Net overflowed in {self.dtype}: use dtype float32")
        with seamless(tiling):
            if self.taesd is not None:
                return [to_image(self.taesd(z)[0]) for z in latents.split(1)]
            trim()  # what the U-Net has freed
            decode, unscaled = self._way("decode", tiling), latents / self.scale_factor
            return [to_image(self._run(decode, z)[0]) for z in unscaled.split(1)]

    def _way(self, name: str, tiling: str) -> Callable[[VAE, Tensor], Any]:
        """What the VAE does by that name. A strip does not see rows that wrap around."""
        return getattr(VAE, name) if -2 in AXES[tiling] else self._ways[name]

    @cached_property
    def _ways(self) -> dict[str, Callable[[VAE, Tensor], Any]]:
        if self.in_strips:
            return {"encode": strips.encode, "decode": strips.decode}
        return {
            "encode": first_that_fits({"encoding at once": VAE.encode, "encoding in strips": strips.encode}),
            "decode": first_that_fits({"decoding at once": VAE.decode, "decoding in strips": strips.decode}),
        }

    def _run(self, run: Callable[[VAE, Tensor], Tensor], x: Tensor) -> Tensor:
        """A part of the VAE in `dtype`, or in float32 where that overflows; float32 in and out."""
        result = run(self.vae, x.to(self.dtype))
        rounded = self.dtype != torch.float32 or torch.is_autocast_enabled(self.device.type)
        if rounded and not result.isfinite().all():
            with torch.autocast(self.device.type, enabled=False):
                result = run(self._exact_vae, x)
        if not result.isfinite().all():
            raise NumericalError("the VAE overflows in float32: its weights are damaged")
        return result.float()

    @cached_property
    def _exact_vae(self) -> VAE:
        log.warning("the VAE overflows in %s: running it in float32", self.dtype)
        return copy.deepcopy(self.vae).float()
