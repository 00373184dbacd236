"""The whole way of a prompt, on the shipped model: by the noise it starts from, and by its pixels."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from conftest import OWN_SIZE, SHIPPED, SIDE, assert_parity, load_small, relative_error
from PIL import Image

from ldm import Request, StableDiffusion
from ldm.config import SD_V1
from ldm.diffusion import samplers
from ldm.errors import CheckpointError, NumericalError, RequestError
from ldm.images import to_image, to_tensor
from ldm.models.taesd import TAESD
from ldm.trajectory import trajectory

PROMPT = "a large red circle on a blue background"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def is_red(image: Image.Image) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels(image), -1, 0)
    return (red > 150) & (green < 110) & (blue < 110)


def is_blue(image: Image.Image) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels(image), -1, 0)
    return (blue > 150) & (red < 110) & (green < 130)


def assert_red_circle_on_blue(image: Image.Image) -> None:
    red, blue = is_red(image), is_blue(image)
    rows, columns = np.nonzero(red)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert red.mean() > 0.12  # large
    assert 0.85 < width / height < 1.18  # round: as wide as high,
    assert red.sum() / (width * height) == pytest.approx(np.pi / 4, abs=0.08)  # and filling its box as a disc does
    assert (red | blue)[:, [0, -1]].all()
    y, x = np.indices(red.shape)
    outside = (y - rows.mean()) ** 2 + (x - columns.mean()) ** 2 > (width / 2 + red.shape[1] / 16) ** 2
    assert blue[outside].mean() > 0.98  # the rest is blue


@pytest.mark.quality
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 25), ("plms", 50), ("ddpm", 50)])
def test_a_red_circle_is_drawn(shipped, sampler, steps):
    [image] = shipped.txt2img(PROMPT, seed=1, sampler=sampler, steps=steps, **OWN_SIZE)
    assert image.size == (128, 128)
    assert_red_circle_on_blue(image)


@pytest.mark.quality
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_red_circle_is_drawn_in_half_precision(dtype):
    [image] = StableDiffusion.load(device="cpu", dtype=dtype).txt2img(PROMPT, seed=1, **OWN_SIZE)
    assert_red_circle_on_blue(image)


def test_guidance_and_negative_prompts_matter(shipped):
    plain, unguided, negative = (
        shipped.txt2img(PROMPT, seed=1, steps=10, **fields)[0]
        for fields in ({}, {"cfg_scale": 1}, {"negative_prompt": "a large green star on a white background"})
    )
    assert np.abs(pixels(plain) - pixels(unguided)).max() > 10
    assert np.abs(pixels(plain) - pixels(negative)).max() > 10


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{"sampler": name} for name in samplers.NAMES] + [{"sampler": "ddim", "eta": 1.0}], ids=str
)
def test_an_image_is_the_same_in_any_batch(shipped, fields):
    alone, batch, shuffled = (
        list(shipped.stream(Request(PROMPT, seed=seed, batch_size=size, steps=10, **fields)))[-1].x
        for seed, size in ((7, 1), (5, 4), (6, 2))
    )
    assert relative_error(batch[2], alone[0]) < 1e-5
    assert relative_error(shuffled[1], alone[0]) < 1e-5


@pytest.mark.parametrize("name", samplers.NAMES)
def test_noise_is_the_same_bit_for_bit(shipped, name, monkeypatch):
    """What a sampler starts from and what it draws on its way, alone, in a batch, and at another place in it."""
    seen = []

    def run(name, denoise, x, levels, noise, *rest):
        seen.append([x, noise(), noise()])
        return iter(())

    monkeypatch.setattr(samplers, "run", run)
    for seed, size in ((7, 1), (5, 4), (6, 2)):
        list(shipped.stream(Request(prompt=PROMPT, sampler=name, seed=seed, batch_size=size)))
    alone, batch, shuffled = seen
    for first, second, third in zip(alone, batch, shuffled, strict=True):
        assert torch.equal(first[0], second[2]) and torch.equal(first[0], third[1])
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    level = shipped.levels(Request(PROMPT, sampler=name))[0]
    assert torch.equal(alone[0], samplers.start(name, start, level))


def test_the_same_request_gives_the_same_bytes(shipped):
    first, second = (shipped.txt2img(PROMPT, seed=3, steps=5)[0].tobytes() for _ in range(2))
    assert first == second


# --- requests ---------------------------------------------------------------------------------------------------------


def test_resolved_requests_leave_nothing_open(shipped):
    request = shipped.resolve(Request(prompt="a"))
    assert (request.width, request.height) == (SIDE, SIDE)
    assert request.seed is not None
    assert request.cfg_scale == shipped.config.cfg_scale != SD_V1.cfg_scale
    assert shipped.resolve(Request(prompt="a", cfg_scale=0)).cfg_scale == 0
    assert shipped.resolve(request) == request
    assert shipped.resolve(Request(prompt="a", width=128)).width == 128
    assert shipped.resolve(Request(prompt="a", width=128)).height == SIDE
    with pytest.raises(RequestError, match="steps is 600: this model has 500 at most"):
        few = replace(shipped.config.schedule, timesteps=500)
        replace(shipped, config=replace(shipped.config, schedule=few)).resolve(Request("a", steps=600))
    with pytest.raises(RequestError, match="the image would have 4×4 pixels"):
        shipped.resolve(Request("a", strength=0.5), Image.new("RGB", (4, 4)))
    half = shipped.resolve(Request("a", strength=0.5, width=64), Image.new("RGB", (128, 256)))
    assert (half.width, half.height) == (64, 128)  # the other side keeps the image's shape
    picture = Image.new("RGB", (100, 75))
    resolved = shipped.resolve(Request(prompt="a", strength=0.5), picture)
    assert (resolved.width, resolved.height) == (96, 72)


def test_strength_and_image_go_together(shipped):
    with pytest.raises(RequestError, match="strength and an initial image go together"):
        shipped.generate(Request(prompt="a", strength=0.5))
    with pytest.raises(RequestError, match="strength and an initial image go together"):
        shipped.generate(Request(prompt="a"), Image.new("RGB", (64, 64)))


@pytest.mark.parametrize(("width", "height"), [(64, 96), (72, 40), (8, 8)])
def test_sizes(shipped, width, height):
    [image] = shipped.txt2img(PROMPT, seed=0, steps=2, width=width, height=height)
    assert image.size == (width, height)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"steps": 7, "sampler": "ddim"}, 8),  # 1000 // 7 = 142 makes a grid of 8, as in the reference
        ({"steps": 10}, 10),
        ({"steps": 7, "sampler": "ddpm"}, 7),
        ({"steps": 10, "strength": 0.75}, 7),
        ({"steps": 10, "strength": 0.0}, 0),
        ({"steps": 10, "strength": 1.0}, 10),
        ({"steps": 10, "strength": 0.75, "exact_steps": True}, 10),
        ({"steps": 10, "strength": 0.01, "exact_steps": True}, 10),
        ({"steps": 10, "strength": 0.0, "exact_steps": True}, 0),
        ({"steps": 25, "sampler": "restart"}, 25),
    ],
)
def test_steps_that_are_run(shipped, fields, steps):
    request = Request(prompt="a", seed=0, **fields)
    image = Image.new("RGB", (64, 64)) if "strength" in fields else None
    assert len(shipped.levels(request)) - 1 == steps
    made = list(shipped.stream(request, image))
    assert [step.index for step in made] == list(range(steps))


def test_img2img_starts_where_the_reference_does(shipped):
    """Noised to the eighth of ten levels, denoised from the seventh on (see z_enc among the golden runs)."""
    start, levels = trajectory(Request("a", sampler="ddim", steps=10, strength=0.75), shipped.schedule)
    assert start.t == 701
    assert [level.t for level in levels] == [601, 501, 401, 301, 201, 101, 1, 0]
    start, levels = trajectory(Request("a", sampler="ddim", steps=10, strength=1.0), shipped.schedule)
    assert start.t == levels[0].t == 901


def test_requests_without_effect_are_warned_of(shipped, caplog):
    shipped.txt2img("a", negative_prompt="b", cfg_scale=1, steps=2)
    shipped.img2img("a", Image.new("RGB", (64, 64)), strength=0.03)
    assert "the negative prompt has no effect at cfg_scale 1" in caplog.text
    assert "strength 0.03 of 25 steps is less than one: none is run" in caplog.text


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_picture_may_be_the_first(shipped, mode):
    steps = list(shipped.stream(Request("a", steps=4, strength=0.5), Image.new(mode, (64, 64))))
    assert len(steps) == 2


def test_faults_do_not_wait_for_the_first_step(shipped):
    with pytest.raises(RequestError):
        shipped.stream(Request("a", strength=0.5))


# --- against diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "eta"), [(10, 0.0), (25, 0.0), (10, 1.0)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_latents_equal_diffusers_pipeline(shipped, steps, eta, prediction_type):
    """The whole way of a prompt, by diffusers from the same folder, with the same noise."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        SHIPPED, torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    # transformers before 5.6 does not find the text encoder's weights under the names that later ones gave them.
    theirs = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    theirs.load_state_dict(shipped.text.transformer.state_dict())
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = pipeline(
        [PROMPT] * 2, negative_prompt=["a star"] * 2, height=64, width=64, num_inference_steps=steps,
        guidance_scale=5.0, eta=eta, generator=generators, output_type="latent",
    ).images  # fmt: skip
    schedule = replace(shipped.config.schedule, prediction_type=prediction_type)
    sd = replace(shipped, config=replace(shipped.config, schedule=schedule))
    request = Request(
        PROMPT, negative_prompt="a star", sampler="ddim", steps=steps, eta=eta, cfg_scale=5.0, seed=3, batch_size=2
    )
    *_, last = sd.stream(request)
    assert_parity(f"shipped model, {prediction_type}, {steps} steps, eta {eta}, diffusers", last.x, theirs, 1e-4)


