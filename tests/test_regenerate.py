"""Pictures are made again from what they carry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import SHIPPED, SIDE, SMALL
from lora_files import lora, saved
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_pipeline import PROMPT

from ldm import Request, metadata
from ldm.cli import main

EXACT = ("--device", "cpu", "--dtype", "float32")


def make(capsys, *args: object) -> list[Path]:
    """Run a command line in this process, and return the paths it printed."""
    code = main([str(arg) for arg in args])
    done = capsys.readouterr()
    assert code == 0, done.err
    return [Path(line) for line in done.out.splitlines()]


def refusal(capsys, *args: object) -> str:
    """The one line that a wrong command line is answered with."""
    assert main([str(arg) for arg in args]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def difference(one: Path, other: Path) -> int:
    """The largest, in grey levels, between two pictures of one size."""
    a, b = Image.open(one).convert("RGB"), Image.open(other).convert("RGB")
    assert a.size == b.size
    return max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))


@pytest.mark.parametrize("fields", [("--sampler", "ddim"), ("--sampler", "euler_a"), ("--sampler", "ddim", "--eta", 1)])
def test_a_picture_is_made_again_to_the_bit(capsys, tmp_path, fields):
    first = ("-p", "a red circle", "-n", "blue", "-s", 3, "--seed", 5, *SMALL, "--outdir", tmp_path / "a")
    [path] = make(capsys, "txt2img", *first, *fields, *EXACT)
    [again] = make(capsys, "regenerate", path, "--outdir", tmp_path / "b", *EXACT)
    assert again.parent == tmp_path / "b"
    assert again.read_bytes() == path.read_bytes()  # the metadata too


def test_each_picture_of_a_batch_is_made_again_alone(capsys, tmp_path):
    first = ("-p", "a red circle", "-s", 4, "--sampler", "euler_a", "--seed", 5, "--batch-size", 2, *SMALL)
    paths = make(capsys, "txt2img", *first, "--outdir", tmp_path / "a", *EXACT)
    assert difference(*paths) > 1
    for path in paths:
        [again] = make(capsys, "regenerate", path, "--outdir", tmp_path / "b", *EXACT)
        assert difference(path, again) <= 1


def test_a_picture_made_from_another_needs_it(capsys, tmp_path):
    source = tmp_path / "in.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(source)
    first = ("-p", "a red circle", "-s", 5, "--strength", 0.6, "--init-img", source, "--seed", 5)
    [path] = make(capsys, "img2img", *first, "--outdir", tmp_path / "a", *EXACT)
    assert refusal(capsys, "regenerate", path, "--outdir", tmp_path) == (
        f"ldm: {path}: was made from another picture, which it does not carry: give --init-img"
    )
    [again] = make(capsys, "regenerate", path, "--init-img", source, "--outdir", tmp_path / "b", *EXACT)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_picture_in_another_format_is_made_again(capsys, tmp_path, shipped, suffix):
    request = shipped.resolve(Request("a red circle", steps=3, sampler="ddim", seed=5))
    [image] = shipped.generate(request)
    path = tmp_path / f"i{suffix}"
    metadata.save_image(path, image, request, shipped.grid_length(request), shipped.name)
    [again] = make(capsys, "regenerate", path, "--outdir", tmp_path / "b", *EXACT)
    assert Image.open(again).tobytes() == image.tobytes()
    assert metadata.read_origin(again) == metadata.read_origin(path)


def test_a_mask_that_is_missing_is_told(capsys, tmp_path):
    path = tmp_path / "i.png"
    request = Request("a", strength=0.5, steps=3, seed=1)
    metadata.save_image(path, Image.new("RGB", (64, 64)), request, 3, "m", masked=True)
    assert refusal(capsys, "regenerate", path, "--init-img", path) == (
        f"ldm: {path}: was painted under a mask, which it does not carry: give --mask"
    )


def test_a_missing_guidance_scale_is_told(capsys, caplog, tmp_path):
    about = PngInfo()
    about.add_text("parameters", f"{PROMPT}\nSteps: 1, Sampler: DDIM, Seed: 1, Size: {SIDE}x{SIDE}, RNG: CPU")
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "i.png", pnginfo=about)
    [path] = make(capsys, "regenerate", tmp_path / "i.png", "--outdir", tmp_path, *EXACT)
    assert "carries no guidance scale: the model's own counts" in caplog.text
    assert metadata.read_request(path).cfg_scale == 2


def test_another_model_is_told(capsys, tmp_path, caplog):
    path = tmp_path / "i.png"
    request = Request("a", steps=1, sampler="ddim", seed=1, cfg_scale=2.0, width=SIDE, height=SIDE)
    metadata.save_image(path, Image.new("RGB", (64, 64)), request, 1, "other", vae="better")
    make(capsys, "regenerate", path, "--outdir", tmp_path / "b", *EXACT)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{path} was made with the model other, this one with shapes: give --model for the same picture",
        f"{path} was made with the VAE better, this one with the model's own: give --vae for the same picture",
    ]
    caplog.clear()
    shutil.copytree(SHIPPED, tmp_path / "other")
    shutil.copytree(SHIPPED / "vae", tmp_path / "better")
    choices = ("--model", tmp_path / "other", "--vae", tmp_path / "better")
    make(capsys, "regenerate", path, *choices, "--outdir", tmp_path / "b", *EXACT)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_picture_of_comfyui_is_drawn_with_its_noise(capsys, tmp_path, shipped):
    """ComfyUI starts from torch.randn on the CPU, seeded; so does a request."""
    graph = {
        "1": {"class_type": "KSampler", "inputs": {
            "seed": 9, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1,
            "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "model": ["5", 0],
        }},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "shapes.safetensors"}},
    }  # fmt: skip
    info = PngInfo()
    info.add_text("prompt", json.dumps(graph))
    Image.new("RGB", (64, 64)).save(tmp_path / "i.png", pnginfo=info)
    [again] = make(capsys, "regenerate", tmp_path / "i.png", "--outdir", tmp_path / "b", *EXACT)
    expected = Request("a red circle", steps=3, cfg_scale=4.0, sampler="euler", schedule="karras", seed=9)
    [image] = shipped.generate(expected)
    assert Image.open(again).tobytes() == image.tobytes()


@pytest.mark.parametrize("flags", [(), ("--model", "nowhere.safetensors")])
def test_a_picture_without_a_request_is_refused_before_anything_slow(capsys, tmp_path, flags):
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    assert main(["regenerate", str(tmp_path / "i.png"), *flags]) == 1
    assert "carries no request" in capsys.readouterr().err
    assert main(["regenerate", str(tmp_path / "absent.png")]) == 1
    assert "no such image" in capsys.readouterr().err


def test_the_strength_in_the_picture_counts(sd, tmp_path, capsys, caplog):
    """Not that of a --lora, which only tells where the file is."""
    ink, flags = saved(tmp_path, lora(sd), "ink.safetensors"), [*EXACT, "--outdir", tmp_path]
    [path] = make(capsys, "txt2img", "-p", PROMPT, "-s", 3, "--seed", 1, *SMALL, "--lora", f"{ink}:0.5", *flags)
    [again] = make(capsys, "regenerate", path, "--lora", f"{ink}:1", *flags)
    assert "names ink at 0.5, which counts" in caplog.text
    assert Image.open(again).tobytes() == Image.open(path).tobytes()
