"""The command line as people use it: in a process of its own where exit codes and signals matter."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import OWN_SIZE, SHIPPED, SIDE, SMALL
from PIL import Image
from safetensors.torch import save_file
from synthetic import state_dict
from test_pipeline import PROMPT, assert_red_circle_on_blue

from ldm import Request
from ldm.cli import main
from ldm.errors import ImageError
from ldm.metadata import read_request

SCRIPTS = SHIPPED.parent.parent / "scripts"


def run(*args: object, script: str = "txt2img", **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def make(capsys, *args: object) -> list[Path]:
    """Run a command line in this process, and return the paths it printed."""
    assert main([str(arg) for arg in args]) == 0
    return [Path(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.quality
def test_txt2img_script(tmp_path):
    done = run("--prompt", PROMPT, "--seed", 1, "--outdir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / '00000-1.png'}\n"
    assert "25/25" in done.stderr
    image = Image.open(tmp_path / "00000-1.png")
    assert image.size == tuple(OWN_SIZE.values())
    assert_red_circle_on_blue(image)


def test_img2img(capsys, tmp_path):
    picture = tmp_path / "in.png"
    Image.new("RGB", (100, 64), "blue").save(picture)
    flags = ["-p", PROMPT, "--init-img", picture, "--strength", 0.6, "--steps", 10, "--outdir", tmp_path / "o"]
    assert main(["img2img", *map(str, flags)]) == 0
    done = capsys.readouterr()
    assert "6/6" in done.err
    [path] = done.out.splitlines()
    assert Image.open(path).size == (96, 64)
    assert "Denoising strength: 0.6" in Image.open(path).info["parameters"]


def test_every_flag_reaches_the_request(capsys, tmp_path):
    [path] = make(
        capsys, "txt2img", "--prompt", "a", "--negative-prompt", "b", "--steps", 3, "--cfg-scale", 2,
        "--sampler", "ddim", "--eta", 0.5, "--seed", 9, "-H", 72, "-W", 80, "--batch-size", 1, "--batch-count", 1,
        "--model", SHIPPED, "--vae", SHIPPED / "vae", "--outdir", tmp_path, "--device", "cpu", "--dtype", "float32",
    )  # fmt: skip
    assert read_request(path) == Request(
        prompt="a", negative_prompt="b", steps=3, cfg_scale=2.0, sampler="ddim", eta=0.5, seed=9, height=72, width=80
    )


def test_compvis_spellings(capsys, tmp_path):
    paths = make(
        capsys, "txt2img", "--prompt", "a", "--ddim_steps", 4, "--plms", "--scale", 2, "--n_samples", 2, "--n_iter", 2,
        "--H", 72, "--W", 80, "--ckpt", SHIPPED, "--ddim_eta", 0, "--grid", "--skip_grid", "--seed", 3,
        "--outdir", tmp_path,
    )  # fmt: skip
    assert [path.name for path in paths] == [f"{i:05d}-{3 + i}.png" for i in range(4)]
    expected = Request(prompt="a", steps=4, sampler="plms", cfg_scale=2.0, eta=0.0, seed=6, height=72, width=80)
    assert read_request(paths[3]) == expected


def test_each_image_carries_a_request_that_makes_it_again(capsys, tmp_path, shipped):
    paths = make(
        capsys,
        "txt2img",
        "-p",
        PROMPT,
        "-s",
        5,
        "--seed",
        3,
        "--batch-size",
        2,
        *SMALL,
        "--outdir",
        tmp_path,
        "--dtype",
        "fp32",
    )
    [again] = shipped.generate(read_request(paths[1]))
    saved = Image.open(paths[1])
    assert max(abs(a - b) for a, b in zip(again.tobytes(), saved.tobytes(), strict=True)) <= 1


def test_steps_in_metadata_are_those_run(capsys, tmp_path):
    [path] = make(capsys, "txt2img", "-p", "a", "-s", 7, "--sampler", "ddim", *SMALL, "--outdir", tmp_path)
    assert "Steps: 8," in Image.open(path).info["parameters"]
    assert read_request(path).steps == 7


def test_from_file_and_grid(capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffa red circle\r\n\n  a blue\u2028star \n", encoding="utf-8")
    flags = ["-s", 2, "--seed", 5, *SMALL, "--outdir", tmp_path / "o"]
    paths = make(capsys, "txt2img", "--from-file", prompts, *flags, "--grid")
    assert [path.name for path in paths] == ["00000-5.png", "00001-5.png", "00002-grid.png"]
    assert [read_request(path).prompt for path in paths[:2]] == ["a red circle", "a blue\u2028star"]
    assert Image.open(paths[2]).size == (2 * SIDE, SIDE)
    paths = make(capsys, "txt2img", "-p", "a", *flags)
    assert paths[0].name == "00003-5.png"  # nothing is written over


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, Path]:
    """Files that are not what they claim to be."""
    folder = tmp_path_factory.mktemp("broken")
    files = {
        name: folder / f"{name}.safetensors"
        for name in ("text", "truncated", "sd2", "sdxl", "lora", "incomplete", "tiny")
    }
    tiny = state_dict("tiny-keys.json")
    files["text"].write_text("this is a text file\n" * 10)
    save_file(tiny, files["tiny"])
    files["truncated"].write_bytes(files["tiny"].read_bytes()[:-5000])
    zero = torch.zeros(2, 2)
    save_file({"cond_stage_model.model.ln_final.weight": zero}, files["sd2"])
    save_file({"conditioner.embedders.0.transformer.x": zero}, files["sdxl"])
    save_file({"lora_unet_mid_block.lora_down.weight": zero}, files["lora"])
    del tiny["model.diffusion_model.out.2.weight"]
    save_file(tiny, files["incomplete"])
    return files


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("text", "not a readable .safetensors file"),
        ("truncated", "not a readable .safetensors file"),
        ("sd2", "this is a Stable Diffusion 2.x model"),
        ("sdxl", "this is a Stable Diffusion XL model"),
        ("lora", "this is a LoRA"),
        ("incomplete", "out.2.weight is missing"),
        ("tiny", "holds no text encoder"),
    ],
)
def test_bad_models_are_one_line(broken, capsys, tmp_path, file, expected):
    assert main(["txt2img", "-p", "a", "--model", str(broken[file]), "--outdir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (["txt2img"], 2, "give either --prompt or --from-file"),
        (["txt2img", "-p", "a", "--from-file", "x"], 2, "give either --prompt or --from-file"),
        (["txt2img", "-p", "a", "--steps", "0"], 2, "steps is 0"),
        (["txt2img", "-p", "a", "--steps", "many"], 2, "invalid int value: 'many'"),
        (["txt2img", "-p", "a", "-W", "513"], 2, "width is 513: use 512 or 520"),
        (["txt2img", "-p", "a", "--strength", "0.5"], 2, "unrecognized arguments"),
        (["txt2img", "-p", "a", "--memori=2G"], 2, "--memori=2G; nearest is --memory (see ldm txt2img --help)"),
        (["txt2img", "a", "ring"], 2, "ldm txt2img: unrecognized arguments: a ring; quote texts"),
        (["txt2img", "-p", "a", "--init-img", "b", "--widht", "3"], 2, "; nearest is --width (see"),
        (["txt2img", "-p", "a", "--batch-count", "0"], 2, "batch_count is 0"),
        (["txt2img", "-p", "a", "--batch-count", "99999999"], 2, "batch_count is 99999999"),
        (["txt2img", "-p", "a", "--outdir", "/proc"], 1, "/proc"),
        (["txt2img", "-p", "a", "--device", "tpu"], 2, "device is 'tpu'"),
        (["txt2img", "-p", "a", "--dtype", "int4"], 2, "dtype is 'int4'"),
        (["txt2img", "-p", "a", "--sampler", "magic"], 2, "use one of ddim, plms, ddpm"),
        (["txt2img", "-p", "a", "--plms", "--eta", "1"], 2, "plms has none"),
        (["txt2img", "-p", "a", "--vae", "absent.safetensors"], 1, "absent.safetensors: no such file or folder"),
        (["txt2img", "-p", "a", "--model", "absent.safetensors"], 1, "absent.safetensors: no such file or folder"),
        (["txt2img", "--from-file", "absent.txt"], 1, "absent.txt: No such file or directory"),
        (["img2img", "-p", "a"], 2, "--init-img"),
        (["img2img", "-p", "a", "--init-img", "absent.png"], 1, "absent.png: no such image"),
        (["img2img", "-p", "a", "--init-img", __file__], 1, "not a readable image"),
        (
            ["img2img", "-p", "a", "--init-img", "x.png", "--strength", "1.5"],
            2,
            "strength is 1.5: use a number from 0 to 1",
        ),
        (["upscale"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, args, code, expected):
    monkeypatch.chdir(tmp_path)
    assert main(args) == code
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_unwritable_outdir_and_binary_prompts(capsys, tmp_path):
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    assert main(["txt2img", "-p", "a", "--outdir", str(tmp_path / "file")]) == 1
    assert main(["txt2img", "--from-file", str(tmp_path / "file")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == f"ldm: {tmp_path / 'file'}: File exists"
    assert "not a text file in UTF-8" in lines[1]


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you tried"]
)
def test_out_of_memory_is_one_line(capsys, tmp_path, monkeypatch, message):
    def fail(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr("ldm.pipeline.StableDiffusion.generate", fail)
    assert main(["txt2img", "-p", "a", "--outdir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "ldm: out of memory: use a smaller size or batch, or close other programs\n"


@pytest.mark.parametrize(("encoding", "folder"), [("ascii", "ü"), ("utf-8", b"\xff")])
def test_paths_need_not_be_text(tmp_path, monkeypatch, encoding, folder):
    outdir = os.fsdecode(tmp_path) + "/" + os.fsdecode(folder)
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding))
    assert main(["txt2img", "-p", "a", "-s", "1", "--seed", "1", *SMALL, "--outdir", outdir]) == 0
    sys.stdout.flush()
    assert printed.getvalue() == os.fsencode(outdir) + b"/00000-1.png\n"
    assert (Path(outdir) / "00000-1.png").is_file()


def test_closed_output_is_no_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "txt2img.py"), "-p", "a", "-s", "1", *SMALL, "--outdir", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 1
    assert b"Traceback" not in err
    assert b"Broken" not in err


def test_help_is_fast():
    """The bound is 0.3 s; the fastest of three runs, since only the machine can make one slower."""
    for script in ("txt2img", "img2img"):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            assert "--negative-prompt" in run("--help", script=script).stdout
            times.append(time.perf_counter() - start)
        assert min(times) < 0.3


def test_interrupt(tmp_path):
    """Ctrl-C ends within a step, with exit code 130, and leaves no partial file."""
    args = ["-p", "a", "-s", "1000", "--batch-count", "50", "--outdir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-u", str(SCRIPTS / "txt2img.py"), *args], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs of a shell ignore
    )  # fmt: skip
    seen = b""
    while b"/1000 [00:0" not in seen or b" 0/1000" in seen.rsplit(b"\r", 1)[-1]:  # until a first step is made
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, seen
        seen += chunk
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    _, err = process.communicate(timeout=20)
    assert time.perf_counter() - start < 3
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "ldm: interrupted"
    assert b"Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ldm 0.")


def test_previews_formats_and_no_metadata(capsys, tmp_path):
    paths = make(
        capsys, "txt2img", "-p", PROMPT, "-s", 6, "--seed", 3, "--preview-every", 2, "--format", "webp",
        "--no-metadata", *SMALL, "--outdir", tmp_path,
    )  # fmt: skip
    assert [path.name for path in paths] == [
        "00000-3-step002.png", "00001-3-step004.png", "00002-3-step006.png", "00003-3.webp",
    ]  # fmt: skip
    assert [Image.open(path).size for path in paths] == [(SIDE, SIDE)] * 4
    assert Image.open(paths[3]).format == "WEBP"
    with pytest.raises(ImageError):
        read_request(paths[3])


def test_painting_under_a_mask(capsys, tmp_path):
    [start] = make(capsys, "txt2img", "-p", PROMPT, "-s", 6, "--seed", 3, *SMALL, "--outdir", tmp_path)
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    flags = ["-p", "a green star", "-s", 4, "--seed", 1, "--mask-blur", 0, "--outpaint-right", 16, "--outdir", tmp_path]
    [painted] = make(
        capsys, "img2img", "--init-img", start, "--mask", tmp_path / "mask.png", "--strength", 1, *flags
    )  # fmt: skip
    image, original = Image.open(painted), Image.open(start)
    assert image.size == (80, 64)
    kept = (0, 32, 56, 64)
    assert image.crop(kept).tobytes() == original.crop(kept).tobytes()
    [again] = make(
        capsys, "regenerate", painted, "--init-img", start, "--mask", tmp_path / "mask.png", "--outdir", tmp_path
    )  # fmt: skip
    assert Image.open(again).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--taesd-finals"], "taesd_finals needs taesd"),
        (["--preview-every", "0"], "preview_every is 0: use 1 to"),
        (["--sampler", "Eular a"], "sampler is 'Eular a': use one of ddim"),
        (["--schedule", "karas"], "schedule is 'karas': use one of"),
        (["--hires-scale", "0.5"], "hires_scale is 0.5: use a number from 1 to 8"),
        (["--guidance-start", "0.9", "--guidance-end", "0.1"], "guidance_start is 0.9, after guidance_end, 0.1"),
    ],
)
def test_faults_of_what_is_asked_for(capsys, args, message):
    assert main(["txt2img", "-p", "a", *args]) == 2
    assert message in capsys.readouterr().err
