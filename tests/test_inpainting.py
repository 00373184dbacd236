"""Inpainting, editing and second passes on the shipped model, judged by pixels; and the known part of latents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import OWN_SIZE, SIDE, relative_error
from PIL import Image
from test_pipeline import PROMPT, is_blue, is_red, pixels

from ldm import Request, StableDiffusion
from ldm.diffusion import Prediction, samplers
from ldm.diffusion.guidance import guide, guide_edit, rescale, threshold
from ldm.diffusion.inpainting import keep_known
from ldm.errors import RequestError
from ldm.images import to_tensor
from ldm.models.unet import UNet
from ldm.trajectory import trajectory


def is_green(image: Image.Image) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels(image), -1, 0)
    return (green > 110) & (red < 100) & (blue < 110)


SMALL_CIRCLE = "a small red circle on a blue background"


@pytest.fixture(scope="module")
def picture(shipped) -> Image.Image:
    [image] = shipped.txt2img(SMALL_CIRCLE, seed=4, sampler="ddim", steps=10)
    return image


@pytest.fixture(scope="module")
def own(shipped) -> Image.Image:
    """A picture of the model's own size, to be judged."""
    [image] = shipped.txt2img(SMALL_CIRCLE, seed=4, sampler="ddim", **OWN_SIZE)
    return image


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


CORNER = (0, 0, SIDE // 2, SIDE // 2)


@pytest.mark.quality
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc", "euler_a", "dpmpp_sde"])
def test_a_green_star_in_the_middle(shipped, own, sampler):
    """What was red turns green, and not a bit changes around the mask."""
    edge = own.width // 8
    mask = rectangle(own.size, (edge, edge, own.width - edge, own.height - edge))
    [painted] = shipped.inpaint(
        "a large green star on a blue background", own, mask, seed=3, sampler=sampler, cfg_scale=3, mask_blur=0
    )
    outside = np.asarray(mask) == 0
    assert (pixels(painted)[outside] == pixels(own)[outside]).all()
    assert is_green(painted).mean() > 0.1 > 0.01 > is_red(painted).mean()
    assert is_red(own).mean() > 0.05 and not is_green(own).any()


@pytest.mark.parametrize("blur", [0, 2, 4])
def test_pixels_outside_a_soft_mask_are_kept_bit_for_bit(shipped, picture, blur):
    from ldm.editing import soften

    mask = rectangle(picture.size, CORNER)
    [painted] = shipped.inpaint("a green star", picture, mask, seed=3, steps=3, mask_blur=blur)
    kept = np.asarray(soften(mask, blur)) == 0
    assert kept.mean() > 1 / 3
    assert (pixels(painted)[kept] == pixels(picture)[kept]).all()
    assert (pixels(painted)[~kept] != pixels(picture)[~kept]).any()


def test_odd_sizes_are_kept(shipped, picture):
    odd = picture.resize((77, 70))
    mask = rectangle(odd.size, (0, 0, 20, 20))
    for fields in ({}, {"only_masked": True, "width": 64, "height": 64, "mask_padding": 8}):
        [painted] = shipped.inpaint("a green star", odd, mask, seed=3, steps=3, mask_blur=0, **fields)
        assert painted.size == odd.size
        assert (pixels(painted)[20:] == pixels(odd)[20:]).all()
        assert (pixels(painted)[:20, :20] != pixels(odd)[:20, :20]).any()
    assert shipped.inpaint("a", odd, mask, steps=1, width=40, height=48)[0].size == (40, 48)


@pytest.mark.parametrize("sampler", samplers.NAMES)
def test_the_known_part_of_latents_ends_at_its_own_value(shipped, picture, sampler):
    request = Request("a green star on a red background", seed=3, steps=10, strength=1.0, sampler=sampler, mask_blur=0)
    request, fitted = shipped._prepare(request, picture, rectangle(picture.size, CORNER))
    walk = shipped._walk(request, fitted)
    try:
        while True:
            next(walk)
    except StopIteration as stop:
        latents = stop.value
    known = shipped.encode(picture)
    assert relative_error(latents[..., 4:, :], known[..., 4:, :]) < 1e-5
    assert relative_error(latents[..., :4, :4], known[..., :4, :4]) > 0.1


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc", "euler_a", "lms", "restart"])
def test_samplers_follow_what_is_known(sampler):
    """At every level, what is known has its own share of signal, without being put there after the step."""
    from test_samplers import SCHEDULE, Draws, exact

    known = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 1, 4, 4)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., :2] = 1

    def denoise(x, level):
        return Prediction(*exact(0.5, 0.3)(x, level))

    levels = samplers.levels(sampler, SCHEDULE, 25)
    draws = Draws(known)
    x = levels[0].add_noise(known, draws().double())
    steps = samplers.run(sampler, keep_known(denoise, known, mask), x, levels, lambda: draws().double(), SCHEDULE)
    for step in steps:
        assert torch.allclose(step.x0[..., 2:], known[..., 2:])
    if step.level.sigma == 0:
        assert torch.allclose(step.x[..., 2:], known[..., 2:], atol=1e-5)


