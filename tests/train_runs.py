"""Small runs of every kind, for the tests of training: configs, and a model to start from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ldm.train.config import TrainConfig, read_train_config
from ldm.train.start import run

VAE = """
task = "vae"
folder = "vae"
output = "vae.safetensors"
[networks.vae]
channels = 8
channel_mult = [1, 2, 2, 2]
blocks_per_level = 1
norm_groups = 4
[data]
source = "shapes"
count = 64
side = 32
workers = 0
[vae]
l2 = 1.0
kl = 1e-4
[optimizer]
learning_rate = 3e-3
[loop]
steps = 8
batch_size = 4
log_every = 1
save_every = 4
sample_every = 8
"""

DIFFUSION = """
task = "diffusion"
folder = "diffusion"
output = "model"
[networks]
image_size = 32
cfg_scale = 3.0
[networks.unet]
channels = 16
channel_mult = [1, 2]
blocks_per_level = 1
attention_levels = [1]
heads = 2
context_dim = 16
norm_groups = 8
[networks.text]
vocab_size = 600
width = 16
layers = 1
heads = 2
mlp_width = 32
max_length = 32
[data]
source = "shapes"
count = 64
side = 32
workers = 0
[diffusion]
train_text = true
cache = true
[optimizer]
learning_rate = 3e-3
[loop]
steps = 8
batch_size = 4
log_every = 1
save_every = 4
sample_every = 8
ema_decay = 0.9
[samples]
prompts = ["a red circle on a blue background"]
steps = 2
"""

# A model to start from has networks of its own.
TUNE, TUNE_VAE = (re.sub(r"\[networks.*?(?=\[data\])", "", text, flags=re.DOTALL) for text in (DIFFUSION, VAE))


def read(folder: Path, text: str, *changes: str) -> TrainConfig:
    """A config whose run is in a folder of this test."""
    path = folder / "config-to-read.toml"
    path.write_text(text, encoding="utf-8")
    config = read_train_config(path, changes)
    return read_train_config(path, [*changes, f"folder={folder / config.folder}"])


def losses(folder: Path, name: str = "loss") -> list[float]:
    """What a run has recorded, step by step."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines]


def make_model(folder: Path, *changes: str) -> Path:
    """A model that has hardly learned anything, in a diffusers folder."""
    vae = run(read(folder, VAE))
    return run(read(folder, DIFFUSION, f"diffusion.vae={vae}", *changes))
