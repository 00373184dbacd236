from __future__ import annotations

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_request import REQUESTS

from ldm import Request, metadata
from ldm.errors import ImageError, RequestError

IMAGE = Image.new("RGB", (2, 2), "red")


@settings(max_examples=50)
@given(REQUESTS)
def test_png_round_trip(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("png") / "i.png"
    metadata.save_png(path, IMAGE, request, 8, "model")
    assert metadata.read_request(path) == request
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("prompt", ["😀 “quoted”, <b>", "one\ntwo\r\nNegative prompt: x\nSteps: 3", '"\\\x00\x1b'])
def test_awkward_prompts(tmp_path, prompt):
    request = Request(prompt=prompt, negative_prompt=prompt)
    metadata.save_png(tmp_path / "i.png", IMAGE, request, 8, "model")
    assert metadata.read_request(tmp_path / "i.png") == request


def test_parameters_have_the_form_of_automatic1111():
    request = Request(prompt="a cat", negative_prompt="a dog", steps=7, seed=42, width=512, height=768, strength=0.6)
    assert metadata.parameters(request, 4, "v1-5") == (
        "a cat\nNegative prompt: a dog\n"
        "Steps: 4, Sampler: DDIM, CFG scale: 7.5, Seed: 42, Size: 512x768, Model: v1-5, Denoising strength: 0.6"
    )
    assert "Negative" not in metadata.parameters(Request(prompt="a cat"), 25, "v1-5")


def test_existing_files_are_never_replaced(tmp_path):
    path = tmp_path / "i.png"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        metadata.save_png(path, IMAGE, Request(prompt="a"), 1, "m")
    assert path.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["i.png"]


def test_foreign_files(tmp_path):
    path = tmp_path / "i.png"
    path.write_bytes(b"not a picture")
    with pytest.raises(ImageError, match="not a readable image"):
        metadata.read_request(path)
    IMAGE.save(path)
    with pytest.raises(ImageError, match="carries no request"):
        metadata.read_request(path)
    info = PngInfo()
    info.add_text("request", '{"prompt": 1}')
    IMAGE.save(path, pnginfo=info)
    with pytest.raises(RequestError):
        metadata.read_request(path)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 255), st.integers(0, 50))
def test_mutated_pngs(tmp_path_factory, position, change, cut):
    """Checksums made right again, so that mutations reach the decoder."""
    folder = tmp_path_factory.mktemp("png")
    metadata.save_png(folder / "i.png", IMAGE, Request("a"), 8, "model")
    content = bytearray((folder / "i.png").read_bytes())
    content[8 + position % (len(content) - 8)] ^= change
    start = 8
    while start + 12 <= len(content):
        length = int.from_bytes(content[start : start + 4], "big")
        end = start + 8 + length
        if end + 4 > len(content):
            break
        content[end : end + 4] = zlib.crc32(content[start + 4 : end]).to_bytes(4, "big")
        start = end + 4
    (folder / "m.png").write_bytes(content[: len(content) - cut])
    try:
        metadata.read_request(folder / "m.png")
    except (ImageError, RequestError) as error:
        assert "\n" not in str(error)


def test_commas_in_a_models_name_are_quoted():
    assert 'Model: "v1, Steps: 99"' in metadata.parameters(Request("a"), 25, "v1, Steps: 99")