@pytest.mark.parametrize("fill", ["original", "noise", "blur"])
def test_under_half_of_a_mask_half_of_the_picture_is_left(shipped, picture, fill):
    """Whatever the masked part started from: what is known enters as it is, not as it was filled."""
    grey = Image.new("L", picture.size, 20)
    request = Request("a green star", seed=3, steps=10, strength=1.0, mask_blur=0, fill=fill)
    request, fitted = shipped._prepare(request, picture, grey)
    *_, last = shipped._walk(request, fitted)
    assert relative_error(last.x, shipped.encode(fitted.picture)) < 0.2


def test_fills_differ(shipped, picture):
    results = {
        shipped.inpaint(
            "a green star", picture, rectangle(picture.size, (16, 16, 48, 48)), 0.5, seed=3, steps=4, fill=fill
        )[0].tobytes()
        for fill in ("original", "noise", "blur")
    }
    assert len(results) == 3


@pytest.mark.quality
def test_outpainting(shipped, own):
    [wider] = shipped.inpaint(SMALL_CIRCLE, own, seed=1, outpaint_left=16, outpaint_bottom=8, mask_blur=0)
    assert wider.size == (own.width + 16, own.height + 8)
    assert (pixels(wider)[: own.height - 8, 24:] == pixels(own)[: own.height - 8, 8:]).all()
    assert is_blue(wider)[:, :12].mean() > 0.7


def test_what_a_mask_needs(shipped, picture):
    mask = rectangle(picture.size, CORNER)
    with pytest.raises(RequestError, match="a mask and outpainting need an initial image"):
        shipped.generate(Request("a"), mask=mask)
    with pytest.raises(RequestError, match="a mask and outpainting need an initial image"):
        shipped.txt2img("a", outpaint_left=8)
    with pytest.raises(RequestError, match="the mask is black all over"):
        shipped.inpaint("a", picture, Image.new("L", picture.size))
    with pytest.raises(RequestError, match="hires_scale and a mask do not go together"):
        shipped.inpaint("a", picture, mask, hires_scale=2.0)


# --- two passes, variations, tiles ------------------------------------------------------------------------------------


@pytest.mark.quality
@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_a_second_pass_doubles_the_size(shipped, upscaler):
    request = Request(
        PROMPT,
        seed=1,
        steps=10,
        hires_scale=2.0,
        hires_steps=6,
        hires_strength=0.5,
        hires_upscaler=upscaler,
        **OWN_SIZE,
    )
    assert shipped.steps_to_run(shipped.complete(request)) == 13
    steps = list(shipped.stream(request))
    assert len(steps) == 13 and steps[-1].x.shape == (1, 4, 32, 32)
    [image] = shipped.generate(request)
    assert image.size == (256, 256)
    assert is_red(image).mean() > 0.1 and is_blue(image).mean() > 0.3


@pytest.mark.parametrize(
    "fields",
    [
        {"hires_scale": 2.0, "variation_strength": 0.3},
        {"hires_scale": 1.5, "hires_upscaler": "lanczos", "sampler": "euler_a"},
        {"sampler": "dpmpp_2m_sde", "brownian": True, "noise": "cuda", "seed_width": 32, "seed_height": 32},
        {"prompt": "a red circle AND a [blue:green:0.5] square", "clip_skip": 2, "sampler": "heun"},
    ],
    ids=str,
)
def test_an_image_of_a_batch_can_be_made_alone(shipped, fields):
    request = shipped.complete(Request(**{"prompt": PROMPT, "seed": 5, "steps": 4, "batch_size": 2} | fields))
    for image, alone in zip(shipped.generate(request), request.images(), strict=True):
        assert np.abs(pixels(image) - pixels(shipped.generate(alone)[0])).max() <= 1


def test_scheduled_prompts_count_the_steps_that_are_run(shipped, picture):
    """As in AUTOMATIC1111, whose img2img counts from 0 too."""
    first, scheduled, second = (
        shipped.img2img(prompt, picture, 0.4, seed=1, steps=5)[0].tobytes()
        for prompt in ("a red circle", "a [red circle:blue square:0.9]", "a blue square")
    )
    assert scheduled == first != second


def test_exact_steps_start_where_the_strength_says(shipped):
    for strength in (0.5, 0.05, 0.002):
        start, levels = trajectory(
            Request("a", strength=strength, exact_steps=True, schedule="linspace"), shipped.schedule
        )
        assert abs(start.t - strength * 999) < 30 and len(levels) - 1 in (25, 2, 1)


