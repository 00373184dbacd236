"""Training the autoencoder: reconstruction, KL and, where wanted, perceptual and adversarial terms.

Rombach et al. 2022, arXiv:2112.10752, appendix G; the adversarial part is Esser et al. 2021, arXiv:2012.09841.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint import load_vae
from ldm.checkpoint.convert import Conversion
from ldm.checkpoint.save import save_networks
from ldm.config import ModelConfig, UNetConfig
from ldm.errors import RequestError
from ldm.images import contact_sheet, to_image, to_tensor
from ldm.train.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from ldm.train.config import TrainConfig
from ldm.train.data import Examples, fit, load_example
from ldm.train.feed import Batch
from ldm.train.networks import checkpoint_gradients, new_vae
from ldm.train.perceptual import PerceptualDistance
from ldm.train.task import Task

MEASURED = 64  # pictures whose latents tell the scale factor
SHOWN = 8


class VAETask(Task):
    """An autoencoder, and the discriminator that it is to deceive, if any."""

    def __init__(self, config: TrainConfig, examples: Examples):
        super().__init__()
        self.config, self.examples = config, examples
        torch.manual_seed(config.seed)
        self.vae = new_vae(config.networks) if config.model is None else load_vae(config.model)
        self.vae.train()
        for part in (self.vae.encoder, self.vae.quant_conv):
            part.requires_grad_(not config.vae.decoder_only)
        side = config.data.crop or config.data.side
        if side > config.data.side or side % self.vae.config.downsampling:
            raise RequestError(
                f"data.crop or data.side is {side}: use a multiple of {self.vae.config.downsampling}, and a crop no "
                "larger than data.side"
            )
        self.discriminator = PatchDiscriminator() if config.vae.adversarial else None
        if self.discriminator is not None:
            if side < self.discriminator.smallest:
                raise RequestError(
                    f"data.crop or data.side is {side}: use {self.discriminator.smallest} or more with vae.adversarial"
                )
            self.turns = ("autoencoder", "discriminator")
        if config.loop.gradient_checkpointing:
            checkpoint_gradients(self.vae)
        self.perceptual = PerceptualDistance() if config.vae.perceptual else None

    def turns_at(self, step: int) -> tuple[str, ...]:
        return self.turns if step >= self.config.vae.adversarial_start else self.turns[:1]

    def learners(self, turn: str) -> list[nn.Parameter]:
        network = self.discriminator if turn == "discriminator" else self.vae
        assert network is not None
        return [parameter for parameter in network.parameters() if parameter.requires_grad]

    def prepare(self, number: int, generator: torch.Generator) -> Batch:
        """image (3, h, w) in [-1, 1], and noise for a draw of its latents (c, h/8, w/8)."""
        chance = random.Random(torch.randint(2**62, (1,), generator=generator).item())
        data = self.config.data
        mirrored = data.flip and chance.random() < 0.5
        random_crop = chance if data.random_crop else None
        image = fit(load_example(self.examples, number).image, (data.side, data.side), random_crop, mirrored)
        if data.crop is not None:
            left, top = (chance.randint(0, data.side - data.crop) for _ in "xy")
            image = image.crop((left, top, left + data.crop, top + data.crop))
        side = image.width // self.vae.config.downsampling
        noise = torch.randn(self.vae.config.latent_channels, side, side, generator=generator)
        return {"image": to_tensor(image)[0], "noise": noise}

    def forward(self, batch: Batch, step: int, turn: str) -> Mapping[str, Tensor]:
        """The terms of the autoencoder's loss, each without its weight, or the discriminator's loss."""
        image, weights = batch["image"], self.config.vae
        if turn == "discriminator":
            return self._discriminate(image, batch["noise"])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not weights.decoder_only):
            posterior = self.vae.encode(image)
        reconstruction = self.vae.decode(posterior.at(batch["noise"]))
        error = reconstruction - image
        terms = {
            "l1": error.abs().mean(),
            "l2": error.square().mean(),
            "kl": posterior.kl().mean() / posterior.mean[0].numel(),
        }
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, image).mean()
        loss = sum(getattr(weights, name) * term for name, term in terms.items())
        assert isinstance(loss, Tensor)
        if self.discriminator is not None and step >= weights.adversarial_start:
            terms["adversarial"] = generator_loss(self.discriminator(reconstruction))
            last_layer = self.vae.decoder.conv_out.weight
            weight = adaptive_weight(loss, terms["adversarial"], last_layer) if self.training else 1.0
            loss = loss + weights.adversarial * weight * terms["adversarial"]
        return {**terms, "loss": loss}

    def _discriminate(self, image: Tensor, noise: Tensor) -> Mapping[str, Tensor]:
        assert self.discriminator is not None
        with torch.no_grad():
            reconstruction = self.vae.decode(self.vae.encode(image).at(noise))
        return {"loss": discriminator_loss(self.discriminator(image), self.discriminator(reconstruction))}

    def save(self, target: Path, dtype: str) -> None:
        """As a file of its own; a new autoencoder's scale factor makes the variance of its latents 1."""
        config = ModelConfig(
            UNetConfig(out_channels=self.vae.config.latent_channels), self.vae.config, image_size=self.config.data.side
        )
        if self.config.model is None:
            spread = (place * len(self.examples) // MEASURED for place in range(MEASURED))
            latents = torch.cat([self._encode(number) for number in spread])
            config = replace(config, vae=replace(config.vae, scale_factor=round(1 / latents.std().item(), 5)))
        save_networks(target, {"vae": self.vae}, config, Conversion(dtype=dtype, overwrite=True))

    @torch.no_grad()
    def _encode(self, number: int) -> Tensor:
        return self.vae.encode(self._whole(number).to(next(self.vae.parameters()).device)).mean

    def _whole(self, number: int) -> Tensor:
        side = self.config.data.side
        return to_tensor(fit(load_example(self.examples, number % len(self.examples)).image, (side, side)))

    @torch.no_grad()
    def pictures(self) -> Image.Image:
        """Pictures, and below them their reconstructions."""
        pictures = [self._whole(number) for number in range(SHOWN)]
        again = [to_image(self.vae.decode(self._encode(number))[0]) for number in range(SHOWN)]
        return contact_sheet([*(to_image(x[0]) for x in pictures), *again], [""] * SHOWN, ["picture", "decoded"])
