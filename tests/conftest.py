from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # diffusers and transformers would look for updates

import pytest
import torch
from lora_files import assert_restored, snapshot
from safetensors.torch import load_file, save_file
from synthetic import DATA, state_dict
from torch import Tensor

from ldm import StableDiffusion, UNetConfig
from ldm.checkpoint import load_unet, load_vae
from ldm.checkpoint.sources import open_checkpoint
from ldm.models.unet import UNet
from ldm.models.vae import VAE

TINY_UNET = UNetConfig(channels=32, channel_mult=(1, 2, 2, 4), heads=4, context_dim=48)
SHIPPED = Path(__file__).parent.parent / "weights" / "shapes"
SHIPPED_TEXT = open_checkpoint(SHIPPED).part("text").read_config()
SIDE = 64  # pixels: half of the shipped model's, for tests to which size is nothing but time
SMALL = ("-W", str(SIDE), "-H", str(SIDE))  # the same, on a command line
OWN_SIZE = {"width": 128, "height": 128}  # of the shipped model's pictures, where they are judged


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


PARITY: dict[str, tuple[float, float]] = {}
MEASURED: list[str] = []  # lines to print after the tests


def assert_parity(what: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    """The relative error is within its bound; the table of all of them is printed after the tests."""
    error = relative_error(actual, expected)
    PARITY[what] = error, bound
    assert error <= bound


def pytest_terminal_summary(terminalreporter):
    if PARITY:
        terminalreporter.section("relative L2 error, float32, CPU")
    for what, (error, bound) in PARITY.items():
        terminalreporter.write_line(f"{what:<60} {error:.1e}  (bound {bound:.0e})")
    for line in MEASURED:
        terminalreporter.write_line(line)


def their_tokenizer(vocabulary, merges, max_length: int):
    """transformers' CLIP tokenizer over the same tables."""
    import transformers

    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to open a connection fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    """Outputs of the reference implementation on the tiny model."""
    return load_file(DATA / "golden-tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> Path:
    """The tiny model's checkpoint: U-Net and VAE, no text encoder."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_file(state_dict("tiny-keys.json"), path)
    return path


@pytest.fixture(scope="session")
def tiny_unet(tiny_path) -> UNet:
    return load_unet(tiny_path, TINY_UNET)


@pytest.fixture(scope="session")
def tiny_vae(tiny_path) -> VAE:
    return load_vae(tiny_path)


def load_small(dtype: str = "float32") -> StableDiffusion:
    """The shipped model on the CPU, which draws SIDE×SIDE pixels unless told otherwise."""
    sd = StableDiffusion.load(device="cpu", dtype=dtype)
    return replace(sd, config=replace(sd.config, image_size=SIDE))


@pytest.fixture(scope="session")
def shipped() -> StableDiffusion:
    return load_small()


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    """For tests that change the model: each file has its own."""
    return load_small()


@pytest.fixture
def nothing_is_left(sd):
    """A test leaves the weights of `sd` as they were, and no embedding."""
    torch.manual_seed(0)
    before = snapshot(sd)
    yield
    assert_restored(sd, before)
    assert not sd.text.triggers


@pytest.fixture
def tmp_path(tmp_path):
    """Emptied after each test: models are large."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def full_size(tmp_path_factory) -> Path:
    """A full-size SD v1 checkpoint in float32: 4.3 GB."""
    path = tmp_path_factory.mktemp("full") / "v1-float32.safetensors"
    save_file(state_dict("sd-v1-keys.json"), path)
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def full_size_fp16(full_size) -> Path:
    """The same in float16, as most public checkpoints are: 2.1 GB."""
    path = full_size.parent / "v1-float16.safetensors"
    tensors = load_file(full_size)
    save_file({key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}, path)
    yield path
    path.unlink()
