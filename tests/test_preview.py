"""Previews against the pictures that they stand for, and TAESD against diffusers' AutoencoderTiny."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import MEASURED, OWN_SIZE, SHIPPED, assert_parity
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

from ldm import Request, VAEConfig
from ldm.errors import CheckpointError
from ldm.images import to_image, to_tensor
from ldm.preview import SD_V1, Preview, _has_shape, find_preview, fit_preview, load_taesd

DRAWN = [
    ("red", "circle", "blue"), ("yellow", "star", "purple"), ("green", "heart", "white"), ("black", "ring", "white"),
    ("orange", "ring", "black"), ("white", "square", "green"), ("pink", "circle", "brown"), ("blue", "cross", "yellow"),
]  # fmt: skip
SHIPPED_VAE = VAEConfig(scale_factor=0.35766)
PLACES = [
    ("red", "blue", 8), ("gold", "purple", 20), ("green", "white", 12), ("black", "orange", 16), ("pink", "black", 10),
    ("blue", "gold", 18), ("white", "red", 14), ("purple", "green", 9),
]  # fmt: skip


def draw(colour: str, background: str, side: int) -> Image.Image:
    picture = Image.new("RGB", (64, 64), background)
    ImageDraw.Draw(picture).ellipse((side, side, 64 - side, 60), fill=colour)
    return picture


def correlation(first: Tensor, second: Tensor) -> float:
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


def test_a_projection_is_the_formula():
    z = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    preview = Preview(0.2 * torch.eye(4, 3), 0.1 * torch.ones(4, 3), torch.tensor([0.1, 0.0, -0.1]))
    picture = preview.project(z)
    assert picture.size == (5, 3)
    for y in range(3):
        for x in range(5):
            mean = 0.1 * z.double().mean(dim=(1, 2)).sum().item()
            rgb = [0.2 * z[i, y, x].item() + mean + (0.1, 0.0, -0.1)[i] for i in range(3)]
            expected = [min(max((value + 1) * 127.5, 0), 255) for value in rgb]
            assert all(abs(a - b) <= 0.51 for a, b in zip(picture.getpixel((x, y)), expected, strict=True))


def test_a_projection_takes_less_than_5_ms():
    z = torch.randn(4, 64, 64, dtype=torch.bfloat16)

    def seconds() -> float:
        start = time.perf_counter()
        SD_V1.project(z)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 0.005


@pytest.mark.quality
def test_the_shipped_models_projections_resemble_its_pictures(shipped):
    """What it draws, looked at half way and at the end. Its VAE is far from linear: some colours are not met."""
    decoded, projected = [], []
    for colour, shape, background in DRAWN:
        request = Request(
            f"a large {colour} {shape} on a {background} background", steps=8, seed=1, sampler="ddim", **OWN_SIZE
        )
        for step in list(shipped.stream(request))[3::4]:
            decoded.append(F.avg_pool2d(to_tensor(shipped.decode(step.x0)[0]), 8))
            projected.append(to_tensor(find_preview(SHIPPED, shipped.config.vae).project(step.x0[0])))
    similar = correlation(torch.cat(projected), torch.cat(decoded))
    MEASURED.append(f"correlation of the shipped model's previews with its pictures: {similar:.2f} (bound 0.8)")
    assert similar > 0.8


def test_a_fit_finds_the_map_behind_the_latents():
    """Latents that are a picture's colours, mixed, and a channel of noise: what can be told of them is told."""
    noise, mix = torch.Generator().manual_seed(0), torch.tensor([[0.9, 0.3, 0.0], [-0.4, 1.2, 0.2], [0.1, 0.3, -0.8]])

    def encode(picture: Image.Image) -> Tensor:
        colours = F.avg_pool2d(to_tensor(picture), 8) - 0.2
        return torch.cat([torch.einsum("bchw,dc->bdhw", colours, mix), torch.randn(1, 1, 8, 8, generator=noise)], dim=1)

    pictures = [draw(*place) for place in PLACES]
    preview = fit_preview(encode, pictures)
    for picture in pictures:
        expected = F.avg_pool2d(to_tensor(picture), 8)[0]
        seen = to_tensor(preview.project(encode(picture)[0]))[0]
        assert (seen - expected).abs().mean() < 0.05
        assert correlation(seen, expected) > 0.99
    assert preview.factors[3].abs().max() < 0.02


def test_a_preview_is_read_as_it_was_written(tmp_path):
    preview = Preview(torch.rand(4, 3), torch.rand(4, 3), torch.rand(3))
    (tmp_path / "preview.json").write_text(preview.to_json())
    found = find_preview(tmp_path, SHIPPED_VAE)
    for name in ("factors", "mean_factors", "bias"):
        assert torch.allclose(getattr(found, name), getattr(preview, name), atol=1e-4)


def test_factors_of_means_may_be_left_out(tmp_path):
    (tmp_path / "preview.json").write_text(json.dumps({"factors": [[1, 0, 0]] * 4, "bias": [0, 0.5, 0]}))
    assert find_preview(tmp_path, VAEConfig()).mean_factors.eq(0).all()


