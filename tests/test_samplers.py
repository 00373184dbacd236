"""Each sampler people know by name: against k-diffusion and diffusers on the tiny model, with the same noise."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import scipy
import torch
from conftest import MEASURED, assert_parity, relative_error
from peers import k_external, k_sampling

from ldm import ScheduleConfig
from ldm.diffusion import Level, NoiseSchedule, Prediction, grids, multistep, samplers
from ldm.diffusion.prediction import denoiser
from ldm.diffusion.schedule import CLEAN

SCHEDULE = NoiseSchedule(ScheduleConfig())
STEPS = 10


def final(steps):
    *_, last = steps
    return last.x


@pytest.fixture
def predict(tiny_unet, golden):
    """(x, timestep) → eps of the tiny model for one prompt."""
    context = golden["sample.cond"]
    return lambda x, t: tiny_unet(x, torch.full((len(x),), float(t)), context.expand(len(x), -1, -1))


@pytest.fixture
def ours(predict):
    return denoiser(lambda x, level: predict(x, level.t), "epsilon")


@pytest.fixture
def theirs(predict):
    """The same in k-diffusion's coordinates, with its own table of sigmas and its own interpolation of timesteps."""

    class Denoiser(k_external.DiscreteEpsDDPMDenoiser):
        def get_eps(self, x, t):
            return predict(x, t[0])

    return Denoiser(torch.nn.Identity(), SCHEDULE.alphas_cumprod.float(), quantize=False)


@pytest.fixture
def start(golden):
    return golden["sample.xT"]


class Draws:
    """The same sequence of noise for whoever asks."""

    def __init__(self, like):
        self.like, self.generator = like, torch.Generator().manual_seed(5)

    def __call__(self, *interval):
        return torch.randn(self.like.shape, generator=self.generator)


# --- against k-diffusion ----------------------------------------------------------------------------------------------

K_DIFFUSION = {
    "euler": "sample_euler",
    "euler_a": "sample_euler_ancestral",
    "heun": "sample_heun",
    "lms": "sample_lms",
    "dpm_2": "sample_dpm_2",
    "dpm_2_a": "sample_dpm_2_ancestral",
    "dpmpp_2s_a": "sample_dpmpp_2s_ancestral",
    "dpmpp_2m": "sample_dpmpp_2m",
    "dpmpp_sde": "sample_dpmpp_sde",
    "dpmpp_2m_sde": "sample_dpmpp_2m_sde",
    "dpmpp_2m_sde_heun": "sample_dpmpp_2m_sde",
    "dpmpp_3m_sde": "sample_dpmpp_3m_sde",
}


def k_sigmas(grid, model, steps):
    low, high = model.sigma_min.item(), model.sigma_max.item()
    return {
        "normal": lambda: model.get_sigmas(steps),
        "karras": lambda: k_sampling.get_sigmas_karras(steps, low, high),
        "exponential": lambda: k_sampling.get_sigmas_exponential(steps, low, high),
    }[grid]()