def test_streamed_steps_end_in_the_image(shipped):
    *_, last = shipped.stream(Request(prompt=PROMPT, seed=3, steps=5))
    assert shipped.decode(last.x)[0].tobytes() == shipped.txt2img(PROMPT, seed=3, steps=5)[0].tobytes()
    assert last.x0.shape == (1, 4, 8, 8)
    assert not torch.is_inference_mode_enabled()


def test_taesd_decodes_previews_and_pictures(shipped):
    torch.manual_seed(0)
    small = replace(shipped, taesd=TAESD().eval())
    *_, last = small.stream(Request(PROMPT, seed=3, steps=2))
    assert small.preview(last).size == (64, 64)
    assert shipped.preview(last).size == (8, 8)
    assert small.decode(last.x)[0].tobytes() == shipped.decode(last.x)[0].tobytes()
    finals = replace(small, taesd_finals=True)
    with torch.no_grad():
        expected = to_image(small.taesd(last.x)[0])
    assert finals.generate(Request(PROMPT, seed=3, steps=2))[0].tobytes() == expected.tobytes()
    with pytest.raises(RequestError, match="how its latents look is not known"):
        replace(shipped, latent_preview=None).preview(last)


def test_progress_says_how_many_steps_are_run(shipped, capsys):
    shipped.generate(Request(prompt="a", sampler="ddim", seed=0, steps=7), progress=True)
    assert "8/8" in capsys.readouterr().err
    shipped.generate(Request(prompt="a", seed=0, steps=7))
    assert not capsys.readouterr().err


