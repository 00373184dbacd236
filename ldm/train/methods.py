"""The ways to change a model: which parameters learn, and what they are saved as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint import Model
from ldm.checkpoint.convert import Conversion
from ldm.checkpoint.save import save_networks
from ldm.train.config import TrainConfig
from ldm.train.feed import generator
from ldm.train.inversion import save_embedding, start_inversion
from ldm.train.lora import add_lora, save_lora


@dataclass(frozen=True)
class Method:
    """What learns, by name ("unet" and "text" are whole networks), and how it is written: (target, dtype)."""

    learning: Mapping[str, nn.Module]
    text_learns: bool
    save: Callable[[Path, str], None]


def full(config: TrainConfig, model: Model) -> Method:
    """Every weight of the U-Net, and of the text encoder if it is to learn."""
    text = {"text": model.text} if config.diffusion.train_text else {}
    model.vae.requires_grad_(False)
    model.text.requires_grad_(config.diffusion.train_text)
    model.unet.requires_grad_(True)

    def save(target: Path, dtype: str) -> None:
        networks = {"unet": model.unet, "vae": model.vae, "text": model.text}
        save_networks(target, networks, model.config, Conversion(dtype=dtype, overwrite=True))

    return Method({"unet": model.unet, **text}, bool(text), save)


def lora(config: TrainConfig, model: Model) -> Method:
    """Low-rank factors beside the layers of the U-Net, and of the text encoder if it is to learn."""
    settings = config.lora
    chance = generator(config.seed, "lora")
    model.vae.requires_grad_(False)
    model.text.requires_grad_(False)
    unet = add_lora(model.unet, settings.layers, settings.rank, settings.alpha, chance)
    text = (
        add_lora(model.text, settings.layers, settings.rank, settings.alpha, chance)
        if config.diffusion.train_text
        else {}
    )

    def save(target: Path, dtype: str) -> None:
        save_lora(
            target, unet, text, model.unet.config, model.text.config, settings.layout, _told(config),
            dtype=getattr(torch, dtype), overwrite=True,
        )  # fmt: skip

    learning = {"unet_lora": nn.ModuleList(unet.values()), "text_lora": nn.ModuleList(text.values())}
    return Method(learning, bool(text), save)


def _told(config: TrainConfig) -> dict[str, str]:
    """What kohya's tools show of a LoRA's making (sd-scripts, train_network.py)."""
    assert config.model is not None
    told = {
        "ss_sd_model_name": Path(config.model).name,
        "ss_output_name": Path(config.output).stem,
        "ss_learning_rate": config.optimizer.learning_rate,
        "ss_lr_scheduler": config.optimizer.decay,
        "ss_max_train_steps": config.loop.steps,
        "ss_total_batch_size": config.loop.batch_size,
        "ss_resolution": f"({config.data.side}, {config.data.side})",
        "ss_clip_skip": config.diffusion.clip_skip,
        "ss_min_snr_gamma": config.diffusion.min_snr,
        "ss_noise_offset": config.diffusion.offset_noise,
        "ss_seed": config.seed,
    }
    return {name: str(value) for name, value in told.items()}


def textual_inversion(config: TrainConfig, model: Model) -> Method:
    """The vectors of a new word, and nothing else."""
    settings = config.inversion
    for network in (model.unet, model.vae):
        network.requires_grad_(False)
    rows = start_inversion(
        model.text, settings.token, settings.vectors, settings.initial, generator(config.seed, "inversion")
    )

    def save(target: Path, dtype: str) -> None:
        save_embedding(target, settings.token, rows.rows, settings.layout, overwrite=True)

    return Method({"rows": rows}, True, save)


METHODS: dict[str, Callable[[TrainConfig, Model], Method]] = {
    "full": full,
    "lora": lora,
    "textual_inversion": textual_inversion,
}
