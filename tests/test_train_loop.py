"""The loop: what is averaged, scheduled, recorded, saved; a run that is killed; one that is over two processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_runs import DIFFUSION, VAE, losses, read

from ldm import StableDiffusion
from ldm.checkpoint import load_vae
from ldm.errors import CheckpointError, ImageError, LdmError, NumericalError, RequestError
from ldm.models.vae import DiagonalGaussian
from ldm.train.config import Optimizer, to_toml
from ldm.train.diffusion import DiffusionTask
from ldm.train.ema import EMA
from ldm.train.feed import Feed, generator
from ldm.train.loop import Run, learning_rate
from ldm.train.start import run


@pytest.fixture(autouse=True)
def gradients(no_grad):
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    with torch.enable_grad():
        return run(read(tmp_path_factory.mktemp("vae"), VAE))


def test_learning_rate():
    cosine = Optimizer(learning_rate=2.0, decay="cosine", warmup=4)
    assert learning_rate(cosine, 0, 100) == pytest.approx(2 / 5)
    assert learning_rate(cosine, 50, 100) == pytest.approx(1.0)
    assert learning_rate(cosine, 99, 100) == pytest.approx(1 + math.cos(math.pi * 0.99))
    assert learning_rate(Optimizer(learning_rate=2.0), 99, 100) == 2


def test_average_is_the_recurrence():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = EMA({"p": parameter}, 0.6)
    expected = parameter.detach().double()
    for update in range(1, 21):  # as the reference counts them
        parameter.data += update - 1
        ema.update({"p": parameter}, update - 1)
        decay = min(0.6, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * parameter.detach().double()
    torch.testing.assert_close(ema.shadow["p"].double(), expected, rtol=1e-6, atol=0)
    before = parameter.detach().clone()
    with ema.applied({"p": parameter}):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(parameter, before)


def test_kl_and_its_gradient_against_float64():
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 2, 4, 3, 3).unbind(0)
    tensors = [t.clone().requires_grad_() for t in (mean, logvar)]
    DiagonalGaussian(*tensors).kl().sum().backward()
    distribution = torch.distributions.Normal(mean.double(), (logvar.double() / 2).exp())
    kl = torch.distributions.kl_divergence(distribution, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl().double(), kl, rtol=1e-5, atol=0)
    torch.testing.assert_close(tensors[0].grad.double(), mean.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tensors[1].grad.double(), 0.5 * (logvar.double().exp() - 1), rtol=1e-4, atol=1e-6)


def test_gradient_of_the_reconstruction_against_float64(vae):
    """The whole loss of the autoencoder, differentiated in float32, against itself in float64."""
    torch.manual_seed(0)
    image, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 4, 4)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        network = load_vae(vae).to(dtype).train()
        posterior = network.encode(image.to(dtype))
        error = network.decode(posterior.at(noise.to(dtype))) - image.to(dtype)
        (error.square().mean() + 1e-4 * posterior.kl().mean()).backward()
        gradients.append(torch.cat([p.grad.double().flatten() for p in network.parameters()]))
    assert ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item() <= 1e-4


def test_a_feed_is_the_same_over_processes_and_micro_batches():
    class Numbers:
        def __getitem__(self, step: int) -> list[int]:
            return list(range(8 * step, 8 * step + 8))

    def prepare(number, chance):
        return {"number": torch.tensor(number), "noise": torch.randn(3, generator=chance)}

    def whole(**settings) -> dict[str, torch.Tensor]:
        parts = [
            batch
            for process in range(settings.get("processes", 1))
            for batch in Feed(Numbers(), prepare, 5, **{**settings, "process": process})[3]
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    expected = whole()
    assert expected["number"].tolist() == list(range(24, 32))
    for settings in ({"processes": 2}, {"micro_batch": 2}, {"processes": 2, "micro_batch": 1}):
        assert all(torch.equal(value, expected[name]) for name, value in whole(**settings).items())
    assert not torch.equal(generator(5, 3, 0).get_state(), generator(5, 3, 1).get_state())


def test_steps_are_made_ahead_in_order_and_their_errors_arrive():
    class Numbers:
        def __getitem__(self, step: int) -> list[int]:
            return [step, step + 1]

    def prepare(number, chance):
        if number == 9:
            raise ImageError("broken")
        return {"number": torch.tensor(number), "noise": torch.randn(3, generator=chance)}

    feed = Feed(Numbers(), prepare, 5)
    plain = list(feed.steps(1, 7, 0))
    assert [batch["number"].tolist() for [batch] in plain] == [[step, step + 1] for step in range(1, 7)]
    for workers in (1, 3):
        for [batch], [expected] in zip(feed.steps(1, 7, workers), plain, strict=True):
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
        with pytest.raises(ImageError, match="broken"):
            list(feed.steps(6, 12, workers))


def test_a_full_disk_is_told_in_a_line(vae, tmp_path, monkeypatch):
    """As torch.save tells it: a RuntimeError of its writer of archives."""

    def full(content, path):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LdmError, match=r"state\.pt: cannot be written; is there room on the disk\?") as caught:
        run(read(tmp_path, DIFFUSION, f"diffusion.vae={vae}", "loop.steps=1"))
    assert "\n" not in str(caught.value)


def test_what_a_run_leaves(vae, tmp_path):
    target = run(read(tmp_path, DIFFUSION, f"diffusion.vae={vae}"))
    folder = target.parent
    there = {path.name for path in folder.iterdir()}
    assert there >= {"config.toml", "run.json", "metrics.jsonl", "curves.png", "state.pt", "samples", "model"}
    assert len(losses(folder)) == 8
    sd = StableDiffusion.load(target, device="cpu", dtype="float32")
    assert sd.config.text.vocab_size == 600 and (sd.config.image_size, sd.config.cfg_scale) == (32, 3)
    assert sd.txt2img("a red circle", steps=2)[0].size == (32, 32)


def test_micro_batches_give_the_same_weights(vae, tmp_path):
    changes = (f"diffusion.vae={vae}", "loop.steps=3", "loop.sample_every=9", "output=m.safetensors")
    whole, parts = (
        load(run(read(tmp_path, DIFFUSION, *changes, f"folder={name}", *more)))
        for name, more in (("whole", ()), ("parts", ("loop.micro_batch=1",)))
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-3)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def command(config: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "ldm", "train", str(config), *flags]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("kind", ["vae", "diffusion"])
def test_killed_and_resumed(kind, vae, tmp_path):
    """kill -9 between saves; what the resumed run ends with is what an undisturbed one does, to the bit."""
    text = {"vae": VAE, "diffusion": DIFFUSION}[kind]
    changes = ("loop.steps=14", "loop.save_every=4", "loop.sample_every=99", "output=result.safetensors")
    changes += (f"diffusion.vae={vae}",) if kind == "diffusion" else ("vae.adversarial=0.1", "vae.adversarial_start=3")
    undisturbed, killed = (read(tmp_path, text, *changes, f"folder={name}") for name in ("undisturbed", "killed"))
    paths = {}
    for name, config in (("undisturbed", undisturbed), ("killed", killed)):
        paths[name] = tmp_path / f"{name}.toml"
        paths[name].write_text(to_toml(config), encoding="utf-8")
    subprocess.run(command(paths["undisturbed"]), check=True, env=ENVIRONMENT, capture_output=True)

    process = subprocess.Popen(command(paths["killed"]), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    state = tmp_path / "killed" / "state.pt"
    while not state.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    subprocess.run(command(paths["killed"], "--resume"), check=True, env=ENVIRONMENT, capture_output=True)

    first, second = (load(tmp_path / name / "result.safetensors") for name in ("undisturbed", "killed"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert losses(tmp_path / "undisturbed") == losses(tmp_path / "killed")


def test_two_processes_are_one(vae, tmp_path):
    """The same global batch over two processes (gloo), in micro-batches: the same losses, nearly the same weights."""
    changes = (f"diffusion.vae={vae}", "loop.steps=5", "loop.micro_batch=1", "loop.sample_every=9")
    changes += ("output=result.safetensors",)
    one, two = (read(tmp_path, DIFFUSION, *changes, f"folder={name}") for name in ("one", "two"))
    run(one)
    path = tmp_path / "two.toml"
    path.write_text(to_toml(two), encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "--module", "ldm"]
    subprocess.run([*launch, "train", str(path)], check=True, env=ENVIRONMENT, capture_output=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    first, second = (load(tmp_path / name / "result.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-3)


def test_a_folder_holds_one_run(tmp_path):
    with pytest.raises(RequestError, match="no such folder"):  # which is not yet a run
        run(read(tmp_path, VAE, "loop.steps=1", "data.source=absent", "data.count="))
    run(read(tmp_path, VAE, "loop.steps=1"))
    with pytest.raises(RequestError, match="holds a run already"):
        run(read(tmp_path, VAE, "loop.steps=1"))


def test_a_new_run_writes_over_nothing(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    for name in ("vae.safetensors", "metrics.jsonl", "curves.png"):
        (folder / name).write_bytes(b"precious")
        for resume in (False, True):
            with pytest.raises(RequestError, match=rf"vae/{name} is there already, and would be written over"):
                run(read(tmp_path, VAE, "loop.steps=1"), resume=resume)
        assert (folder / name).read_bytes() == b"precious"
        (folder / name).unlink()
    (tmp_path / "pictures").mkdir()
    with pytest.raises(RequestError, match=r"pictures/run, in data\.source: its samples would be learned from"):
        run(read(tmp_path, VAE, f"data.source={tmp_path / 'pictures'}", "data.count=", "folder=pictures/run"))


def test_a_finished_run_gives_its_result_again(tmp_path):
    changes = ("loop.steps=2", "loop.keep=true")
    whole = load(run(read(tmp_path, VAE, *changes)))
    (tmp_path / "vae" / "vae.safetensors").unlink()
    for name in ("vae.safetensors", "other.safetensors"):
        again = run(read(tmp_path, VAE, *changes, f"output={name}"), resume=True)
        assert again.name == name
        assert all(torch.equal(tensor, whole[key]) for key, tensor in load(again).items())
    assert (tmp_path / "vae" / "curves.png").is_file()
    config = (tmp_path / "vae" / "config.toml").read_bytes()
    with pytest.raises(RequestError, match=r"loop\.steps is 1, and the run in .*vae has done 2: use 2 or more"):
        run(read(tmp_path, VAE, "loop.steps=1"), resume=True)
    assert (tmp_path / "vae" / "config.toml").read_bytes() == config


def test_a_run_that_ends_at_a_save_draws_its_samples(tmp_path, monkeypatch):
    """Whatever comes at a step comes before the state that says the step is done."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(read(tmp_path, VAE, "loop.steps=1"))
    names = {"samples/samples-0000000.png", "samples/samples-0000001.png", "vae.safetensors"}
    assert all((tmp_path / "vae" / name).is_file() for name in names)
    assert not (tmp_path / "vae" / "state.pt").exists()


