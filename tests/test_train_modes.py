"""Every way to train, on a model of a few thousand weights: what it optimises falls, and what it writes is read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_runs import DIFFUSION, TUNE, TUNE_VAE, VAE, losses, make_model, read

from ldm import StableDiffusion
from ldm.checkpoint import load_text, load_unet, load_vae
from ldm.diffusion import NoiseSchedule
from ldm.diffusion.loss import diffusion_loss, min_snr_weights
from ldm.diffusion.prediction import PREDICTION_TYPES
from ldm.errors import CheckpointError, LdmError, RequestError
from ldm.train.cache import encode_captions
from ldm.train.config import TrainConfig
from ldm.train.data import find_whole, open_examples
from ldm.train.feed import Feed, generator
from ldm.train.loop import make_accelerator, train
from ldm.train.masks import random_mask
from ldm.train.prior import Joined
from ldm.train.shapes import draw_scene
from ldm.train.start import TASKS, run


@pytest.fixture(autouse=True)
def gradients(no_grad):
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    with torch.enable_grad():
        return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of eight captioned pictures, half of them wide."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        scene = draw_scene(0, number)
        scene.draw(64).resize((96 if number % 2 else 64, 64)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(scene.caption())
    return folder


def losses_around(config: TrainConfig) -> tuple[float, float, Path]:
    """What a run optimises, on the same draws before and after it; and its result."""
    accelerator = make_accelerator(config)
    Path(config.folder).mkdir()
    data = config.data
    examples = open_examples(data.source, seed=data.seed, count=data.count, side=data.side, caption=data.caption)
    task, batches = TASKS[config.task](config, examples, accelerator)
    feed = Feed(batches, task.prepare, config.seed)
    fixed = [batch for step in range(16) for batch in feed[step]]
    turn = task.turns[0]

    @torch.no_grad()
    def loss() -> float:
        with accelerator.autocast():
            return float(np.mean([task(batch, 0, turn)["loss"].item() for batch in fixed]))

    before = loss()
    target = train(config, task, batches, accelerator, resume=False)
    return before, loss(), target


LONG = ("loop.steps=40", "loop.sample_every=40", "loop.save_every=40", "optimizer.learning_rate=1e-2")


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("vae.l1=0", "vae.perceptual=1", "vae.adversarial=0.5", "vae.adversarial_start=20"),
        ("loop.gradient_checkpointing=true", "loop.precision=bfloat16", "data.crop=16", "data.flip=true"),
    ],
    ids=["plain", "perceptual and adversarial", "checkpointed, bfloat16, crops"],
)
def test_vae(changes, tmp_path):
    before, after, target = losses_around(read(tmp_path, VAE, *LONG[:3], *changes))
    assert after < 0.9 * before
    vae = load_vae(target)
    with torch.no_grad():
        pictures = [torch.from_numpy(np.array(draw_scene(0, i).draw(32))).permute(2, 0, 1) for i in range(64)]
        latents = vae.encode(torch.stack(pictures) / 127.5 - 1).mean * vae.config.scale_factor
    assert latents.std().item() == pytest.approx(1, abs=0.02)


def test_a_decoder_alone(model, tmp_path):
    before, after, target = losses_around(
        read(tmp_path, TUNE_VAE, f"model={model}", "loop.steps=120", *LONG[1:3], "vae.decoder_only=true")
    )
    assert after < 0.98 * before
    old, new = (load_vae(path).state_dict() for path in (model, target))
    kept = {name for name, tensor in old.items() if torch.equal(new[name], tensor)}
    assert kept == {name for name in old if name.startswith(("encoder.", "quant_conv."))}
    assert load_vae(model).config == load_vae(target).config


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("networks.schedule.prediction_type=v_prediction", "networks.schedule.zero_terminal_snr=true"),
        ("networks.schedule.prediction_type=sample", "networks.schedule.beta_schedule=cosine", "diffusion.cache=false"),
        ("networks.schedule.beta_schedule=linear", "diffusion.min_snr=5", "diffusion.offset_noise=0.1"),
        ("loop.gradient_checkpointing=true", "loop.precision=bfloat16", "diffusion.train_text=false"),
    ],
    ids=["epsilon", "v, zero terminal SNR", "x0, cosine", "linear, min-SNR, offset noise", "checkpointed, bfloat16"],
)
def test_from_nothing(changes, model, tmp_path):
    before, after, target = losses_around(read(tmp_path, DIFFUSION, f"diffusion.vae={model}", *LONG, *changes))
    assert after < 0.95 * before
    sd = StableDiffusion.load(target, device="cpu", dtype="float32")
    assert sd.txt2img("a red circle", steps=2)


UNCACHED = (*LONG, "diffusion.cache=false")
LORA = ("diffusion.method=lora", "output=new.safetensors", "loop.steps=120", "optimizer.learning_rate=5e-3")
INVERSION = (
    "diffusion.method=textual_inversion",
    "diffusion.train_text=false",
    "inversion.token=<new>",
    "output=new.safetensors",
)


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        (("optimizer.learning_rate=3e-3",), 0.02),
        (("diffusion.prediction_type=v_prediction", "diffusion.zero_terminal_snr=true"), 0.02),
        ((*LORA, "diffusion.train_text=false"), 0.003),
        ((*LORA, 'lora.layers="attention+conv"', "lora.layout=peft", "loop.precision=bfloat16"), 0.005),
        ((*LORA, 'prior.prompts=["a circle"]', "prior.count=2", "prior.weight=0.5"), 0.003),
        ((*INVERSION, "inversion.initial=circle", "data.caption=<new>", "optimizer.learning_rate=1e-1"), 1e-4),
        (("diffusion.inpaint=true", "diffusion.cache=true", "optimizer.learning_rate=3e-3"), 0.02),
    ],
    ids=["full", "to v", "LoRA", "LoRA with convolutions, bfloat16", "DreamBooth", "textual inversion", "inpainting"],
)
def test_fine_tuning(changes, least, model, pictures, tmp_path):
    source = pictures
    if "data.caption=<new>" in changes:  # captions that name the word, and nothing else
        source = tmp_path / "bare"
        source.mkdir()
        for path in pictures.glob("*.png"):
            Image.open(path).save(source / path.name)
    config = read(
        tmp_path, TUNE.replace("count = 64", ""), f"model={model}", *UNCACHED, f"data.source={source}", *changes
    )
    before, after, target = losses_around(config)
    assert after < (1 - least) * before
    if "diffusion.method=lora" in changes:
        sd = StableDiffusion.load(model, device="cpu", dtype="float32")
        [plain] = sd.txt2img("a red circle", steps=2, seed=1)
        with sd.load_lora(target):
            assert sd.txt2img("a red circle", steps=2, seed=1)[0].tobytes() != plain.tobytes()
    elif "inversion.token=<new>" in changes:
        sd = StableDiffusion.load(model, device="cpu", dtype="float32")
        with sd.load_embedding(target, "<new>"):
            assert sd.txt2img("<new>", steps=2)
    else:
        sd = StableDiffusion.load(target, device="cpu", dtype="float32")
        assert sd.config.inpaints == ("diffusion.inpaint=true" in changes)
        expected = "v_prediction" if "diffusion.prediction_type=v_prediction" in changes else "epsilon"
        assert sd.config.schedule.prediction_type == expected
        assert sd.config.cfg_scale == 3  # the first model's
        grey = Image.new("RGB", (32, 32), "grey")
        assert sd.inpaint("a red circle", grey, Image.new("L", (32, 32), 255), steps=2)


def test_buckets(model, pictures, tmp_path):
    changes = ("data.buckets=true", "data.flip=true", "data.side=64", f"data.source={pictures}")
    config = read(tmp_path, TUNE.replace("count = 64", ""), f"model={model}", *UNCACHED, *changes)
    examples = open_examples(str(pictures))
    task, batches = TASKS["diffusion"](config, examples, make_accelerator(config))
    shapes = {tuple(batch["image"].shape) for step in range(8) for batch in Feed(batches, task.prepare, 0)[step]}
    assert len(shapes) > 1 and all(width * height <= 64 * 64 for _, _, height, width in shapes)
    assert run(config).is_dir()


def test_inpainting_starts_as_the_model_it_is_made_of(model):
    from ldm.train.networks import start_model, widen_for_inpainting

    plain = start_model(model, None, None)
    widened = widen_for_inpainting(plain)
    x, beside, context = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 4, 4), torch.randn(2, 7, 16)
    t = torch.tensor([3, 700])
    torch.testing.assert_close(widened.unet(torch.cat([x, beside], 1), t, context), plain.unet(x, t, context))
    assert widen_for_inpainting(widened) is widened


def test_masks():
    from random import Random

    masks = torch.stack([random_mask((48, 32), Random(i)) for i in range(300)])
    assert masks.shape == (300, 1, 32, 48) and set(masks.unique().tolist()) == {0.0, 1.0}
    whole = masks.flatten(1).all(dim=1).float().mean().item()
    assert 0.05 < whole < 0.2 and 0.2 < masks.mean().item() < 0.7
    assert torch.equal(masks[7], random_mask((48, 32), Random(7)))


@pytest.mark.parametrize("prediction_type", list(PREDICTION_TYPES))
def test_min_snr_is_one_weight_of_the_error_of_x0(prediction_type):
    """Whatever a network predicts, the same error of x0 counts the same: min(SNR, gamma) times its square."""
    from ldm import ScheduleConfig

    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction_type))
    t = torch.tensor([0, 10, 200, 500, 999])
    x0, noise, error = torch.randn(3, 5, 4, 2, 2, dtype=torch.float64).unbind(0)

    def network(x, t):
        outputs = []
        for i, step in enumerate(t.tolist()):
            level = schedule.level(step)
            wrong = x0[i] + error[i]
            eps = (x[i] - level.alpha * wrong) / level.sigma
            v = level.alpha * eps - level.sigma * wrong
            outputs.append({"epsilon": eps, "v_prediction": v, "sample": wrong}[prediction_type])
        return torch.stack(outputs)

    losses = diffusion_loss(network, x0, noise, t, schedule) * min_snr_weights(schedule, t, 5.0)
    alphas_cumprod = schedule.alphas_cumprod[t]
    expected = (alphas_cumprod / (1 - alphas_cumprod)).clamp(max=5) * error.square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("prediction_type", list(PREDICTION_TYPES))
def test_loss_of_a_perfect_network_is_zero(prediction_type):
    from ldm import ScheduleConfig

    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction_type))
    x0, noise = torch.randn(2, 3, 4, 2, 2).unbind(0)
    t = torch.tensor([1, 400, 998])
    perfect = {"epsilon": noise, "v_prediction": schedule.velocity(x0, noise, t), "sample": x0}[prediction_type]
    assert diffusion_loss(lambda x, t: perfect, x0, noise, t, schedule).abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ((), "give a model to start from with model, or the VAE"),
        (("diffusion.vae=absent",), "absent: no such file"),
        (("model=absent",), "absent: no such file"),
        (("model=MODEL", *LORA, "diffusion.inpaint=true"), "has 4 input channels, and learning with diffusion.inpaint"),
        (("model=MODEL", "diffusion.zero_terminal_snr=true"), "zero-terminal SNR needs v_prediction"),
        (
            (
                "model=MODEL",
                "diffusion.prediction_type=v_prediction",
                "diffusion.zero_terminal_snr=true",
                "diffusion.min_snr=5",
            ),
            "diffusion.min_snr gives steps without signal no weight",
        ),
        (("networks.schedule.prediction_type=x",), "prediction_type is 'x': use one of"),
        (("model=MODEL", "networks.image_size=64"), "networks is for new networks, not for a model: leave it out"),
        (("model=MODEL", "diffusion.vae=x"), "diffusion.vae is for new networks, not for a model: leave it out"),
        (("model=MODEL", "diffusion.clip_skip=2"), "diffusion.clip_skip is 2: use 1 to 1"),
        (("model=MODEL", *INVERSION, "output_dtype=float16"), "output_dtype is for the other methods: leave it out"),
        (("model=MODEL", *INVERSION), "no caption has the new word '<new>'"),
        (("output=latents.safetensors",), "output is 'latents.safetensors'"),
        (("output=m.ckpt",), "output is 'm.ckpt': use a name that ends in .safetensors, or without a suffix"),
        (("output=..",), "output is '..'"),
        (("output=''",), "output is ''"),
        (("seed=99999999999999999999",), "seed is 99999999999999999999: use 0 to"),
        (("diffusion.min_snr=0",), "min_snr is 0.0: use more than 0"),
        (("data.flip=true",), "diffusion.cache and data.flip do not go together"),
        (("data.random_crop=true",), "diffusion.cache and data.random_crop do not go together"),
        (("output=samples",), "output is 'samples'"),
        (("output=a/b",), "output is 'a/b'"),
        (("model=MODEL", *LORA, "output=lora.pt"), "output is 'lora.pt': use a name that ends in .safetensors"),
        (("data.side=500", "networks.image_size=500"), "width is 500"),
        (("data.side=64",), "networks.image_size is 32 and data.side 64: use the same"),
        (("networks.vae.channels=64",), "networks.vae is for task 'vae'"),
        (("task=vae", "output=m.safetensors", "diffusion={}", "samples={}"), "networks.text is for task 'diffusion'"),
        (("networks.cfg_scale=0",), "cfg_scale is 0.0: use a positive number up to 1000"),
        (('prior.prompts=["a circle"]',), "prior is for a model, which draws it: leave it out"),
        (("diffusion.prediction_type=sample",), "diffusion.prediction_type is for a model; new networks have"),
        (("diffusion.zero_terminal_snr=true",), "diffusion.zero_terminal_snr is for a model; new networks have"),
        (
            ("model=MODEL", "diffusion.prediction_type=sample", 'prior.prompts=["a"]'),
            "prior.prompts are drawn by the model as it is",
        ),
        (("samples.prompts=a cat",), "prompts is 'a cat': use a list"),
        (("optimizer.clip=-1",), "clip is -1"),
        (("samples.cfg_scale=-1",), "cfg_scale is -1"),
        ((*LORA, "diffusion.train_text=false"), "which changes a model: give one with model"),
    ],
)
def test_faults(changes, told, model, tmp_path):
    text = TUNE if changes and changes[0].startswith("model=") else DIFFUSION
    with pytest.raises(LdmError, match=re.escape(told)) as caught:
        run(read(tmp_path, text, *(change.replace("MODEL", str(model)) for change in changes)))
    assert "\n" not in str(caught.value)


def test_a_discriminator_needs_room(tmp_path):
    with pytest.raises(RequestError, match=r"data.crop or data.side is 16: use 24 or more with vae.adversarial"):
        run(read(tmp_path, VAE, "data.crop=16", "vae.adversarial=1", "vae.adversarial_start=1000"))


def test_an_autoencoder_reads_no_captions(tmp_path):
    source = tmp_path / "bare"
    source.mkdir()
    for number in range(4):
        draw_scene(0, number).draw(32).save(source / f"{number}.png")
    text = VAE.replace('source = "shapes"\ncount = 64', f'source = "{source}"')
    assert load_vae(run(read(tmp_path, text))).config.channels == 8


def test_an_autoencoder_of_other_latents(tmp_path):
    trained = run(read(tmp_path, VAE, "networks.vae.latent_channels=8", "networks.unet.out_channels=8"))
    again = run(read(tmp_path, TUNE_VAE, f"model={trained}", "folder=again"))
    assert load_vae(again).config.latent_channels == 8
    with pytest.raises(
        RequestError, match=r"networks do not fit .*: the U-Net makes 4 latent channels, the VAE reads 8"
    ):
        run(read(tmp_path, DIFFUSION, f"diffusion.vae={again}"))


def test_what_a_save_would_destroy_is_found_first(model, tmp_path):
    config = read(tmp_path, TUNE, f"model={model}")
    (tmp_path / "diffusion" / "model").mkdir(parents=True)
    (tmp_path / "diffusion" / "model" / ".DS_Store").touch()
    notes = tmp_path / "diffusion" / "model" / "notes.txt"
    notes.touch()
    with pytest.raises(RequestError, match="model is there already, and would be written over"):
        run(config)
    assert not (tmp_path / "diffusion" / "metrics.jsonl").exists()
    notes.unlink()
    run(read(tmp_path, TUNE, f"model={model}", "loop.steps=1"))
    notes.touch()
    with pytest.raises(RequestError, match=r"1 files that are no part of a model .*\(notes.txt\)"):
        run(config, resume=True)


def test_pictures_of_an_inpainting_model(model, tmp_path):
    run(read(tmp_path, TUNE, f"model={model}", "diffusion.inpaint=true", "diffusion.cache=false", "loop.steps=1"))
    assert (tmp_path / "diffusion" / "samples" / "samples-0000001.png").is_file()


@pytest.mark.parametrize("changes", [("data.side=50",), ("data.crop=12",), ("data.crop=64",)])
def test_sizes_that_no_autoencoder_takes(changes, tmp_path):
    with pytest.raises(RequestError, match=r"use a multiple of 8"):
        run(read(tmp_path, VAE, *changes))


def test_what_does_not_learn_is_written_as_it_was(model, tmp_path):
    """A run in bfloat16 rounds what it computes with, not the result's VAE and text encoder."""
    changes = ("loop.precision=bfloat16", "diffusion.train_text=false", "loop.steps=1", "data.count=8")
    target = run(read(tmp_path, TUNE, f"model={model}", *changes))
    for load in (load_vae, load_text):
        before, after = (load(path).state_dict() for path in (model, target))
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_state_of_another_way_to_train(model, tmp_path):
    changes = (f"model={model}", "loop.steps=1", "data.count=8", "output=x.safetensors")
    run(read(tmp_path, TUNE, *changes))
    with pytest.raises(
        CheckpointError, match=r"not the state of this run \(it has \d+ parameters, this run trains \d+"
    ):
        run(read(tmp_path, TUNE, *changes, "loop.steps=2", "diffusion.method=lora"), resume=True)