@pytest.mark.parametrize("grid", ["karras", None])
@pytest.mark.parametrize("name", K_DIFFUSION)
def test_equals_k_diffusion(name, grid, ours, theirs, start):
    method = samplers.SAMPLERS[name]
    sigmas = k_sigmas(grid or method.grid, theirs, STEPS + method.skips)
    if method.skips:  # AUTOMATIC1111's way with DPM2: one step more, and the last but one left out
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    sample = getattr(k_sampling, K_DIFFUSION[name])
    options = {"noise_sampler": Draws(start)} if "noise_sampler" in inspect.signature(sample).parameters else {}
    if name == "dpmpp_2m_sde_heun":
        options["solver_type"] = "heun"
    expected = sample(theirs, start * sigmas[0], sigmas, disable=True, **options)
    walk = samplers.sample(name, ours, start, SCHEDULE, steps=STEPS, grid=grid, noise=Draws(start))
    assert_parity(f"{name}, {grid or method.grid}, k-diffusion", final(walk), expected, 1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize("name", ["euler_a", "dpm_2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_eta_equals_k_diffusion(name, eta, ours, theirs, start):
    sigmas = k_sigmas("karras", theirs, 6)
    levels = [SCHEDULE.level_of_ratio(sigma.item()) for sigma in sigmas[:-1]] + [CLEAN]
    sample = getattr(k_sampling, K_DIFFUSION[name])
    expected = sample(theirs, start * sigmas[0], sigmas, disable=True, eta=eta, noise_sampler=Draws(start))
    noise = Draws(start)
    walk = samplers.run(name, ours, levels[0].sigma * start, levels, noise, SCHEDULE, eta=eta)
    assert relative_error(final(walk), expected) < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
@pytest.mark.parametrize("grid", ["normal", "karras", "exponential"])
def test_grids_equal_k_diffusions(grid, steps, theirs):
    levels = grids.visit(SCHEDULE, grid, steps)
    expected = k_sigmas(grid, theirs, steps)[:-1]
    assert relative_error(torch.tensor([level.ratio for level in levels]), expected) < 1e-5
    assert relative_error(torch.tensor([level.t for level in levels]), theirs.sigma_to_t(expected)) < 1e-5


# --- against diffusers ------------------------------------------------------------------------------------------------

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DIFFUSERS = {
    "unipc_bh2": (diffusers.UniPCMultistepScheduler, {"solver_order": 3, "solver_type": "bh2"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 3, "solver_type": "bh1"}),
    "deis": (diffusers.DEISMultistepScheduler, {"solver_order": 3}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"euler_at_final": True}),
}


@pytest.mark.parametrize("karras", [True, False])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_multistep_samplers_equal_diffusers(name, karras, ours, predict, start):
    """On diffusers' own levels, whose timesteps it rounds on a Karras grid; k-diffusion and we do not.

    Its last steps are not compared where they lead nowhere: DEIS has none to a clean image, UniPC with bh1 has NaN.
    """
    kind, options = DIFFUSERS[name]
    scheduler = kind(**CONFIG, **options, use_karras_sigmas=karras)
    scheduler.set_timesteps(20)
    levels = [SCHEDULE.level_of_ratio(sigma.item()) for sigma in scheduler.sigmas[:-1]] + [CLEAN]
    x = levels[0].sigma * start
    theirs = [x]
    for level, t in zip(levels, scheduler.timesteps, strict=False):
        theirs.append(scheduler.step(predict(theirs[-1], level.t), t, theirs[-1]).prev_sample)
    steps = list(samplers.run(name, ours, x, levels, None, SCHEDULE))
    last = -2 if name in ("unipc", "deis") else -1
    assert_parity(f"{name}, {'karras' if karras else 'its own grid'}, diffusers", steps[last].x, theirs[last], 1e-4)


@pytest.mark.parametrize(("name", "eta"), [("lcm", None), ("tcd", 0.3), ("tcd", 0.0), ("tcd", 1.0)])
def test_consistency_samplers_equal_diffusers(name, eta, ours, predict, start, monkeypatch):
    scheduler = {"lcm": diffusers.LCMScheduler, "tcd": diffusers.TCDScheduler}[name](**CONFIG)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [level.t for level in grids.visit(SCHEDULE, "lcm", 4)]
    draws, x = Draws(start), start
    kind = inspect.getmodule(type(scheduler))
    monkeypatch.setattr(kind, "randn_tensor", lambda *args, **kwargs: draws())
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x, **({} if eta is None else {"eta": eta})).prev_sample
    walk = samplers.sample(name, ours, start, SCHEDULE, steps=4, eta=eta, noise=Draws(start))
    assert_parity(f"{name}, eta {eta}, diffusers", final(walk), x, 1e-4)


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 30])
def test_grids_equal_diffusers(steps):
    for spacing, grid in (("leading", "leading"), ("trailing", "trailing")):
        scheduler = diffusers.DDIMScheduler(**CONFIG, timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(steps)
        assert [level.t for level in grids.visit(SCHEDULE, grid, steps)] == scheduler.timesteps.tolist()
    beta = diffusers.EulerDiscreteScheduler(**CONFIG, use_beta_sigmas=True)
    beta.set_timesteps(steps)
    ratios = torch.tensor([level.ratio for level in grids.visit(SCHEDULE, "beta", steps)])
    if steps > 1:  # one of diffusers' is the cleanest, not the noisiest
        assert relative_error(ratios, beta.sigmas[:-1]) < 1e-4


def test_beta_quantiles_equal_scipys():
    ps = np.linspace(0, 1, 101)
    ours = [grids.beta_quantile(p, 0.6) for p in ps]
    assert np.abs(ours - scipy.stats.beta.ppf(ps, 0.6, 0.6)).max() < 1e-5


def test_grids_by_their_formulas():
    ratios = [level.ratio for level in grids.visit(SCHEDULE, "ays", 11)]
    assert ratios == pytest.approx(grids.ALIGN_YOUR_STEPS, rel=1e-12)
    low, high = SCHEDULE.ratios[0], SCHEDULE.ratios[-1]
    ratios = [level.ratio for level in grids.visit(SCHEDULE, "kl_optimal", 5)]
    expected = np.tan(np.linspace(1, 0, 5) * np.arctan(high) + np.linspace(0, 1, 5) * np.arctan(low))
    assert ratios == pytest.approx(expected, rel=1e-12)
    assert [level.t for level in grids.visit(SCHEDULE, "sgm_uniform", 4)] == pytest.approx([999, 749.25, 499.5, 249.75])
    assert [level.t for level in grids.visit(SCHEDULE, "simple", 4)] == [999, 749, 499, 249]


@pytest.mark.parametrize("grid", grids.GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 25, 333])
def test_every_grid_descends_and_stays_inside(grid, steps):
    levels = grids.visit(SCHEDULE, grid, steps)
    assert all(before.ratio >= after.ratio for before, after in pairwise(levels))
    assert all(0 <= level.t <= 999 for level in levels)
    assert all(math.isclose(level.alpha**2 + level.sigma**2, 1) for level in levels)
    assert len(levels) >= steps


