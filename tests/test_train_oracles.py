"""What a task computes of a batch, against diffusers and transformers, which read the same folder in their own way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from torch import Tensor
from train_runs import TUNE, TUNE_VAE, VAE, make_model, read
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.train.data import Examples, open_examples
from ldm.train.feed import Feed, generator
from ldm.train.loop import make_accelerator
from ldm.train.start import TASKS
from ldm.train.task import Task


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    with torch.enable_grad():
        return make_model(tmp_path_factory.mktemp("model"), "networks.text.layers=2")


@pytest.fixture(scope="module")
def theirs(model):
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    text = CLIPTextModel.from_pretrained(model / "text_encoder")
    return unet.eval(), vae.eval(), text.eval(), DDPMScheduler.from_pretrained(model, subfolder="scheduler")


def start(folder: Path, text: str, *changes: str) -> tuple[Task, Feed, Examples]:
    config = read(folder, text, *changes)
    Path(config.folder).mkdir()
    data = config.data
    examples = open_examples(data.source, count=data.count, side=data.side)
    task, batches = TASKS[config.task](config, examples, make_accelerator(config))
    return task, Feed(batches, task.prepare, config.seed), examples


def pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(
    "changes",
    [
        ("diffusion.cache=false",),
        ("diffusion.cache=true",),
        ("diffusion.cache=false", "diffusion.min_snr=2", "diffusion.offset_noise=0.3", "diffusion.clip_skip=2"),
        ("diffusion.cache=true", "diffusion.train_text=false", "diffusion.clip_skip=2"),
        ("diffusion.cache=false", "diffusion.inpaint=true"),
        ("diffusion.cache=true", "diffusion.prediction_type=v_prediction", "diffusion.min_snr=2"),
        ("diffusion.cache=false", "prior.weight=0.25", 'prior.prompts=["a circle"]', "prior.count=8"),
    ],
    ids=["plain", "cached", "min-SNR, offset, clip skip", "cached states", "inpainting", "v", "prior"],
)
def test_loss_of_diffusion(changes, model, theirs, tmp_path):
    unet, vae, text, scheduler = theirs
    task, feed, examples = start(tmp_path, TUNE, f"model={model}", "data.count=8", "loop.batch_size=16", *changes)
    [batch], numbers = feed[0], torch.tensor(feed.batches[0])
    has_prior, is_cached = "prior.weight=0.25" in changes, "diffusion.cache=true" in changes
    image = batch["image"] if has_prior else torch.stack([pixels(examples[number].image) for number in numbers])
    if not is_cached:
        assert torch.equal(batch["image"], image)

    def encode(image: Tensor, noise: Tensor | float) -> Tensor:
        posterior = vae.encode(image).latent_dist
        return (posterior.mean + posterior.std * noise) * vae.config.scaling_factor

    t, latents = batch["t"], encode(image, batch["posterior_noise"])
    seen = scheduler.add_noise(latents, batch["noise"], t)
    if "diffusion.inpaint=true" in changes:
        task.model.unet.conv_in.weight.data[:, 4:].normal_()  # it starts blind
        task.save(tmp_path / "seeing", "float32")
        unet = UNet2DConditionModel.from_pretrained(tmp_path / "seeing", subfolder="unet")
        mask = torch.nn.functional.adaptive_max_pool2d(batch["mask"], latents.shape[2:])
        seen = torch.cat([seen, mask, encode(image * (batch["mask"] < 0.5), 0)], dim=1)
    if "tokens" in batch:
        states = text(batch["tokens"], output_hidden_states=True).hidden_states
        states = getattr(text, "text_model", text).final_layer_norm(
            states[-2 if "diffusion.clip_skip=2" in changes else -1]
        )
    else:
        states = batch["context"].float()
    is_v = "diffusion.prediction_type=v_prediction" in changes
    target = scheduler.get_velocity(latents, batch["noise"], t) if is_v else batch["noise"]
    weight = torch.ones(len(t), dtype=torch.float64)
    if "diffusion.min_snr=2" in changes:  # as in diffusers' training scripts
        snr = 1 / (1 / scheduler.alphas_cumprod[t].double() - 1)
        weight = snr.clamp(max=2) / (snr + is_v)
    if has_prior:
        weight = torch.where(numbers < 8, 1, 0.25)
        assert 0.25 < weight.mean() < 1
    loss = (unet(seen, t, states).sample - target).double().square().mean((1, 2, 3))
    expected = (loss * weight).mean().item()
    tolerance = 2e-3 if is_cached else 1e-5  # float16
    assert task(batch, 0, "network")["loss"].item() == pytest.approx(expected, rel=tolerance)


def test_captions_and_how_often_they_are_left_out(model, tmp_path):
    task, _, examples = start(tmp_path, TUNE, f"model={model}", "diffusion.caption_dropout=0.3", "data.count=8")
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")

    def tokens(caption: str) -> list[int]:
        return tokenizer(caption, padding="max_length", max_length=32, truncation=True).input_ids

    dropped = 0
    for draw in range(400):
        drawn = task.prepare(draw % 8, generator(draw))["tokens"].tolist()
        assert drawn in (tokens(""), tokens(examples.caption(draw % 8)))
        dropped += drawn == tokens("")
    assert 85 < dropped < 155


def test_noise(model, tmp_path):
    """Timesteps are uniform; the noise is normal, and with offset noise so is what a channel has in common."""
    task, _, _ = start(tmp_path, TUNE, f"model={model}", "diffusion.offset_noise=0.5", "data.count=8")
    draws = [task.prepare(0, generator(draw)) for draw in range(600)]
    noise = torch.stack([draw["noise"] for draw in draws])
    means = noise.mean((2, 3))
    assert (noise - means[..., None, None]).var().item() == pytest.approx(1 - 1 / 16, rel=0.05)
    assert means.var().item() == pytest.approx(0.25 + 1 / 16, rel=0.15)
    assert torch.stack([draw["posterior_noise"] for draw in draws]).var().item() == pytest.approx(1, rel=0.05)
    t = torch.stack([draw["t"] for draw in draws]).double()
    assert t.min() >= 0 and t.max() <= 999 and t.mean().item() == pytest.approx(499.5, abs=36)
    assert t.std().item() == pytest.approx(288.7, rel=0.06)


@pytest.mark.parametrize("kind", ["vae", "diffusion"])
def test_cuts_and_mirrors(kind, model, tmp_path):
    """Every cut is a window of the picture or of its mirror image, and there are many."""
    source = tmp_path / "wide"
    source.mkdir()
    wide = Image.effect_noise((48, 32), 80).convert("RGB")
    wide.save(source / "0.png")
    (source / "0.txt").write_text("noise")
    text, settings = (VAE, ()) if kind == "vae" else (TUNE, (f"model={model}", "diffusion.cache=false"))
    text = text.replace('source = "shapes"\ncount = 64', f'source = "{source}"')
    task, _, _ = start(tmp_path, text, *settings, "data.random_crop=true", "data.flip=true")
    windows = {
        pixels(picture.crop((left, 0, left + 32, 32))).numpy().tobytes()
        for picture in (wide, ImageOps.mirror(wide))
        for left in range(17)
    }
    cuts = [task.prepare(0, generator(draw))["image"].numpy().tobytes() for draw in range(200)]
    assert all(cut in windows for cut in cuts), "some are no windows"
    assert len(set(cuts)) > 25


def test_loss_of_the_autoencoder(model, theirs, tmp_path):
    task, feed, examples = start(
        tmp_path, TUNE_VAE, f"model={model}", "data.count=8", "vae.l1=0.5", "vae.l2=2", "vae.kl=0.01"
    )
    [batch] = feed[0]
    assert torch.equal(batch["image"], torch.stack([pixels(examples[number].image) for number in feed.batches[0]]))
    _, vae, _, _ = theirs
    posterior = vae.encode(batch["image"]).latent_dist
    error = (vae.decode(posterior.mean + posterior.std * batch["noise"]).sample - batch["image"]).double()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).double()
    expected = {"l1": error.abs().mean().item(), "l2": error.square().mean().item(), "kl": kl.mean().item()}
    expected["loss"] = 0.5 * expected["l1"] + 2 * expected["l2"] + 0.01 * expected["kl"]
    values = task(batch, 0, task.turns[0])
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, rel=1e-5)
