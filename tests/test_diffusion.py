"""Schedule, samplers, guidance and loss: against the reference's recorded runs, diffusers, and formulas in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from conftest import assert_parity, relative_error

from ldm import ScheduleConfig
from ldm.diffusion import Level, NoiseSchedule, Prediction, grids, samplers
from ldm.diffusion.guidance import guide
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.prediction import denoiser

SCHEDULE = NoiseSchedule(ScheduleConfig())


def timesteps(schedule, grid, steps):
    return [level.t for level in grids.visit(schedule, grid, steps)]


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


@pytest.fixture
def guided(tiny_unet, golden):
    """The tiny model with guidance 7.5, as in the recorded runs."""
    context = torch.cat([golden["sample.uncond"], golden["sample.cond"]])
    eps = denoiser(lambda x, level: tiny_unet(x, torch.full((len(x),), level.t), context), "epsilon")

    def guided(x, level):
        uncond, cond = zip(*(form.chunk(2) for form in eps(x.repeat(2, 1, 1, 1), level)), strict=True)
        return guide(Prediction(*uncond), [Prediction(*cond)], [1.0], 7.5)

    return guided


def final(steps):
    *_, last = steps
    return last.x


# --- against the reference implementation -----------------------------------------------------------------------------


def test_schedule_equals_reference(golden):
    assert torch.equal(SCHEDULE.alphas_cumprod.float(), golden["schedule.alphas_cumprod"])
    assert torch.equal(torch.tensor(SCHEDULE.betas), golden["schedule.betas"])
    assert SCHEDULE.alphas_cumprod.dtype == torch.float64


@pytest.mark.parametrize(("run", "steps"), [("ddim_eta0", 10), ("ddim_odd", 7), ("plms", 10)])
def test_grid_equals_reference(golden, run, steps):
    assert timesteps(SCHEDULE, "uniform", steps) == golden[f"{run}.timesteps"].tolist()


@pytest.mark.parametrize(
    ("run", "sampler", "steps"), [("ddim_eta0", "ddim", 10), ("ddim_odd", "ddim", 7), ("plms", "plms", 10)]
)
def test_deterministic_sampling_equals_reference(golden, guided, run, sampler, steps):
    walk = samplers.sample(sampler, guided, golden["sample.xT"], SCHEDULE, steps=steps, noise=no_noise)
    assert_parity(f"{run}, reference", final(walk), golden[f"{run}.x0"], 1e-4)


def test_stochastic_ddim_equals_reference(golden, guided):
    draws = iter(golden["ddim_eta1.noise"])
    walk = samplers.sample("ddim", guided, golden["sample.xT"], SCHEDULE, steps=10, eta=1.0, noise=lambda: next(draws))
    assert_parity("ddim_eta1, reference", final(walk), golden["ddim_eta1.x0"], 1e-4)


def test_ddpm_equals_reference(golden, tiny_unet):
    eps = denoiser(lambda x, level: tiny_unet(x, torch.tensor([level.t]), golden["sample.cond"]), "epsilon")
    draws = iter(golden["ddpm_last20.noise"])
    last20 = samplers.levels("ddpm", SCHEDULE, 1000)[-21:]
    assert [level.t for level in last20[:-1]] == list(range(19, -1, -1))
    walk = samplers.run("ddpm", eps, golden["sample.xT"], last20, lambda: next(draws), SCHEDULE)
    assert_parity("ddpm_last20, reference", final(walk), golden["ddpm_last20.x0"], 1e-4)


def test_img2img_equals_reference(golden, guided):
    levels = samplers.levels("ddim", SCHEDULE, 10)
    kept = int(0.75 * 10)
    z = levels[10 - kept - 1].add_noise(golden["img2img.x0_in"], golden["img2img.noise"])
    assert relative_error(z, golden["img2img.z_enc"]) <= 1e-5
    walk = samplers.run("ddim", guided, z, levels[-kept - 1 :], no_noise, SCHEDULE)
    assert_parity("img2img, reference", final(walk), golden["img2img.x0"], 1e-4)


def test_loss_equals_reference(golden, tiny_unet):
    x0, noise, t = golden["img2img.x0_in"], golden["loss.noise"], golden["loss.t"]
    assert relative_error(SCHEDULE.add_noise(x0, noise, t), golden["loss.xt"]) <= 1e-6
    loss = diffusion_loss(lambda x, t: tiny_unet(x, t, golden["sample.cond"]), x0, noise, t, SCHEDULE)
    assert_parity("training loss, reference", loss, golden["loss.mse"], 1e-4)


# --- against diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_beta_schedules_equal_diffusers(ours, theirs):
    config = ScheduleConfig(beta_schedule=ours, beta_start=0.0001, beta_end=0.02)
    scheduler = diffusers.DDPMScheduler(beta_schedule=theirs, beta_start=0.0001, beta_end=0.02)
    assert relative_error(NoiseSchedule(config).alphas_cumprod, scheduler.alphas_cumprod) < 1e-6


def linear_network(x, t):
    """A stand-in for the U-Net that is smooth in x and t."""
    return 0.7 * x - 0.1 * x.flip(-1) + math.sin(float(t) / 300)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(prediction_type, eta):
    g = torch.Generator().manual_seed(1)
    x = start = torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64)
    draws = torch.randn(20, 2, 4, 8, 8, generator=g, dtype=torch.float64)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    for t, draw in zip(scheduler.timesteps, draws, strict=True):
        x = scheduler.step(linear_network(x, t), t, x, eta=eta, variance_noise=draw if eta else None).prev_sample
    ours = denoiser(lambda x, level: linear_network(x, level.t), prediction_type)
    source = iter(draws)
    walk = samplers.sample("ddim", ours, start, SCHEDULE, steps=20, eta=eta, noise=lambda: next(source))
    assert relative_error(final(walk), x) < 1e-5


def test_plms_equals_diffusers_after_its_first_step():
    """diffusers' PNDM with skip_prk_steps visits the second timestep twice; from there on the two are the same."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(linear_network(theirs, t), t, theirs).prev_sample
    ours = denoiser(lambda x, level: linear_network(x, level.t), "epsilon")
    walk = samplers.sample("plms", ours, x, SCHEDULE, steps=20, noise=no_noise)
    assert relative_error(final(walk), theirs) < 1e-5