# --- against their formulas -------------------------------------------------------------------------------------------


def in_ratios(denoise):
    """A denoiser in k-diffusion's coordinates, y = x / alpha: (y, ratio) → x0 and eps."""

    def predict(y, ratio):
        level = SCHEDULE.level_of_ratio(ratio)
        return denoise(level.alpha * y, level)

    return predict


def test_ipndm_is_adams_bashforth_in_the_ratio(ours, start):
    """Weights of equal steps, as in the paper and in ComfyUI; diffusers' IPNDMScheduler has a schedule of its own."""
    denoise, levels = in_ratios(ours), samplers.levels("ipndm", SCHEDULE, STEPS)
    y, past = levels[0].ratio * start, []
    weights = [[1], [1.5, -0.5], [23 / 12, -4 / 3, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -3 / 8]]
    for level, after in pairwise(levels):
        past = [denoise(y, level.ratio).eps, *past][:4]
        y = y + (after.ratio - level.ratio) * sum(w * eps for w, eps in zip(weights[len(past) - 1], past, strict=True))
    walk = samplers.sample("ipndm", ours, start, SCHEDULE, steps=STEPS, noise=None)
    assert_parity("ipndm, its formula", final(walk), y, 1e-4)


def test_restart_is_heun_with_stretches_run_again(ours, start):
    """The path that AUTOMATIC1111 takes with 25 steps: 16 of them on a Karras grid, then 9 again from ratio 2."""
    plain = k_sampling.get_sigmas_karras(16, *(SCHEDULE.ratios[i] for i in (0, -1))).double()
    bottom, top = (int((plain - ratio).abs().argmin()) for ratio in (0.1, 2.0))
    again = k_sampling.get_sigmas_karras(10, plain[bottom].item(), plain[top].item()).double()[:-1]
    path = [*pairwise(plain[: bottom + 1]), *pairwise(again), *pairwise(plain[bottom:])]
    denoise, draws = in_ratios(ours), Draws(start)
    y, at = plain[0].item() * start, plain[0]
    for level, after in path:
        if level > at:
            y = y + draws() * (level**2 - at**2).sqrt().float()
        eps = denoise(y, level.item()).eps
        trial = y + (after - level).item() * eps
        if after:
            trial = y + (after - level).item() * (eps + denoise(trial, after.item()).eps) / 2
        y, at = trial, after
    steps = list(samplers.sample("restart", ours, start, SCHEDULE, steps=25, noise=Draws(start)))
    assert len(steps) == len(path) == 25
    assert_parity("restart, its formula", steps[-1].x, y, 1e-4)


def test_adams_bashforth_weights_are_those_of_equal_steps():
    levels = [Level.from_ratio(0, ratio) for ratio in (4.0, 5.0, 6.0, 7.0)]
    after = Level.from_ratio(0, 3.0)
    assert multistep.lms_weights(levels, after) == pytest.approx(multistep.ADAMS_BASHFORTH[4])


def exact(mean, std):
    """The optimal denoiser where x0 ~ N(mean, std²), in float64."""

    def denoise(x, level):
        variance = level.alpha**2 * std**2 + level.sigma**2
        x0 = mean + level.alpha * std**2 / variance * (x - level.alpha * mean)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    return denoise