def test_a_vocabulary_that_is_too_large(model, tmp_path):
    with pytest.raises(RequestError, match=r"vocab_size is 5000: these captions have words for \d+ tokens"):
        run(read(tmp_path, DIFFUSION, f"diffusion.vae={model}", "networks.text.vocab_size=5000"))


def test_states_of_captions_are_those_of_every_step(model, tmp_path):
    """A frozen text encoder runs once a caption; the loss is that of running it at every step, to half precision."""
    changes = (f"model={model}", "diffusion.train_text=false", "diffusion.caption_dropout=0.5", "loop.steps=3")
    for name, cached in (("once", True), ("each", False)):
        config = read(tmp_path, TUNE, *changes, f"diffusion.cache={str(cached).lower()}", f"folder={name}")
        run(config)
    once, each = (losses(tmp_path / name) for name in ("once", "each"))
    assert once == pytest.approx(each, rel=2e-3)
    examples = open_examples("shapes", count=8, side=32)
    captions = [examples.caption(number) for number in range(8)]
    text = load_text(model)
    states = encode_captions(text, [*captions, *captions, ""], 1)
    assert states.keys() == {*captions, ""}
    for caption, state in states.items():
        torch.testing.assert_close(state.float(), text.encode(caption)[0], rtol=1e-3, atol=1e-3)


