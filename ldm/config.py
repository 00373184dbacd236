"""The hyperparameters of a model: frozen, complete, and Stable Diffusion v1's by default.

Nothing here imports torch; a config is data that every floor above may read. Sizes that do not fit raise ValueError.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

# What people call the precisions that networks run and are stored in → torch's names for them.
DTYPES = {
    "float32": "float32", "float16": "float16", "bfloat16": "bfloat16",
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16",
}  # fmt: skip

LABELS = {"unet": "U-Net", "vae": "VAE", "text": "text encoder"}  # a model's networks, as people call them
MAX_CFG_SCALE = 1000
ACTIVATIONS = ("quick_gelu", "gelu")  # of CLIP text encoders: OpenAI's, and others'


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r:.50}: use one of {', '.join(choices)}")


def check_least(least: float, **values: float | None) -> None:
    """Raises ValueError for a value that is less, or NaN; None is none."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value}: use {least:g} or more")


def _check_divides(part: str, parts: int, whole: str, size: int) -> None:
    if parts < 1 or size < 1 or size % parts:
        raise ValueError(f"{part} is {parts}, which does not divide {whole}, {size}")


def _check_levels(channel_mult: tuple[int, ...], blocks_per_level: int) -> None:
    if not channel_mult or blocks_per_level < 1:
        raise ValueError(f"{len(channel_mult)} levels of {blocks_per_level} blocks: at least one of one is needed")


@dataclass(frozen=True)
class UNetConfig:
    """The cross-attention U-Net. `channel_mult[i] * channels` is the width of level i; level 0 has full resolution."""

    in_channels: int = 4  # 4: text to image, 8: InstructPix2Pix, 9: inpainting
    out_channels: int = 4
    channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2  # on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (0, 1, 2)
    heads: int = 8
    context_dim: int = 768
    norm_groups: int = 32

    def __post_init__(self) -> None:
        check_least(1, in_channels=self.in_channels, out_channels=self.out_channels, context_dim=self.context_dim)
        _check_levels(self.channel_mult, self.blocks_per_level)
        for mult in self.channel_mult:
            _check_divides("heads", self.heads, "the width of a level", mult * self.channels)
            _check_divides("norm_groups", self.norm_groups, "the width of a level", mult * self.channels)


@dataclass(frozen=True)
class VAEConfig:
    """The KL autoencoder. Its latents, multiplied by `scale_factor`, have about unit variance."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    scale_factor: float = 0.18215
    norm_groups: int = 32

    def __post_init__(self) -> None:
        check_least(1, in_channels=self.in_channels, latent_channels=self.latent_channels)
        _check_levels(self.channel_mult, self.blocks_per_level)
        for mult in self.channel_mult:
            _check_divides("norm_groups", self.norm_groups, "the width of a level", mult * self.channels)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along one side: 8 for Stable Diffusion."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class TextConfig:
    """The CLIP text transformer (ViT-L/14's)."""

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_length: int = 77
    activation: str = "quick_gelu"

    def __post_init__(self) -> None:
        check_least(1, vocab_size=self.vocab_size, layers=self.layers, mlp_width=self.mlp_width)
        check_least(3, max_length=self.max_length)  # tokens: the start, the end and what is between
        check_choice("activation", self.activation, ACTIVATIONS)
        _check_divides("heads", self.heads, "width", self.width)


@dataclass(frozen=True)
class ScheduleConfig:
    """The forward process: how much noise there is at each training timestep, and what the U-Net predicts."""

    timesteps: int = 1000
    beta_schedule: str = "scaled_linear"  # or "linear", "cosine"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"  # or "v_prediction", or "sample": x0
    zero_terminal_snr: bool = False  # whether the betas are rescaled so that no signal is left at the last timestep


@dataclass(frozen=True)
class ModelConfig:
    """A whole latent diffusion model.

    image_size: the side it was trained at, in pixels. cfg_scale: the guidance scale it draws best with.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    image_size: int = 512
    cfg_scale: float = 7.5

    def __post_init__(self) -> None:
        unet, vae, text = self.unet, self.vae, self.text
        if unet.context_dim != text.width:
            raise ValueError(f"the U-Net attends to {unet.context_dim} channels, the text has {text.width}")
        if unet.out_channels != vae.latent_channels:
            raise ValueError(
                f"the U-Net makes {unet.out_channels} latent channels, the VAE reads {vae.latent_channels}"
            )
        if absent := [level for level in unet.attention_levels if not 0 <= level < len(unet.channel_mult)]:
            raise ValueError(
                f"the U-Net has {len(unet.channel_mult)} levels, from 0, and none that is {absent[0]}: change "
                "attention_levels"
            )
        if not 0 < self.cfg_scale <= MAX_CFG_SCALE:  # false for NaN
            raise ValueError(f"cfg_scale is {self.cfg_scale}: use a positive number up to {MAX_CFG_SCALE}")

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net sees a mask and the masked image beside the latents: 9 channels."""
        return self.unet.in_channels == 2 * self.vae.latent_channels + 1

    @property
    def edits(self) -> bool:
        """Whether this is InstructPix2Pix, whose U-Net sees the initial image beside the latents: 8 channels."""
        return self.unet.in_channels == 2 * self.vae.latent_channels


SD_V1 = ModelConfig()