@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("heun", 2), ("dpm_2", 2), ("dpmpp_2m", 2), ("deis", 2), ("unipc", 3), ("unipc_bh2", 3)],
)
def test_order_of_convergence(name, order):
    """On an exact denoiser of a Gaussian the end is known: the error falls with the number of steps to the order.

    The last steps, which are of first order at a clean image, are not looked at. DEIS starts with a step of Euler's,
    whose error is of second order; UniPC-3 corrects its own.
    """
    mean, low, high = 0.5, 0.1, 10.0
    std = torch.tensor([0.05, 0.2, 0.5, 1.5, 3.0], dtype=torch.float64)
    x = torch.tensor([1.3, -0.4, 0.8, 0.1, -2.0], dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160):
        ratios = [high * (low / high) ** (i / steps) for i in range(steps + 4)]
        levels = [SCHEDULE.level_of_ratio(ratio) for ratio in ratios]
        end = list(samplers.run(name, exact(mean, std), x, levels, None, SCHEDULE))[steps - 1].x
        first, last = levels[0], levels[steps]
        deviation = [(level.alpha**2 * std**2 + level.sigma**2).sqrt() for level in (first, last)]
        true = last.alpha * mean + deviation[1] / deviation[0] * (x - first.alpha * mean)
        errors.append((end - true).norm().item())
    measured = [math.log2(before / after) for before, after in pairwise(errors)]
    MEASURED.append(f"order of convergence of {name}: {', '.join(f'{m:.2f}' for m in measured)} (expected {order})")
    assert measured[-1] == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("name", sorted({*samplers.NAMES} - {"lcm", "tcd"}))
def test_every_sampler_draws_from_a_gaussian(name):
    """With an exact denoiser, samples have the mean and deviation of the data.

    Consistency samplers want a model that jumps to a sample, not to the mean of all.
    """
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20_000, generator=g, dtype=torch.float64)  # noqa: E731
    walk = samplers.sample(name, exact(0.5, 0.3), draw(), SCHEDULE, steps=250, noise=draw)
    x = final(walk)
    assert x.mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("name", samplers.NAMES)
def test_every_sampler_bears_pure_noise(name):
    """From a level without signal to a point, the only picture there is."""
    target = torch.tensor([0.3, -0.7], dtype=torch.float64)
    schedule = NoiseSchedule(ScheduleConfig(prediction_type="v_prediction", zero_terminal_snr=True))

    def velocity(x, level):
        return level.alpha * (x - level.alpha * target) / level.sigma - level.sigma * target

    draw = lambda: torch.randn(2, dtype=torch.float64)  # noqa: E731
    walk = samplers.sample(
        name, denoiser(velocity, "v_prediction"), draw(), schedule, steps=30, grid="trailing", noise=draw
    )
    assert all(step.x.isfinite().all() and torch.allclose(step.x0, target, atol=1e-6) for step in walk)


@pytest.mark.parametrize("grid", grids.GRIDS)
@pytest.mark.parametrize("name", samplers.NAMES)
def test_every_sampler_on_every_grid(name, grid):
    """Also where a grid has so many steps that it would visit a level twice, or ends where the sampler does."""
    for steps in (1, 2, 60):
        x = torch.tensor([0.3], dtype=torch.float64)
        walk = samplers.sample(
            name, exact(0.5, 0.3), x, SCHEDULE, steps=steps, grid=grid, noise=lambda: torch.zeros(1).double()
        )
        assert all(step.x.isfinite().all() for step in walk)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M SDE Heun Karras", ("dpmpp_2m_sde_heun", "karras")),
        ("DPM++ SDE", ("dpmpp_sde", None)),
        ("Euler a", ("euler_a", None)),
        ("euler_ancestral", ("euler_a", None)),
        ("EulerAncestralDiscreteScheduler", ("euler_a", None)),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", None)),
        ("DPM2 a Karras", ("dpm_2_a", "karras")),
        ("Heun", ("heun", None)),
        ("LMS Karras", ("lms", "karras")),
        ("dpmpp_2m", ("dpmpp_2m", None)),
        ("dpmpp_2m_karras", ("dpmpp_2m", "karras")),
        ("uni_pc", ("unipc", None)),
        ("DDIMScheduler", ("ddim", None)),
        ("Euler Align Your Steps", ("euler", "ays")),
        ("Euler SGM Uniform", ("euler", "sgm_uniform")),
        ("k_euler_a", ("euler_a", None)),
        ("k_dpmpp_2m", ("dpmpp_2m", None)),
    ],
)
def test_names_of_other_programs(spelling, expected):
    assert samplers.find(spelling) == expected


def test_names_are_unambiguous():
    for name, row in samplers.SAMPLERS.items():
        for spelling in (name, row.label, *row.others):
            assert samplers.find(spelling) == (name, None)
    with pytest.raises(ValueError, match="sampler is 'Karras': use one of ddim"):
        samplers.find("Karras")
    with pytest.raises(ValueError, match=r"restart; nearest is dpmpp_2m$"):
        samplers.find("DPM++ 2N")
    assert [grids.find_grid(name) for name in ("SGM Uniform", "align your steps", "Karras", "automatic")] == [
        "sgm_uniform", "ays", "karras", None,
    ]  # fmt: skip
