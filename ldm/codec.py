"""Between pictures and latents: the VAE in half precision, or in float32 where that overflows, or TAESD."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from ldm.errors import NumericalError
from ldm.images import to_image
from ldm.models.taesd import TAESD
from ldm.models.vae import VAE
from ldm.runtime.tiling import seamless

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Codec:
    """A VAE that takes tensors of `dtype` on `device`; latents are scaled, float32."""

    vae: VAE
    scale_factor: float
    device: torch.device
    dtype: torch.dtype
    taesd: TAESD | None = None  # decodes in place of the VAE

    @torch.no_grad()
    def encode(self, pixels: Tensor, tiling: str) -> Tensor:
        """Pixels (b, 3, h, w) in [-1, 1] → the mode of their latents (b, 4, h/8, w/8). Raises NumericalError."""
        with seamless(tiling):
            mode = self._run(lambda vae, image: vae.encode(image).mode(), pixels.to(self.device))
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
            unscaled = latents / self.scale_factor
            return [to_image(self._run(lambda vae, z: vae.decode(z), z)[0]) for z in unscaled.split(1)]

    def _run(self, run: Callable[[VAE, Tensor], Tensor], x: Tensor) -> Tensor:
        """A part of the VAE in `dtype`, or in float32 where that overflows; float32 in and out."""
        result = run(self.vae, x.to(self.dtype))
        if not result.isfinite().all():
            with torch.autocast(self.device.type, enabled=False):
                result = run(self._exact_vae, x)
        if not result.isfinite().all():
            raise NumericalError("the VAE overflows in float32: its weights are damaged")
        return result.float()

    @cached_property
    def _exact_vae(self) -> VAE:
        log.warning("the VAE overflows in %s: running it in float32", self.dtype)
        return copy.deepcopy(self.vae).float()