def test_a_run_that_fails_at_its_first_samples_is_none_yet(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "look", lambda *args: (_ for _ in ()).throw(RequestError("no such LoRA")))
        with pytest.raises(RequestError, match="no such LoRA"):
            run(read(tmp_path, VAE, "loop.steps=1"))
    assert run(read(tmp_path, VAE, "loop.steps=1")).is_file()


def test_cpus_do_not_train_in_float16(tmp_path):
    with pytest.raises(RequestError, match=r"'float16', in which CPUs do not train: use bfloat16 or float32"):
        run(read(tmp_path, VAE, "loop.precision=float16"))


def test_going_on_with_other_settings(tmp_path, caplog):
    """They are told by their whole names, take effect, and are not written where the run does not go on."""
    changes = ("loop.save_every=2", "loop.sample_every=9", "optimizer.weight_decay=0.5")
    run(read(tmp_path, VAE, *changes, "loop.steps=2"))
    config = (tmp_path / "vae" / "config.toml").read_bytes()
    with pytest.raises(CheckpointError, match=r"it has no averages: leave out loop\.ema_decay"):
        run(read(tmp_path, VAE, *changes, "loop.steps=4", "loop.ema_decay=0.9"), resume=True)
    assert (tmp_path / "vae" / "config.toml").read_bytes() == config
    with caplog.at_level("WARNING"):
        run(read(tmp_path, VAE, *changes[:2], "loop.steps=4", "seed=5", "optimizer.weight_decay=0.25"), resume=True)
    assert "loop.steps 2 → 4; optimizer.weight_decay 0.5 → 0.25; seed 0 → 5" in caplog.text
    state = torch.load(tmp_path / "vae" / "state.pt", weights_only=True)
    decays = {value for name, value in state["optimizers"]["network"].items() if name.endswith("weight_decay")}
    groups = state["optimizers"]["network"].get("param_groups", [])
    assert decays | {group["weight_decay"] for group in groups} == {0.25}


