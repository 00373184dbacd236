"""A perceptual distance between pictures that needs no download, in LPIPS's form, or over any network's features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SCALES = 4  # octaves: wavelengths of about 2.7, 5, 11 and 21 pixels
ORIENTATIONS = 4
WAVE_NUMBER, DEVIATION = 3 * math.pi / 4, 0.8  # of the finest octave, per pixel and in pixels: Bruna and Mallat's
RADIUS = 3  # pixels of a wavelet: 3.75 deviations
SATURATION = 0.1  # the norm of the bank's 24 responses to noise of 2.6 of 255 levels, about where it can be seen
REST = 0.1  # what brightness itself counts, beside contrast: the saturation is then as large as the range of pixels

OPPONENTS = [[1, 1, 1], [1, -1, 0], [1, 1, -2]]  # brightness, red against green, yellow against blue, of RGB


class FilterBank(nn.Module):
    """What the first stage of vision makes of a picture: edges and lines by colour, direction and size.

    Morlet wavelets, even and odd, in four directions (Bruna and Mallat 2013, arXiv:1203.1513), on the opponent
    colours of a Gaussian pyramid (Burt and Adelson 1983), and a tenth of what the pyramid leaves over. Nothing in it
    is learned or drawn. All filters have unit norm: white noise has the same deviation in every response.
    """

    colours: Tensor
    wavelets: Tensor
    blur: Tensor

    def __init__(self) -> None:
        super().__init__()
        binomial = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64) / 16
        constants = {
            "colours": F.normalize(torch.tensor(OPPONENTS, dtype=torch.float64), dim=1)[:, :, None, None],
            "wavelets": morlet_wavelets()[:, None],
            "blur": torch.outer(binomial, binomial)[None, None],
        }
        for name, constant in constants.items():
            self.register_buffer(name, constant.float(), persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(b, 3, h, w) in [-1, 1] → (b, 24, h, w), three more, each half the size, and (b, 3, h/16, w/16)."""
        level = rearrange(F.conv2d(image, self.colours), "b c h w -> (b c) 1 h w")
        maps = []
        for _ in range(SCALES):
            maps.append(F.conv2d(F.pad(level, [RADIUS] * 4, mode="replicate"), self.wavelets))
            level = F.conv2d(F.pad(level, [2] * 4, mode="replicate"), self.blur, stride=2)
        return [rearrange(each, "(b c) k h w -> b (c k) h w", c=3) for each in (*maps, REST * level)]


def morlet_wavelets() -> Tensor:
    """(2 · ORIENTATIONS, size, size), float64: exp(-|u|² / 2σ²) · (exp(i k·u) - κ), even parts and then odd ones.

    κ makes the even parts blind to a constant; each filter has unit norm.
    """
    u = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    y, x = torch.meshgrid(u, u, indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2 * DEVIATION**2))
    angles = torch.arange(ORIENTATIONS, dtype=torch.float64)[:, None, None] * math.pi / ORIENTATIONS
    phase = WAVE_NUMBER * (x * angles.cos() + y * angles.sin())
    even, odd = window * phase.cos(), window * phase.sin()
    even = even - window * even.sum(dim=(1, 2), keepdim=True) / window.sum()
    return F.normalize(torch.cat([even, odd]).flatten(1), dim=1).unflatten(1, x.shape)


class PerceptualDistance(nn.Module):
    """The mean over layers and pixels of |f(a)/‖f(a)‖ - f(b)/‖f(b)‖|², where ‖·‖ is a pixel's norm over channels.

    LPIPS without its learned weights (Zhang et al. 2018, arXiv:1801.03924, equation 1), but with the mean of the
    layers for their sum: 0 for equal pictures, about 2 for unrelated ones, at most 4. `features` maps (b, 3, h, w) in
    [-1, 1] to feature maps of any shapes, such as VGG's after each stage (with whatever normalisation of its input it
    needs); where it is a module it is frozen. Without one it is FilterBank: LPIPS's formula on oriented bands is the
    older model of masking by contrast (Teo and Heeger 1994), while networks of random weights, the other choice
    that needs no data, did much worse than trained ones in LPIPS's own comparison.

    saturation: added to the norm in squares, ‖f‖² + saturation². It keeps noise that nobody sees in a flat area
    from counting as much as a wrong edge. Networks whose features are never flat want none: 1e-10, as LPIPS has.
    """

    def __init__(self, features: Callable[[Tensor], Sequence[Tensor]] | None = None, saturation: float = SATURATION):
        super().__init__()
        self.features = features or FilterBank()
        self.saturation = saturation
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Never trains, whatever mode the module around it is set to: its features' norms and dropout stay fixed."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two batches (b, 3, h, w) in [-1, 1] → (b,), differentiable in both; float32 or wider, under autocast too."""
        with torch.autocast(a.device.type, enabled=False):  # which would lose small differences
            a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
            layers = zip(self.features(a), self.features(b), strict=True)
            return torch.stack([self._difference(x, y) for x, y in layers]).mean(dim=0)

    def _difference(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (f * (f.square().sum(dim=1, keepdim=True) + self.saturation**2).rsqrt() for f in (x, y))
        return (x - y).square().sum(dim=1).mean(dim=(1, 2))