def test_unknown_kinds_of_models_are_refused(shipped):
    config = replace(shipped.config, unet=replace(shipped.config.unet, in_channels=7))
    with pytest.raises(RequestError, match="takes 7 channels, which no kind of model does"):
        replace(shipped, config=config).txt2img("a")


# --- img2img ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def circle(shipped) -> Image.Image:
    return shipped.txt2img(PROMPT, seed=1)[0]


def test_img2img_at_strength_0_is_the_image_through_the_vae(shipped, circle):
    [image] = shipped.img2img("a green star", circle, strength=0.0, seed=0)
    with torch.no_grad():
        through = shipped.vae.decode(shipped.vae.encode(to_tensor(circle)).mode())
    assert np.abs(pixels(image) - pixels(shipped.decode(shipped.encode(circle))[0])).max() == 0
    assert (to_tensor(image) - through.clamp(-1, 1)).abs().max() < 0.005
    assert np.abs(pixels(image) - pixels(circle)).mean() < 8


def test_img2img_keeps_more_at_lower_strength(shipped, circle):
    changes = [
        np.abs(
            pixels(shipped.img2img("a large green square on a white background", circle, strength=s, seed=0)[0])
            - pixels(circle)
        ).mean()
        for s in (0.1, 0.5, 0.95)
    ]
    assert changes[0] < changes[1] < changes[2]


