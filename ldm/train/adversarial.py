"""The adversarial part of an autoencoder's loss: the discriminator of patches, the hinge losses, and their weight.

Esser et al. 2021, "Taming Transformers", arXiv:2012.09841; Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import RequestError

LARGEST_MULTIPLE = 8  # of the width, whatever the depth
NORM_GROUPS = 32  # as in the autoencoder; fewer where the channels cannot be divided by it
DEVIATION = 0.02  # of the initial weights: DCGAN's, arXiv:1511.06434, and pix2pix's
SLOPE = 0.2
LEAST_GRADIENT = 1e-4  # the δ of equation 7: 1e-6 in the paper, 1e-4 in its authors' code


class PatchDiscriminator(nn.Module):
    """A convolutional network that judges overlapping patches: PatchGAN, of pix2pix (Isola et al., arXiv:1611.07004).

    width: channels after the first convolution; layers: convolutions of stride 2. The defaults look at 70×70 pixels.
    The reference has batch norms. Here they are group norms: batch statistics would make a picture's loss depend on
    which others it is judged with, and so on the size of micro-batches and on the number of processes.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        channels = [width * min(2**i, LARGEST_MULTIPLE) for i in range(layers + 1)]
        strides = [2] * (layers - 1) + [1]
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for fan_in, fan_out, stride in zip(channels[:-1], channels[1:], strides, strict=True):
            blocks += [
                nn.Conv2d(fan_in, fan_out, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(NORM_GROUPS, fan_out), fan_out),
                nn.LeakyReLU(SLOPE),
            ]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(channels[-1], 1, 4, padding=1))
        self.smallest = 3 * 2**layers  # two convolutions of size 4 at the end take a pixel each, and leave one
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] → logits (b, 1, h/2^layers - 2, w/2^layers - 2), positive for what looks real.

        Raises RequestError for pictures too small to hold a patch.
        """
        if min(image.shape[2:]) < self.smallest:
            height, width = image.shape[2:]
            raise RequestError(
                f"a discriminator of this depth needs pictures of at least {self.smallest} pixels a side, "
                f"got {width}×{height}: make them larger, or take fewer layers"
            )
        return self.layers(image)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0, DEVIATION)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1, DEVIATION)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))]) of logits of any shapes → (), the hinge loss.

    Lim and Ye 2017, arXiv:1705.02894. It wants gradients of the discriminator alone: detach the fake pictures.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """-E[D(fake)] of logits of any shape → (): the other side of the hinge loss, which wants none of its own."""
    return -fake.mean()


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, most: float = 1e4
) -> Tensor:
    """‖∇ reconstruction‖ / (‖∇ generator‖ + 1e-4), within [0, most] and detached: () (Taming Transformers, equation 7).

    The gradients are those of the decoder's last weights, `last_layer`, of which both losses (scalars) must be
    functions; their graphs are kept. The generator's loss times this, times a constant of the trainer's (0.5 in latent
    diffusion's own autoencoders), neither drowns nor vanishes beside the reconstruction's. Of several processes each
    has a weight of its own, from its own part of the batch.
    """
    reconstruction, generator = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, generator_loss)
    )
    return (reconstruction / (generator + LEAST_GRADIENT)).clamp(0, most).detach()