# --- against formulas -------------------------------------------------------------------------------------------------


def test_quad_grid_is_the_references_for_any_number_of_steps():
    for steps in range(1, 1001):
        expected = (np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2).astype(int) + 1
        assert timesteps(SCHEDULE, "quad", steps) == expected[::-1].tolist()


def test_uniform_grid_is_the_references_for_any_number_of_steps():
    for steps in range(1, 1001):
        expected = np.minimum(np.arange(0, 1000, 1000 // steps) + 1, 999)
        assert timesteps(SCHEDULE, "uniform", steps) == expected[::-1].tolist()


def test_linspace_grid_is_improved_ddpms_for_any_number_of_steps():
    for steps in range(2, 1001):
        position, expected = 0.0, []
        for _ in range(steps):
            expected.append(round(position))
            position += 999 / (steps - 1)
        assert timesteps(SCHEDULE, "linspace", steps) == expected[::-1]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 50, 333, 501, 999, 1000])
@pytest.mark.parametrize("grid", ["uniform", "quad", "linspace"])
def test_grids_descend_and_stay_inside(grid, steps):
    ts = timesteps(SCHEDULE, grid, steps)
    assert all(0 <= t <= 999 for t in ts)
    assert sorted(ts, reverse=True) == ts
    assert len(ts) >= steps


def test_ddpm_of_1000_steps_visits_every_timestep():
    assert timesteps(SCHEDULE, "linspace", 1000) == list(range(999, -1, -1))


def exact_gaussian(level: Level, x: torch.Tensor, mean: float, std: float) -> Prediction:
    """The optimal denoiser where x0 ~ N(mean, std²)."""
    variance = level.alpha**2 * std**2 + level.sigma**2
    x0 = mean + level.alpha * std**2 / variance * (x - level.alpha * mean)
    return Prediction(x0, (x - level.alpha * x0) / level.sigma)


