"""The config of a run: what is read, what is refused, and that it comes back from what is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.errors import RequestError
from ldm.files import staged_file
from ldm.train.config import MAX_OUTPUT_BYTES, MAX_SEED, TrainConfig, read_train_config, to_toml

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
        ("data.caption=a photo", "data.caption is for task 'diffusion' with pictures from disk: leave it out"),
        ("samples.steps=3", "samples is for task 'diffusion': leave it out"),
        ("vae.decoder_only=true", "vae.decoder_only needs an encoder"),
        ("lora.rank=4", "lora is for diffusion.method 'lora': leave it out"),
        ("vae.adversarial_start=3", "vae.adversarial_start is for vae.adversarial, which is 0: leave it out"),
        ("networks.unet.in_channels=5", "networks.unet.in_channels is for task 'diffusion': leave it out"),
        *(
            (f"networks.vae.in_channels={count}", f"in_channels is {count}: use {least}")
            for count, least in {1: "3, as", 0: "1 or more", 4: "3, as"}.items()
        ),
        ("networks.vae.latent_channels=0", "latent_channels is 0: use 1 or more"),
        (f"optimizer.learning_rate=1{'0' * 400}", "learning_rate is a number of 1329 bits: use at most 128"),
        (f"task=0x{'f' * 5000}", "task is a number of 20000 bits"),
        (f"optimizer.betas=[0x{'f' * 5000}]", "betas: 0 is a number of 20000 bits"),
        (f"seed=1{'0' * 5000}", "seed is '1000"),
        (f"x={'[' * 20_000}{']' * 20_000}", "unknown key 'x'"),
        (f"optimizer.betas={'[' * 100}{']' * 100}", "is nested too deeply"),
        (f"loop.micro_batch{'.a' * 5000}=1", "is nested too deeply"),
        ("loop.steps=5\nfoo=1", "use one key=value, and another --set for another"),
        ("loop.steps=5\n[foo]", "use one key=value, and another --set for another"),
        *(
            (f"{name}={value}", f"{name.split('.')[-1]} is '{told}': use UTF-8, without NUL characters")
            for name in ("folder", "output", "model", "data.source")
            for value, told in {'"a\\u0000b"': r"a\x00b", "pictures-\udcff": r"pictures-\udcff"}.items()
        ),
        (f"output={'a' * 189}.safetensors", "…: use a name of at most 200 bytes"),
        (f"output={'🌙' * 48}.safetensors", "…: use a name of at most 200 bytes"),
    ],
    ids=lambda value: f"{value:.40}",
)
def test_faults_are_told_in_a_line(tmp_path, change, told):
    with pytest.raises(RequestError) as caught:
        read(tmp_path, SMALLEST, change)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "task = ",
        'task = "vae"',
        SMALLEST.replace("source", "sauce"),
        "\x00",
        SMALLEST + "[x]\n",
        f"seed = 1{'0' * 5000}\n" + SMALLEST,
        f"x = {'[' * 5000}{']' * 5000}\n" + SMALLEST,
        SMALLEST + f"[optimizer]\nlearning_rate = 1{'0' * 400}",
    ],
    ids=range(9),
)
def test_what_is_no_config(tmp_path, text):
    with pytest.raises(RequestError, match=r"run\.toml"):
        read(tmp_path, text)


NEW = """
task = "diffusion"
folder = "run"
[networks]
image_size = 64
[data]
source = "shapes"
count = 8
side = 64
[loop]
steps = 2
"""
TUNED = NEW.replace("[networks]\nimage_size = 64", "").replace('folder = "run"', 'folder = "run"\nmodel = "m"')
PICTURES = TUNED.replace('"shapes"\ncount = 8', '"pictures"')


@pytest.mark.parametrize(
    ("text", "change", "told"),
    [
        (NEW, "networks.unet.in_channels=5", "networks.unet.in_channels is 5: use 4 without diffusion.inpaint"),
        (NEW, "networks.unet.in_channels=9", "networks.unet.in_channels is 9: use 4 without diffusion.inpaint"),
        (NEW + "[diffusion]\ninpaint=true", "networks.unet.in_channels=8", "in_channels is 8: use 4 or 9 with"),
        (NEW, "networks.unet.in_channels=0", "in_channels is 0: use 1 or more"),
        (NEW, "networks.unet.out_channels=0", "out_channels is 0: use 1 or more"),
        (NEW, "networks.unet.context_dim=0", "context_dim is 0: use 1 or more"),
        (NEW, "networks.unet.attention_levels=[9]", "the U-Net has 4 levels, from 0, and none that is 9"),
        (NEW, "networks.unet.attention_levels=[0, -1]", "the U-Net has 4 levels, from 0, and none that is -1"),
        (NEW, "networks.text.activation=foo", "activation is 'foo': use one of quick_gelu, gelu"),
        *(
            (NEW, f"networks.text.max_length={length}", f"max_length is {length}: use 3 or more")
            for length in (-1, 0, 1, 2)
        ),
        *(
            (NEW, f"networks.text.{name}={value}", f"{name} is {value}: use 1 or more")
            for name in ("vocab_size", "layers", "mlp_width")
            for value in (0, -4)
        ),
        (NEW, "data.caption=a shape", "data.caption is for task 'diffusion' with pictures from disk: leave it out"),
        (PICTURES, "data.seed=1", "data.seed is for data.source 'shapes': leave it out"),
        (TUNED, "data.kinds=['two', 'four']", "data: kinds is 'four': use one of one, two, inside, count, three"),
        (PICTURES, "data.kinds=['two']", "data.kinds is for data.source 'shapes': leave it out"),
        *(
            (text, f"data.side={side}", f"width is {side}: use ")
            for text in (TUNED, PICTURES + "[diffusion]\nmethod='lora'")
            for side in (4, 63)
        ),
        (TUNED, "prior.count=100", "prior: prompts is missing"),
        (TUNED + "[prior]\nweight = 1.0", "seed=1", "prior: prompts is missing"),
        (TUNED + "[prior]\nprompts = []", "prior.count=9", "prior.count is for prior.prompts, and there are none: "),
        (TUNED + "[prior]\nprompts = []", "prior.weight=9", "prior.weight is for prior.prompts, and there are none: "),
        (TUNED, 'prior.prompts=["a dog", " "]', "prior: one of prompts is empty"),
        (TUNED + "[prior]\nprompts = ['a']", "samples.seed=1", "samples.seed is for samples.prompts, and there"),
        (TUNED, "samples.seed=1", "samples.seed is for samples.prompts, and there are none: leave it out"),
        (TUNED, "samples.steps=9", "samples.steps is for samples.prompts or prior.prompts, and there are none: "),
        (TUNED, "samples.cfg_scale=9", "samples.cfg_scale is for samples.prompts or prior.prompts, and there are "),
    ],
)
def test_faults_of_diffusion_are_told_in_a_line(text, change, told, tmp_path):
    read(tmp_path, text.partition("[prior]")[0])  # which is none of them
    with pytest.raises(RequestError, match=re.escape(told)) as caught:
        read(tmp_path, text, change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        (NEW + "[diffusion]\ninpaint = true", "networks.unet.in_channels=9"),
        (NEW, "networks.text.max_length=3"),
        (NEW, "networks.text.activation=gelu"),
        (PICTURES, "data.caption=a photo"),
        (TUNED, "data.seed=1"),
        (TUNED, 'prior.prompts=["a dog"]'),
        (TUNED + "[prior]\nprompts = ['a dog']\ncount = 9", "samples.steps=9"),
        (TUNED + "[prior]\nprompts = ['a dog']\ncount = 9", "prior={}"),
        (TUNED, 'samples={prompts=[""], seed=3}'),
        (SMALLEST, "vae={adversarial=0.1, adversarial_start=3}"),
        (SMALLEST, f"output={'a' * 188}.safetensors"),
        (SMALLEST, "output=🌙.safetensors"),
        (SMALLEST, f"seed={2**63 - 1}"),
    ],
)
def test_what_is_of_use_comes_back(text, change, tmp_path):
    config = read(tmp_path, text, change)
    assert read(tmp_path, to_toml(config)) == config


@pytest.mark.parametrize("text", ["a", "🌙"])
def test_the_longest_name_of_a_result_has_room_for_what_a_run_adds(text, tmp_path):
    stem = text * ((MAX_OUTPUT_BYTES - len(".safetensors")) // len(text.encode()))
    output = read(tmp_path, SMALLEST, f"output={stem}.safetensors").output
    target = (tmp_path / output).with_stem(f"{stem}-{MAX_SEED}")  # kept, at a step that no run comes to
    with staged_file(target) as temporary:
        temporary.write_text("kept")
    assert target.read_text() == "kept"


def test_buckets_have_an_area_of_any_side(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(PICTURES)
    assert read_train_config(path, ["data.side=500", "data.buckets=true"]).data.side == 500


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
