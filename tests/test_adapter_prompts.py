"""LoRAs that prompts and command lines name."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SMALL
from lora_files import assert_restored, lora, saved, snapshot
from PIL import Image
from test_pipeline import PROMPT

from ldm import Request
from ldm.adapters.merge import Adapters
from ldm.cli import main
from ldm.cli.flags import _lora
from ldm.errors import RequestError
from ldm.metadata import read_request

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
def folder(sd, tmp_path):
    """Two LoRAs in a folder, one of them in a folder of its own."""
    (tmp_path / "loras" / "deeper").mkdir(parents=True)
    for name in ("style", "deeper/other"):
        saved(tmp_path / "loras", lora(sd, scale=0.5), f"{name}.safetensors")
    return tmp_path / "loras"


@pytest.fixture
def drawing(sd, folder, monkeypatch):
    """The model, which looks for LoRAs in the folder."""
    monkeypatch.setitem(sd.__dict__, "lora_folders", (folder,))
    return sd


def draw(sd, prompt: str, **fields) -> bytes:
    return sd.txt2img(prompt, seed=1, steps=3, **fields)[0].tobytes()


def test_a_tag_is_active_during_its_request(drawing, folder):
    before = snapshot(drawing)
    plain = draw(drawing, PROMPT)
    tagged = draw(drawing, f"{PROMPT} <lora:style:0.8>")
    assert_restored(drawing, before)
    assert tagged != plain == draw(drawing, PROMPT)
    with drawing.load_lora(folder / "style.safetensors", 0.8):
        assert draw(drawing, PROMPT) == tagged
    with drawing.load_lora(folder / "style.safetensors", 0.3, text_strength=0.1):
        assert draw(drawing, f"<lora:style:0.1:0.3>{PROMPT}") == draw(drawing, PROMPT)  # in its stead, not on top of it
        assert draw(drawing, f"<lora:style:0.8>{PROMPT}") == tagged
    assert draw(drawing, f"<lora:style:0.8><lora:other>{PROMPT}") not in (plain, tagged)
    assert draw(drawing, f"<lora:style:0.4><lora:style:0.4>{PROMPT}") != plain


def test_a_tag_names_what_is_loaded(sd, folder):
    with sd.load_lora(folder / "style.safetensors", 0, name="mine"):
        plain = draw(sd, PROMPT)
        assert draw(sd, f"{PROMPT}<lora:mine:1>") != plain
        with pytest.raises(RequestError, match=r"looked in no folder.*there is mine"):
            draw(sd, "<lora:min>")


@pytest.mark.parametrize(
    "name", ["styles", "../loras/style", "/etc/passwd", "deeper/other", "style.safetensors", "x" * 10_000]
)
def test_unknown_names(drawing, folder, name):
    for begin in (drawing.generate, drawing.stream):
        with pytest.raises(RequestError, match="no LoRA is called") as caught:
            begin(Request(f"a <lora:{name}>"))
        assert str(folder) in str(caught.value)
        assert len(str(caught.value)) < 500
    if name == "styles":
        assert "there is style" in str(caught.value)


def test_two_files_of_a_name(drawing, folder):
    (folder / "deeper" / "style.pt").write_bytes(b"")
    with pytest.raises(RequestError, match="both called 'style'"):
        draw(drawing, "<lora:style>")


def test_a_tag_in_the_negative_prompt_is_ignored(drawing, caplog):
    plain = draw(drawing, PROMPT, negative_prompt="a star")
    assert draw(drawing, PROMPT, negative_prompt="a star<lora:style>") == plain
    assert "a negative prompt takes no LoRAs: style ignored" in caplog.text


def test_threads_keep_their_loras_to_themselves(drawing, monkeypatch):
    """Of two that begin at once one draws its own picture and one is told of it; the weights are as before."""
    before, change = snapshot(drawing), Adapters._set
    alone = {name: draw(drawing, f"{PROMPT}<lora:{name}>") for name in ("style", "other")}

    def slowly(self, loaded, prompted):
        time.sleep(0.2)  # in which the other one would begin, too
        change(self, loaded, prompted)

    def begin(name: str) -> str:
        try:
            return "alone" if draw(drawing, f"{PROMPT}<lora:{name}>") == alone[name] else "mixed"
        except RequestError as error:
            return str(error)[:35]

    monkeypatch.setattr(Adapters, "_set", slowly)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(begin, alone)) == ["alone", "another picture is being made with "]
    assert_restored(drawing, before)


def test_models_that_have_drawn_can_be_copied(drawing):
    expected = draw(drawing, PROMPT)
    assert draw(copy.deepcopy(drawing), PROMPT) == expected


def test_streams_keep_their_loras_to_themselves(drawing):
    before = snapshot(drawing)
    tagged, plain = Request(f"{PROMPT}<lora:style>", seed=1, steps=4), Request(PROMPT, seed=1, steps=4)
    alone = [step.x for step in drawing.stream(plain)]
    first = drawing.stream(tagged)
    assert_restored(drawing, before)  # nothing happens before the first step
    next(first)
    for other in (plain, Request(f"{PROMPT}<lora:other>", steps=4)):
        with pytest.raises(RequestError, match=r"another picture is being made with LoRAs of its prompt \(style\)"):
            next(drawing.stream(other))
        with pytest.raises(RequestError, match="another picture"):
            drawing.generate(other)
    assert len(list(first)) == 3
    assert_restored(drawing, before)

    second = drawing.stream(plain)
    assert torch.equal(next(second).x, alone[0])
    draw(drawing, f"{PROMPT}<lora:style>")  # begins and ends between two steps
    assert torch.equal(next(second).x, alone[1])
    first = drawing.stream(tagged)
    next(first)
    with pytest.raises(RequestError, match="the LoRAs changed while"):
        next(second)
    first.close()
    assert_restored(drawing, before)


def test_an_abandoned_stream_leaves_nothing(drawing):
    before = snapshot(drawing)
    for step in drawing.stream(Request(f"{PROMPT}<lora:style>", steps=3)):
        del step
        break
    assert_restored(drawing, before)


def run(capsys, *args: object) -> list[bytes]:
    flags = ["-s", "3", "--seed", "1", "--dtype", "float32", "--device", "cpu", *SMALL]
    assert main(["txt2img", *flags, *map(str, args)]) == 0
    return [Image.open(path).tobytes() for path in capsys.readouterr().out.splitlines()]


def test_command_line(drawing, folder, tmp_path, capsys):
    out = ("--outdir", tmp_path / "o")
    style = folder / "style.safetensors"
    with drawing.load_lora(style, 0.8, text_strength=0.2), drawing.load_lora(folder / "deeper" / "other.safetensors"):
        expected = draw(drawing, PROMPT)
    assert run(
        capsys, "-p", PROMPT, *out, "--lora", f"{style}:0.8:0.2", "--lora", folder / "deeper" / "other.safetensors"
    ) == [expected]  # fmt: skip
    tagged = f"{PROMPT}<lora:style:0.5>"
    assert run(capsys, "-p", tagged, *out, "--lora-dir", folder) == [draw(drawing, tagged)]
    assert run(capsys, "-p", tagged, *out, "--lora", f"{style}:0") == [draw(drawing, tagged)]
    prompts = [read_request(path).prompt for path in sorted((tmp_path / "o").iterdir())]
    assert prompts == [f"{PROMPT} <lora:style:0.2:0.8> <lora:other:1.0:1.0>", tagged, tagged]
    assert draw(drawing, prompts[0]) == expected


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["-p", "<lora:nobody>"], 2, "no LoRA is called 'nobody': looked in no folder"),
        (["-p", "<lora:a:b>"], 2, "the strength 'b' is not a number"),
        (["-p", "<lora:a>", "--lora-dir", "/nowhere"], 2, "/nowhere: no such folder"),
        (["-p", "a", "--lora", "nobody.safetensors:0.5"], 1, "nobody.safetensors: no such file"),
        (["-p", "a", "--embedding", "nobody.pt"], 1, "nobody.pt: no such file"),
    ],
)
def test_command_line_faults(capsys, args, code, message):
    assert main(["txt2img", *args]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1, None)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5, None)),
        ("a.safetensors:0.5:0", ("a.safetensors", 0.5, 0)),
        (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1, None)),
        (r"C:\loras\a.safetensors:-1:.5", (r"C:\loras\a.safetensors", -1, 0.5)),
        ("a:b:0.5", ("a:b", 0.5, None)),
        ("a:1:2:3", ("a:1", 2, 3)),
    ],
)
def test_strengths_are_read_from_the_end(text, expected):
    path, *strengths = _lora(text)
    assert (str(path), *strengths) == expected