def test_joined_sources(tmp_path):
    """Own pictures first, those of the prior after, as many of each; a broken one gives way with its caption."""
    for name, colours in (("own", ("red", "lime", "blue")), ("prior", ("black",))):
        (tmp_path / name).mkdir()
        for number, colour in enumerate(colours):
            Image.new("RGB", (16, 16), colour).save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.caption").write_text(colour)
    broken = tmp_path / "own" / "0.png"
    broken.write_bytes(broken.read_bytes()[:45])
    joined = Joined(*(open_examples(str(tmp_path / name)) for name in ("own", "prior")))
    assert [joined.caption(number) for number in range(6)] == ["red", "lime", "blue", "black", "black", "black"]
    number, example = find_whole(joined, 0)
    assert (number, example.caption, example.image.getpixel((0, 0))) == (1, "lime", (0, 255, 0))


def test_weight_of_the_prior(model, pictures, tmp_path):
    changes = ('prior.prompts=["a circle"]', "prior.count=2", "prior.weight=0.25", "diffusion.train_text=false")
    config = read(tmp_path, TUNE, f"model={model}", *changes, "data.count=4", "samples.prompts=[]")
    task, _ = TASKS["diffusion"](config, open_examples("shapes", count=4, side=32), make_accelerator(config))
    weights = [task.prepare(number, generator(0, number))["weight"].item() for number in range(8)]
    assert weights == [1, 1, 1, 1, 0.25, 0.25, 0.25, 0.25]


