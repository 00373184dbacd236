"""LoRA tags in prompts."""

from __future__ import annotations

import time

import pytest

from ldm.errors import RequestError
from ldm.prompt import LoraTag, split_loras


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:a>", LoraTag("a", 1, 1)),
        ("<lora:a:0.8>", LoraTag("a", 0.8, 0.8)),
        ("<lyco:a:0.8>", LoraTag("a", 0.8, 0.8)),
        ("<lora:a:0.8:0.5>", LoraTag("a", 0.8, 0.5)),
        ("<lora:a:te=0.5>", LoraTag("a", 0.5, 0.5)),
        ("<lora:a:unet=0.5>", LoraTag("a", 1, 0.5)),
        ("<lora:a:unet=0.5:te=0>", LoraTag("a", 0, 0.5)),
        ("<lora:a:0.2:unet=0.5>", LoraTag("a", 0.2, 0.5)),
        ("<lora:a b.c-d_1:-1>", LoraTag("a b.c-d_1", -1, -1)),
    ],
)
def test_tags_read_as_automatic1111_reads_them(tag, expected):
    assert split_loras(f"a cat, {tag} on a mat") == ("a cat,  on a mat", [expected])


@pytest.mark.parametrize(
    "prompt", ["", "a < b > c", "<lora>", "<lora:", "<lora:>", "<hypernet:a:1>", "<cat-toy>", "lora:a"]
)
def test_other_text_stays(prompt):
    assert split_loras(prompt) == (prompt, [])


def test_several_tags():
    text, tags = split_loras("<lora:a:1>x<lora:b><lora:a:2>y")
    assert text == "xy"
    assert [(tag.name, tag.unet) for tag in tags] == [("a", 1), ("b", 1), ("a", 2)]


@pytest.mark.parametrize(
    "tag", ["<lora:a:x>", "<lora:a:nan>", "<lora:a:1:2:3>", "<lora:a:dyn=4>", "<lora: :1>", "<lora:a:>", "<lora:a:te=>"]
)
def test_faulty_tags(tag):
    with pytest.raises(RequestError) as caught:
        split_loras(tag)
    assert tag in str(caught.value)


@pytest.mark.parametrize("text", ["<lora:", "<lora:a", "<lora:a:1", "<" * 6 + ":", "<lora:a:1>"])
def test_reading_takes_linear_time(text):
    start = time.perf_counter()
    split_loras(text * 20_000)
    assert time.perf_counter() - start < 1