def test_saving_takes_no_step(tmp_path):
    """That of an optimizer whose turn has not come leaves it as it is."""
    changes = ("loop.steps=4", "loop.sample_every=9", "vae.adversarial=0.5", "vae.adversarial_start=2")
    often, seldom = (
        load(run(read(tmp_path, VAE, *changes, f"loop.save_every={every}", f"folder=by-{every}"))) for every in (1, 4)
    )
    assert all(torch.equal(often[name], tensor) for name, tensor in seldom.items())


def test_a_state_of_another_run(tmp_path):
    run(read(tmp_path, VAE, "loop.steps=1"))
    with pytest.raises(CheckpointError, match="not the state of this run"):
        run(read(tmp_path, VAE, "loop.steps=2", "networks.vae.channels=16"), resume=True)
    (tmp_path / "vae" / "state.pt").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="not the state of this run"):
        run(read(tmp_path, VAE, "loop.steps=2"), resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(NumericalError, match="lower optimizer"):
        run(read(tmp_path, VAE, "optimizer.learning_rate=1e30", "optimizer.clip=0"))


def test_processes_share_a_batch(tmp_path):
    with pytest.raises(RequestError, match=r"use a multiple of 1 processes times loop\.micro_batch, 3"):
        run(read(tmp_path, VAE, "loop.micro_batch=3"))


def test_what_a_killed_process_left_is_removed(tmp_path):
    folder = tmp_path / "vae"
    (folder / ".vae.safetensors.x1.part").mkdir(parents=True)
    (folder / "samples").mkdir()
    left = (".state.pt.x2.part", ".vae-0000004.safetensors.x3.part", "samples/.samples-0000004.png.x4.part")
    for name in (*left, ".notes.part"):
        (folder / name).touch()
    run(read(tmp_path, VAE, "loop.steps=1"))
    assert [path.name for path in folder.rglob("*.part")] == [".notes.part"]


def test_nothing_to_resume_is_told(tmp_path, caplog):
    run(read(tmp_path, VAE, "loop.steps=1"), resume=True)
    assert "vae has no state.pt: there is nothing to go on with, so this begins at step 0" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        NumericalError("the latents are not finite"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(28, "No space left on device"),
    ],
)
def test_samples_that_cannot_be_drawn_end_no_run(vae, tmp_path, monkeypatch, caplog, error):
    def fail(task):
        raise error

    monkeypatch.setattr(DiffusionTask, "pictures", fail)
    assert run(read(tmp_path, DIFFUSION, f"diffusion.vae={vae}", "loop.steps=1", "loop.sample_every=1")).is_dir()
    assert f"step 1: no samples: {error}" in caplog.text


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    config = read(
        tmp_path,
        VAE,
        "loop.steps=4",
        "loop.save_every=2",
        "loop.log_every=4",
        "optimizer.learning_rate=1e30",
        "optimizer.clip=0",
    )
    with pytest.raises(NumericalError, match=r"step 2: vae\.\S+: not finite; lower optimizer.learning_rate"):
        run(config)
    assert not list((tmp_path / "vae").glob("*.safetensors"))