def test_pictures_read_ahead_are_those_of_one_thread(model, pictures, tmp_path):
    text = TUNE.replace('source = "shapes"\ncount = 64', f'source = "{pictures}"').replace("cache = true", "")
    for workers in (0, 2):
        run(read(tmp_path, text, f"model={model}", "loop.steps=6", f"data.workers={workers}", f"folder=by-{workers}"))
    assert losses(tmp_path / "by-0") == losses(tmp_path / "by-2")


def test_what_is_saved_is_the_average(model, tmp_path):
    config = read(tmp_path, TUNE, f"model={model}", "loop.steps=6", "loop.save_every=6", "loop.ema_decay=0.5")
    saved = load_unet(run(config)).state_dict()
    state = torch.load(tmp_path / "diffusion" / "state.pt", weights_only=True)
    average = {name.removeprefix("learning.unet."): tensor for name, tensor in state["ema"].items()}
    name = "conv_out.weight"
    torch.testing.assert_close(saved[name], average[name])
    assert not torch.equal(saved[name], state["parameters"][f"learning.unet.{name}"])


def test_prior_is_drawn_anew_where_what_it_comes_of_changes(model, tmp_path):
    model = shutil.copytree(model, tmp_path / "model")
    changes = (f"model={model}", *LORA, "loop.steps=1", "prior.count=2", "samples.prompts=[]")
    prior = tmp_path / "diffusion" / "prior"

    def folders(*more: str, resume: bool = True) -> dict[str, list[str]]:
        run(read(tmp_path, TUNE, *changes, *more), resume=resume)
        return {path.name: sorted(text.read_text() for text in path.glob("*.txt")) for path in prior.iterdir()}

    first = folders('prior.prompts=["a circle"]', resume=False)
    [drawn] = prior.rglob("0.png")
    written = drawn.stat().st_mtime_ns
    assert list(first.values()) == [["a circle", "a circle"]]
    assert folders('prior.prompts=["a circle"]') == first and drawn.stat().st_mtime_ns == written
    second = folders('prior.prompts=["a star", "a ring"]')
    assert len(second) == 2 and ["a ring", "a star"] in second.values()
    config = model / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_guidance_scale": 4}))
    assert len(folders('prior.prompts=["a circle"]')) == 3


def test_every_saved_result_is_kept_where_asked(model, tmp_path):
    changes = ("loop.steps=5", "loop.save_every=2", "loop.keep=true", "diffusion.train_text=false")
    target = run(read(tmp_path, TUNE, f"model={model}", *LORA, *changes, "samples.steps=1"))
    assert {path.name for path in target.parent.glob("*.safetensors")} == {
        "new.safetensors", "new-0000002.safetensors", "new-0000004.safetensors", "latents.safetensors"
    }  # fmt: skip
    assert (target.parent / "samples" / "samples-0000000.png").is_file()