def test_what_has_no_effect_is_told_once(shipped, picture, caplog):
    shipped.img2img("a", picture, 0.5, steps=2, fill="noise", image_cfg_scale=3.0, hires_steps=3, variation_seed=4)
    told = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert [line.rpartition(": ")[2] for line in told] == ["fill", "image_cfg_scale", "hires_steps", "variation_seed"]
    with pytest.raises(RequestError, match=r"hires_scale is 8\.0, so that width is 16384"):
        shipped.complete(Request("a", width=2048, hires_scale=8.0))


def test_variations(shipped):
    [image] = shipped.txt2img(PROMPT, seed=1, steps=8)
    changes = [
        np.abs(
            pixels(shipped.txt2img(PROMPT, seed=1, steps=8, variation_seed=5, variation_strength=share)[0])
            - pixels(image)
        ).mean()
        for share in (0.0, 0.05, 0.9)
    ]
    assert changes[0] == 0 < changes[1] < changes[2]
    alone = shipped.txt2img(PROMPT, seed=1, steps=8, variation_seed=6, variation_strength=0.3)[0]
    batch = shipped.txt2img(PROMPT, seed=1, steps=8, variation_seed=5, variation_strength=0.3, batch_size=2)
    assert np.abs(pixels(batch[1]) - pixels(alone)).max() <= 1