@pytest.mark.quality
def test_img2img_recolours(shipped):
    circle = shipped.txt2img(PROMPT, seed=1, **OWN_SIZE)[0]
    [image] = shipped.img2img("a large red circle on a green background", circle, strength=0.9, seed=0)
    assert is_blue(image).mean() < 0.05
    assert is_red(image).mean() > 0.1


def test_img2img_in_a_batch_and_resized(shipped, circle):
    big = circle.resize((150, 90))
    [alone] = shipped.img2img(PROMPT, big, seed=6, steps=8)
    batch = shipped.img2img(PROMPT, big, seed=5, steps=8, batch_size=2)
    assert alone.size == (144, 88)
    assert np.abs(pixels(alone) - pixels(batch[1])).max() <= 1
    assert shipped.img2img(PROMPT, big, seed=6, steps=2, width=64, height=64)[0].size == (64, 64)


# --- when arithmetic or memory fail -----------------------------------------------------------------------------------


def overflowing(vae, also_in_float32=False):
    """The VAE with results that are NaN in half precision."""

    def spoil(layer, args, output):
        return output * float("nan") if also_in_float32 or output.dtype != torch.float32 else output

    spoiled = copy.deepcopy(vae)
    for layer in (spoiled.quant_conv, spoiled.post_quant_conv):
        layer.register_forward_hook(spoil)
    return spoiled


def test_black_images_are_made_again_in_float32(shipped, caplog):
    half = load_small("bfloat16")
    spoiled = replace(half, vae=overflowing(half.vae))
    red = Image.new("RGB", (64, 64), "red")
    with caplog.at_level(logging.WARNING):
        latents = spoiled.encode(red)
        images = spoiled.decode(latents.repeat(3, 1, 1, 1))
    assert caplog.text.count("the VAE overflows in torch.bfloat16: running it in float32") == 1
    expected = shipped.decode(shipped.encode(red))[0]
    assert all(np.abs(pixels(image) - pixels(expected)).max() <= 3 for image in images)
    assert half.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    broken = replace(half, vae=overflowing(half.vae, also_in_float32=True))
    for call in (lambda: broken.decode(latents), lambda: broken.img2img("a", red)):
        with pytest.raises(NumericalError, match="weights are damaged"):
            call()


def test_what_overflows_in_float32_is_not_tried_twice(shipped, caplog):
    broken = replace(shipped, vae=overflowing(shipped.vae, also_in_float32=True))
    with pytest.raises(NumericalError, match="weights are damaged"):
        broken.decode(torch.zeros(1, 4, 8, 8))
    assert "running it in float32" not in caplog.text
    overflowed = replace(shipped, vae=overflowing(shipped.vae))
    with torch.autocast("cpu", torch.float16):  # which is not float32
        overflowed.decode(torch.zeros(1, 4, 8, 8))


def test_overflowing_latents_are_an_error(shipped):
    nan = torch.full((1, 4, 8, 8), float("nan"))
    with pytest.raises(NumericalError, match="the sampler diverged: lower cfg_scale"):
        shipped.decode(nan)
    with pytest.raises(NumericalError, match=r"the U-Net overflowed in torch.float16: use dtype float32"):
        replace(shipped, dtype=torch.float16).decode(nan)


def test_guidance_is_split_when_memory_is_short(shipped, monkeypatch, caplog):
    expected = shipped.txt2img(PROMPT, seed=1, steps=5)[0]
    predict = type(shipped.unet).predict

    def cramped(self, x, shifts, keys_values):
        if len(keys_values[0][0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, x, shifts, keys_values)

    monkeypatch.setattr(type(shipped.unet), "predict", cramped)
    [image] = shipped.txt2img(PROMPT, seed=1, steps=5)
    assert np.abs(pixels(image) - pixels(expected)).max() <= 1
    assert caplog.text.count("out of memory") == 1


def test_a_model_is_shipped(monkeypatch, tmp_path):
    from ldm import pipeline

    assert (pipeline.shipped_model() / "model_index.json").is_file()
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "ldm" / "pipeline.py"))
    with pytest.raises(CheckpointError, match="carries no model"):
        pipeline.shipped_model()