@pytest.mark.parametrize(
    ("sampler", "eta", "steps"), [("ddim", 0.0, 100), ("ddim", 1.0, 250), ("plms", 0.0, 50), ("ddpm", 0.0, 1000)]
)
def test_samplers_draw_from_a_gaussian(sampler, eta, steps):
    """With an exact denoiser, samples have the mean and deviation of the data."""
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20_000, generator=g, dtype=torch.float64)  # noqa: E731
    walk = samplers.sample(
        sampler, lambda x, level: exact_gaussian(level, x, 0.5, 0.3), draw(), SCHEDULE, steps=steps, eta=eta, noise=draw
    )
    x = final(walk)
    assert x.mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predictions_invert_the_forward_process(prediction_type):
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64).split(1)
    t = torch.tensor([321])
    target = noise if prediction_type == "epsilon" else SCHEDULE.velocity(x0, noise, t)
    prediction = denoiser(lambda x, level: target, prediction_type)(
        SCHEDULE.add_noise(x0, noise, t), SCHEDULE.level(321)
    )
    assert torch.allclose(prediction.x0, x0)
    assert torch.allclose(prediction.eps, noise)


def test_loss_is_zero_for_a_perfect_network_and_per_image():
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=g).unbind()
    t = torch.tensor([0, 500, 999])
    v = NoiseSchedule(ScheduleConfig(prediction_type="v_prediction"))
    assert diffusion_loss(lambda x, t: v.velocity(x0, noise, t), x0, noise, t, v).abs().max() == 0
    assert diffusion_loss(
        lambda x, t: noise + torch.tensor([1.0, 2, 3])[:, None, None, None], x0, noise, t, SCHEDULE
    ).tolist() == (pytest.approx([1.0, 4.0, 9.0]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: samplers.levels("eular", SCHEDULE, 10),
        lambda: samplers.levels("ddim", SCHEDULE, 0),
        lambda: samplers.levels("ddim", SCHEDULE, 1001),
        lambda: samplers.levels("ddim", SCHEDULE, 10, grid="cubic"),
        lambda: samplers.run("plms", None, None, [], None, SCHEDULE, eta=0.5),
        lambda: samplers.run("ddim", None, None, [], None, SCHEDULE, eta=5),
        lambda: NoiseSchedule(ScheduleConfig(beta_schedule="sigmoid")),
        lambda: NoiseSchedule(ScheduleConfig(beta_end=1.5)),
        lambda: NoiseSchedule(ScheduleConfig(beta_start=0.0, beta_end=0.0)),
        lambda: denoiser(None, "x0"),
    ],
)
def test_what_does_not_exist_is_refused(call):
    with pytest.raises(ValueError, match=r"use|leave|must"):
        call()


def test_zero_terminal_snr():
    """Against diffusers, whose betas are float32; nothing is left of the signal at the end, the start is as it was."""
    config = ScheduleConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    schedule = NoiseSchedule(config)
    theirs = diffusers.DDIMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    )
    assert relative_error(schedule.alphas_cumprod, theirs.alphas_cumprod) < 1e-5
    assert schedule.level(999) == Level(999.0, 0.0, 1.0)
    assert schedule.level(0).alpha == pytest.approx(NoiseSchedule(ScheduleConfig()).level(0).alpha, abs=1e-12)
    assert schedule.betas[-1] == 1
    with pytest.raises(ValueError, match="zero-terminal SNR needs v_prediction"):
        NoiseSchedule(replace(config, prediction_type="epsilon"))


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_sampling_from_zero_terminal_snr_is_exact(name):
    """From pure noise to a point, the only picture there is, which v tells even where no signal is left."""
    target = torch.tensor([[[[0.3, -0.7]]]], dtype=torch.float64)
    schedule = NoiseSchedule(ScheduleConfig(prediction_type="v_prediction", zero_terminal_snr=True))

    def network(x, level):
        eps = (x - level.alpha * target) / level.sigma
        return level.alpha * eps - level.sigma * target

    steps = list(
        samplers.sample(
            name, denoiser(network, "v_prediction"), torch.randn(1, 1, 1, 2).double(), schedule,
            steps=1000, noise=lambda: torch.randn(1, 1, 1, 2).double(),
        )
    )  # fmt: skip
    assert all(relative_error(step.x0, target) < 1e-9 for step in steps)