def test_tiles_fit(shipped):
    """A tile that is moved and wraps around is the same tile; a picture is not."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = latents.roll((3, 5), (2, 3))
    for tiling, same in (("both", True), ("none", False)):
        [tile], [elsewhere] = shipped.decode(latents, tiling), shipped.decode(moved, tiling)
        difference = np.abs(np.roll(pixels(tile), (24, 40), (0, 1)) - pixels(elsewhere)).max()
        assert (difference <= 1) == same
    [tile], [picture] = (shipped.txt2img(PROMPT, seed=1, tiling=tiling) for tiling in ("both", "none"))
    assert tile.tobytes() != picture.tobytes()


@pytest.mark.quality
def test_noise_of_other_programs(shipped):
    """Another source of noise is another picture of the same; Brownian noise needs no more than a flag."""
    pictures = [
        shipped.txt2img(PROMPT, seed=1, steps=12, sampler="euler_a", **fields, **OWN_SIZE)[0]
        for fields in ({}, {"noise": "cuda"}, {"brownian": True})
    ]
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert all(is_red(picture).mean() > 0.05 for picture in pictures)


# --- guidance ---------------------------------------------------------------------------------------------------------


def predictions(count: int) -> tuple[torch.Tensor, object, list[Prediction]]:
    from test_samplers import SCHEDULE

    g = torch.Generator().manual_seed(0)
    level = SCHEDULE.level(500)
    x = torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64)
    outputs = torch.randn(count, 2, 4, 8, 8, generator=g, dtype=torch.float64)
    return x, level, [Prediction((x - level.sigma * eps) / level.alpha, eps) for eps in outputs]


def test_guidance_is_its_formula():
    _, _, (u, a, b) = predictions(3)
    assert torch.allclose(guide(u, [a], [1.0], 7.5).eps, u.eps + 7.5 * (a.eps - u.eps))
    both = guide(u, [a, b], [0.7, -0.3], 7.5)
    assert torch.allclose(both.x0, u.x0 + 7.5 * (0.7 * (a.x0 - u.x0) - 0.3 * (b.x0 - u.x0)))
    edited = guide_edit(u, a, b, scale=7.5, image_scale=1.5)
    assert torch.allclose(edited.eps, u.eps + 1.5 * (a.eps - u.eps) + 7.5 * (b.eps - a.eps))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_rescaling_equals_diffusers(prediction_type):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    x, level, (u, a) = predictions(2)
    guided = guide(u, [a], [1.0], 7.5)

    def output(p):
        return p.eps if prediction_type == "epsilon" else level.alpha * p.eps - level.sigma * p.x0

    expected = rescale_noise_cfg(output(guided), output(a), 0.7)
    rescaled = rescale(guided, a, 0.7, x, level, prediction_type)
    assert relative_error(output(rescaled), expected) < 1e-12
    assert torch.allclose(level.alpha * rescaled.x0 + level.sigma * rescaled.eps, x)


def test_thresholding_is_its_formula():
    x, level, (u, a) = predictions(2)
    guided = guide(u, [a], [1.0], 7.5)
    result = threshold(guided, a, 0.95, x, level)
    for i in range(2):
        usual, reached = (torch.quantile(p.x0[i].abs(), 0.95, interpolation="nearest") for p in (a, guided))
        limit = max(usual, reached)
        assert torch.allclose(result.x0[i], guided.x0[i].clamp(-limit, limit) / limit * usual)
    assert torch.allclose(level.alpha * result.x0 + level.sigma * result.eps, x)
    assert torch.allclose(threshold(a, a, 1.0, x, level).x0, a.x0)


def test_guidance_options_matter(shipped, monkeypatch):
    results = {
        shipped.txt2img(PROMPT, seed=1, steps=6, **fields)[0].tobytes()
        for fields in (
            {}, {"guidance_rescale": 0.7}, {"dynamic_threshold": 0.9}, {"guidance_end": 0.5}, {"guidance_start": 0.5},
            {"clip_skip": 2},
        )
    }  # fmt: skip
    assert len(results) == 6
    calls = []
    predict = UNet.predict
    monkeypatch.setattr(UNet, "predict", lambda self, *args: calls.append(len(args[2][0][0])) or predict(self, *args))
    for start, end, guided in ((0.0, 0.5, 2), (0.0, 0.0, 0), (0.5, 1.0, 2), (0.0, 1.0, 4)):
        calls.clear()
        shipped.txt2img(PROMPT, steps=4, guidance_start=start, guidance_end=end)
        assert (calls.count(2), calls.count(1)) == (guided, 4 - guided)
    late = shipped.txt2img(PROMPT, seed=1, steps=6, guidance_start=1.0, guidance_end=1.0)[0]
    unguided = shipped.txt2img(PROMPT, seed=1, steps=6, cfg_scale=1)[0]
    assert late.tobytes() == unguided.tobytes()


# --- models that see more ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def widened(shipped):
    """The shipped model with more channels of input, to which the weights give no heed, or a little."""

    def widen(channels: int, heed: float = 0.0) -> StableDiffusion:
        config = replace(shipped.config.unet, in_channels=channels)
        unet = UNet(config).eval()
        state = {key: tensor.clone() for key, tensor in shipped.unet.state_dict().items()}
        more = torch.full((config.channels, channels - 4, 3, 3), heed)
        state["conv_in.weight"] = torch.cat([state["conv_in.weight"], more], dim=1)
        unet.load_state_dict(state)
        return replace(shipped, unet=unet, config=replace(shipped.config, unet=config))

    return widen


def test_inpainting_models_see_mask_and_masked_image(widened, shipped, picture, monkeypatch):
    sd, seen = widened(9), []
    predict = UNet.predict
    monkeypatch.setattr(UNet, "predict", lambda self, x, *rest: seen.append(x) or predict(self, x, *rest))
    mask = rectangle(picture.size, CORNER)
    [painted] = sd.inpaint("a green star", picture, mask, seed=3, steps=2, mask_blur=0)
    x = seen[0]
    assert x.shape == (1, 9, 8, 8)  # for both prompts
    expected = torch.zeros(8, 8)
    expected[:4, :4] = 1
    assert torch.equal(x[0, 4], expected)
    blanked = picture.copy()
    pixels_of = to_tensor(blanked) * (1 - torch.nn.functional.interpolate(expected[None, None], scale_factor=8))
    assert relative_error(x[:1, 5:], shipped._codec.encode(pixels_of, "none")) < 1e-5
    assert (pixels(painted)[32:] == pixels(picture)[32:]).all()
    seen.clear()
    drawn, plain = (pixels(model.txt2img(PROMPT, seed=1, steps=2)[0]).astype(int) for model in (sd, shipped))
    assert abs(drawn - plain).max() <= 1
    assert torch.equal(seen[0][:, 4], torch.ones(1, 8, 8))


def test_editing_models_see_the_image_unless_they_are_not_to(widened, shipped, picture, monkeypatch):
    sd, seen = widened(8), []
    predict = UNet.predict
    monkeypatch.setattr(UNet, "predict", lambda self, x, *rest: seen.append(x) or predict(self, x, *rest))
    sd.generate(Request("make it green", seed=3, steps=2), picture)
    x = seen[0]
    assert x.shape == (3, 8, 8, 8)
    assert not x[0, 4:].any()
    with torch.no_grad():
        latents = shipped.vae.encode(to_tensor(picture)).mode()
    assert relative_error(x[1:2, 4:], latents) < 1e-5 and torch.equal(x[1], x[2])
    with pytest.raises(RequestError, match="edits pictures: give an initial image"):
        sd.txt2img("a")
    with pytest.raises(RequestError, match="takes one prompt: leave out AND"):
        sd.generate(Request("a red circle AND a square", steps=1), picture)
    results = {
        widened(8, 0.02).generate(Request("a circle", seed=3, steps=3, **fields), picture)[0].tobytes()
        for fields in ({}, {"guidance_rescale": 0.9}, {"dynamic_threshold": 0.5}, {"image_cfg_scale": 3.0})
    }
    assert len(results) == 4