def test_sd_v1s_factors_are_for_latents_on_its_scale(tmp_path):
    assert find_preview(tmp_path / "model.safetensors", VAEConfig()) is SD_V1
    assert find_preview(tmp_path, SHIPPED_VAE) is None
    assert find_preview(tmp_path, VAEConfig(latent_channels=16)) is None


ROWS = [[0.1, 0.2, 0.3]] * 4
DAMAGED = [
    "[]", "{}", "nonsense", "[" * 100_000,
    json.dumps({"factors": ROWS}), json.dumps({"factors": ROWS, "bias": [0, 0]}),
    json.dumps({"factors": ROWS[:3], "bias": [0, 0, 0]}), json.dumps({"factors": ROWS, "bias": [0, 0, "0"]}),
    json.dumps({"factors": ROWS, "bias": [0, 0, True]}), json.dumps({"factors": ROWS, "bias": [0, 0, float("nan")]}),
    json.dumps({"factors": ROWS, "bias": [0, 0, float("-inf")]}), json.dumps({"factors": ROWS, "bias": [0, 0, 10**99]}),
    json.dumps({"factors": [*ROWS[:3], 1], "bias": [0, 0, 0]}), json.dumps({"factors": ROWS, "bias": [0] * 3, "x": 1}),
    " " * (2 << 20),
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:60])
def test_a_damaged_preview_is_one_line_of_error(tmp_path, text):
    (tmp_path / "preview.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"preview\.json: ") as error:
        find_preview(tmp_path, SHIPPED_VAE)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists))
def test_shapes_of_anything_are_told_without_an_error(value):
    assert _has_shape(value, (2,)) == (
        isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) and abs(x) <= 100 for x in value)
    )


@pytest.fixture(scope="module")
def tiny():
    """diffusers' network, with random weights large enough that the latents show in the picture."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = AutoencoderTiny()
    for parameter in tiny.parameters():
        parameter.data.mul_(1.5)
    return tiny.requires_grad_(False)


def own_names(tiny) -> dict[str, Tensor]:
    """The decoder in the names of TAESD's own file: nn.Sequential's, in which the clamp has the first place."""
    weights = {}
    for name, tensor in tiny.decoder.layers.state_dict().items():
        place, _, rest = name.partition(".")
        weights[f"{int(place) + 1}.{rest}"] = tensor
    return weights


@pytest.mark.parametrize("layout", ["own", "own, pickled", "own, half", "diffusers", "diffusers folder"])
def test_taesd_equals_diffusers(tmp_path, caplog, tiny, layout):
    caplog.set_level(logging.INFO)
    weights = own_names(tiny)
    path = tmp_path / "taesd_decoder.safetensors"
    if layout == "diffusers folder":
        tiny.save_pretrained(path := tmp_path / "taesd")
    elif layout == "diffusers":
        save_file(tiny.state_dict(), path)
    elif layout == "own, pickled":
        torch.save(weights, path := tmp_path / "taesd_decoder.pth")
    elif layout == "own, half":
        save_file({name: tensor.half() for name, tensor in weights.items()}, path)
    else:
        save_file(weights, path)
    taesd = load_taesd(path)
    z = 2 * torch.randn(2, 4, 8, 5, generator=torch.Generator().manual_seed(1))
    picture, expected = taesd(z), tiny.decode(z).sample
    assert picture.shape == (2, 3, 64, 40)
    assert expected.std() > 0.01
    if layout == "own, half":
        assert (picture - expected).abs().max() < 1e-2
    else:
        assert_parity(f"TAESD's picture, diffusers ({layout})", picture, expected, 1e-5)
    assert ("left out, not needed: the encoder" in caplog.text) == layout.startswith("diffusers")
    assert to_image(picture[0]).size == (40, 64)


FAULTS = {
    "1.weight is missing": lambda w: w.pop("1.weight"),
    "18.conv.4.bias has the shape": lambda w: w.update({"18.conv.4.bias": torch.zeros(3)}),
    "1.weight has the shape [64, 16, 3, 3], expected [64, 4, 3, 3]": (
        lambda w: w.update({"1.weight": torch.zeros(64, 16, 3, 3)})
    ),
    "stranger has no place in it": lambda w: w.update({"stranger": torch.zeros(1)}),
    "19.bias holds I64": lambda w: w.update({"19.bias": torch.zeros(3, dtype=torch.int64)}),
    "19.bias holds NaN or infinity": lambda w: w.update({"19.bias": torch.full((3,), float("nan"))}),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_file_that_is_not_taesds_is_told(tmp_path, tiny, message):
    weights = own_names(tiny)
    FAULTS[message](weights)
    save_file(weights, path := tmp_path / "taesd_decoder.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_taesd(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_encoder_is_not_taken_for_a_decoder(tmp_path, tiny):
    save_file(tiny.encoder.layers.state_dict(), path := tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(CheckpointError, match="not TAESD's decoder for SD v1"):
        load_taesd(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_taesd(tmp_path / "nothing.pth")
