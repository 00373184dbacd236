"""The config of a run: what is read, what is refused, and that it comes back from what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.errors import RequestError
from ldm.train.config import TrainConfig, read_train_config, to_toml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
SMALLEST = 'task = "vae"\nfolder = "run"\n[data]\nsource = "shapes"\ncount = 8\n[loop]\nsteps = 2\n'


def read(tmp_path: Path, text: str, *changes: str) -> TrainConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return read_train_config(path, changes)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configs_are_read_and_come_back(path, tmp_path):
    config = read_train_config(path)
    assert read(tmp_path, to_toml(config)) == config


def test_changes_win(tmp_path):
    config = read(
        tmp_path, SMALLEST, "loop.steps=7", "optimizer.learning_rate=1", "folder=other", "networks.vae.channels=64",
        "optimizer.betas=[0.5, 1e-1]", "output=a photo.safetensors",
    )  # fmt: skip
    assert (config.loop.steps, config.optimizer.learning_rate, config.folder) == (7, 1.0, "other")
    assert type(config.optimizer.learning_rate) is float
    assert (config.networks.vae.channels, config.optimizer.betas, config.output) == (
        64,
        (0.5, 0.1),
        "a photo.safetensors",
    )


def test_a_change_to_nothing_is_the_default(tmp_path):
    config = read(tmp_path, SMALLEST + "ema_decay = 0.5\n[vae]\nl1 = 3\n", "loop.ema_decay=", "vae={}", "seed= ")
    assert config == read(tmp_path, SMALLEST)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("data.crop=8", "data.crop"),
        ("vae.l2=1", "vae"),
        ("lora.rank=2", "lora"),
        ("networks.image_size=8", "networks"),
        ("output_dtype=float16", "output_dtype"),
        ("diffusion.train_text=true", "diffusion.train_text"),
        ("diffusion.vae=x", "diffusion.vae"),
    ],
)
def test_what_another_kind_of_run_would_use_is_refused(change, named, tmp_path):
    sections = '[diffusion]\nmethod = "textual_inversion"\n[inversion]\ntoken = "x"\n'
    text = SMALLEST.replace("vae", "diffusion") + sections
    assert read(tmp_path, text, "model=m").inversion.token == "x"
    with pytest.raises(RequestError, match=f": {named} is for .*: leave it out"):
        read(tmp_path, text, "model=m", change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("loop.step=7", "unknown key 'step'; known are steps"),
        ("loop.steps=many", "steps is 'many': use int"),
        ("loop.steps=0", "steps is 0: use 1 or more"),
        ("loop.steps=1.5", "steps is 1.5: use int"),
        ("loop.ema_decay=1", "ema_decay is 1.0: use 0 to below 1"),
        ("loop=3", "loop is 3: use a section"),
        ("task=gan", "task is 'gan': use one of vae, diffusion"),
        ("task.x=1", "task is no section"),
        ("loop.precision=int8", "precision is 'int8': use one of float32, bfloat16, float16"),
        ("optimizer.betas=[0.9]", "betas is (0.9,): use two numbers"),
        ("optimizer.learning_rate=nan", "learning_rate is nan: use 0 or more"),
        ("diffusion.method=lora", "diffusion is for task 'diffusion': leave it out"),
        ("networks.unet.heads=7", "heads is 7, which does not divide"),
        ("folder", "use key=value"),
        ("diffusion.min_snr=5", "diffusion is for task 'diffusion': leave it out"),
        ("data.buckets=true", "data.buckets is for task 'diffusion': leave it out"),
        ("data.caption=a photo", "data.caption is for task 'diffusion': leave it out"),
        ("samples.steps=3", "samples is for task 'diffusion': leave it out"),
        ("vae.decoder_only=true", "vae.decoder_only needs an encoder"),
        ("lora.rank=4", "lora is for diffusion.method 'lora': leave it out"),
    ],
)
def test_faults_are_told_in_a_line(tmp_path, change, told):
    with pytest.raises(RequestError) as caught:
        read(tmp_path, SMALLEST, change)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "task = ", 'task = "vae"', SMALLEST.replace("source", "sauce"), "\x00", SMALLEST + "[x]\n"]
)
def test_what_is_no_config(tmp_path, text):
    with pytest.raises(RequestError, match=r"run\.toml"):
        read(tmp_path, text)


def test_no_file(tmp_path):
    with pytest.raises(RequestError, match="no such config"):
        read_train_config(tmp_path / "absent.toml")


@given(st.text(), st.text())
def test_any_change_is_applied_or_refused(key, value):
    path = CONFIGS[0]
    try:
        read_train_config(path, [f"{key}={value}"])
    except RequestError as error:
        assert "\n" not in str(error)
