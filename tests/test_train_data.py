"""Where training examples come from, and in which order."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import subprocess
import tarfile
import time
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.errors import ImageError, RequestError
from ldm.images import load_image
from ldm.train import data, prior, shards
from ldm.train.cache import open_cache
from ldm.train.config import read_train_config
from ldm.train.data import Batches, assign, bucket_sizes, fit, load_example, open_examples
from ldm.train.shapes import draw_scene


def encoded(colour="red", size=(8, 8), format="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format, **options)
    return file.getvalue()


def noise(size=(64, 64), format="PNG") -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 50).save(file, format)
    return file.getvalue()


def huge_header() -> bytes:
    """A PNG of a few hundred bytes that says it has 10 gigapixels."""
    content = bytearray(encoded())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def folder(tmp_path: Path, files: dict[str, bytes | str]) -> str:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(tmp_path)


def tar(path: Path, files: dict[str, bytes | str], format=tarfile.GNU_FORMAT) -> str:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def contents(examples) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → caption and colour of the middle; sizes, names and captions told ahead hold."""
    found = {}
    for index in range(len(examples)):
        example = examples[index]
        assert examples.size(index) == example.image.size
        assert (examples.name(index), examples.caption(index)) == (example.name, example.caption)
        assert example.image.mode == "RGB"
        middle = example.image.getpixel((example.image.width // 2, example.image.height // 2))
        found[os.path.basename(example.name)] = (example.caption, middle)
    return found


# ------------------------------------------------------------------------------------------------------------ shapes


def test_shapes_are_scenes_of_the_world():
    examples = open_examples("shapes", seed=3, count=5, side=32)
    assert len(examples) == 5
    for index, example in enumerate(examples):
        scene = draw_scene(3, index, "train")
        assert example.image.tobytes() == scene.draw(32).tobytes()
        assert example.caption == scene.caption(Random(f"3 {index}")) == examples.caption(index)
        assert example.name == f"shapes {index}"
        assert examples.size(index) == example.image.size == (32, 32)
    assert index == 4
    assert examples.broken == {}


def test_shapes_of_some_kinds():
    kinds = ("inside", "one", "two")
    examples = open_examples("shapes", seed=3, kinds=kinds, count=6, side=32)
    scenes = [draw_scene(3, index, "train", kinds[index % 3]) for index in range(6)]
    assert [example.image.tobytes() for example in examples] == [scene.draw(32).tobytes() for scene in scenes]
    assert [len(scene.things) for scene in scenes] == [2, 1, 2] * 2
    assert scenes[0].relation == scenes[3].relation == "inside"
    assert all(examples.version(i) != open_examples("shapes", seed=3, count=6).version(i) for i in range(6))
    with pytest.raises(RequestError, match="'four' is no kind of scene"):
        open_examples("shapes", kinds=["four"], count=6)


@pytest.mark.parametrize("options", [{}, {"count": 0}, {"count": 4, "side": 0}, {"count": 4, "side": 8193}])
def test_shapes_need_a_count(options):
    with pytest.raises(RequestError, match="expected a count of scenes"):
        open_examples("shapes", **options)


# ----------------------------------------------------------------------------------------------------------- folders


def test_captions_of_a_folder_in_both_ways(tmp_path):
    source = folder(
        tmp_path,
        {
            "a.png": encoded("red"),
            "a.txt": "\ufeff one\n",
            "b.JPG": encoded("blue", format="JPEG"),
            "c.png": encoded("green"),
            "c.txt": "from the text file",
            "d.png": encoded("white"),
            "e.png": encoded("black"),
            "e.txt": "  \n",
            "metadata.jsonl": '{"file_name": "b.JPG", "text": "two"}\n\n{"file_name": "c.png", "text": "listed"}\n'
            '{"file_name": "deep/er/f.png", "text": "from above"}',
            "deep/metadata.jsonl": '{"file_name": "./g.webp", "caption": " own \\u00e9 ", "more": [1]}\r\n',
            "deep/er/f.png": encoded("red"),
            "deep/g.webp": encoded("red", format="WEBP", lossless=True),
            ".hidden/h.png": encoded(),
            "._a.png": b"AppleDouble",
        },
    )
    examples = open_examples(source, caption="default")
    found = contents(examples)
    assert {name: caption for name, (caption, _) in found.items()} == {
        "a.png": "one",
        "b.JPG": "two",
        "c.png": "listed",
        "d.png": "default",
        "e.png": "default",
        "f.png": "from above",
        "g.webp": "own é",
    }
    assert found["c.png"][1] == (0, 128, 0)
    assert [examples.name(i) for i in range(len(examples))] == sorted(examples.name(i) for i in range(len(examples)))
    assert examples.broken == {}


def test_pictures_without_a_caption_are_an_error_that_counts_them(tmp_path):
    source = folder(tmp_path, {f"{i}.png": encoded() for i in range(8)} | {"0.txt": "a"})
    with pytest.raises(RequestError, match=r"7 of 8 pictures have no caption \(1.png, .*, 5.png and 2 more\)") as error:
        open_examples(source)
    assert "\n" not in str(error.value)
    assert [open_examples(source, caption="").caption(i) for i in range(2)] == ["a", ""]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_are_those_of_upright_pictures(tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = folder(tmp_path, {f"a.{format.lower()}": encoded(size=(6, 4), format=format, exif=exif)})
    examples = open_examples(source, caption="")
    assert examples.size(0) == examples[0].image.size == ((4, 6) if orientation > 4 else (6, 4))


def test_pixels_are_those_of_load_image(tmp_path):
    Image.effect_noise((16, 12), 60).convert("RGBA").save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    image.putalpha(100)
    image.save(tmp_path / "a.png")
    assert open_examples(str(tmp_path), caption="")[0].image.tobytes() == load_image(tmp_path / "a.png").tobytes()


BROKEN = {
    "empty.png": (b"", "not a readable image"),
    "text.jpg": (b"hello", "not a readable image"),
    "bomb.png": (huge_header(), "exceeds limit"),
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not a readable image"),
    "cut.png": (noise()[:-500], "truncated|broken"),
    "cut.jpg": (noise(format="JPEG")[:-500], "truncated"),
    "wide.tif": (None, "32 bits"),
    "exif.webp": (encoded(format="WEBP", exif=b"Exif\0\0rubbish"), "not a readable image"),
}
AT_START = ("empty.png", "text.jpg", "bomb.png", "eps.png", "exif.webp")


def broken_files() -> dict[str, bytes]:
    file = io.BytesIO()
    Image.new("F", (2, 2)).save(file, "TIFF")
    return {name: file.getvalue() if content is None else content for name, (content, _) in BROKEN.items()}


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_broken_pictures_are_named_and_replaced_by_the_next(tmp_path, caplog, kind):
    files = {f"{i}{name}": content for i, (name, content) in enumerate(broken_files().items())}
    files |= {"8a.png": encoded("red"), "9.png": encoded("blue")}
    if kind == "shard":
        (tmp_path / "tars").mkdir()
        source = tar(tmp_path / "tars" / "0.tar", files)
    else:
        source = folder(tmp_path, files)
    with caplog.at_level(logging.WARNING):
        examples = open_examples(source, caption="all alike")
    assert len(examples) == 5
    assert {os.path.basename(name)[1:] for name in examples.broken} == set(AT_START)
    assert "5 of 10 pictures are broken and left out: " in caplog.text
    for _ in range(2):  # epochs
        drawn = [load_example(examples, index) for index in range(5)]
        assert [os.path.basename(example.name) for example in drawn] == ["8a.png"] * 4 + ["9.png"]
        assert [example.image.getpixel((0, 0)) for example in drawn] == [(255, 0, 0)] * 4 + [(0, 0, 255)]
    for name, reason in examples.broken.items():
        expected = BROKEN[os.path.basename(name)[1:]][1]
        assert any(each in reason for each in expected.split("|")), reason
        assert caplog.text.count(os.path.basename(name)) == 1
        assert "takes its place" not in caplog.text  # whoever asked may skip it
        assert "0x" not in reason
    assert "8 of 10 pictures are broken" in examples.summary()
    assert "and 3 more" in examples.summary()
    with pytest.raises(ImageError, match=r"cut.png: .*trunc"):
        examples[next(i for i in range(5) if "cut.png" in examples.name(i))]


def test_nothing_but_broken_pictures_is_an_error_in_a_line(tmp_path):
    with pytest.raises(RequestError, match="no pictures in it") as error:
        open_examples(str(tmp_path))
    assert "\n" not in str(error.value)
    source = folder(tmp_path, {"a\nb.png": b"x", "b.png": b""})
    with pytest.raises(RequestError, match=r"2 of 2 pictures are broken and left out: 'a\\nb.png' \(not a r") as error:
        open_examples(source)
    assert "\n" not in str(error.value)
    (tmp_path / "b.png").write_bytes(noise()[:-500])
    examples = open_examples(source, caption="")
    with pytest.raises(RequestError, match="2 of 2 pictures are broken"):
        load_example(examples, 0)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ImageError, match=r"b.png: cannot be read \(No such file"):
        examples[0]


def test_what_is_no_plain_picture_is_told(tmp_path, caplog, monkeypatch):
    source = folder(
        tmp_path,
        {
            "a.png": encoded(),
            "b.heic": b"",
            "c.heic": b"",
            "large.png": encoded() + bytes(2000),
            "latin.png": encoded(),
            "latin.txt": b"caf\xe9",
            "metadata.jsonl": '{"file_name": "../../secret.png", "text": "x"}\n{"file_name": "b.heic", "text": "x"}',
        },
    )
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(data, "MOST_PICTURE_BYTES", 2000)
    with caplog.at_level(logging.WARNING):
        examples = open_examples(source, caption="")
    assert [examples.name(i) for i in range(len(examples))] == ["a.png", "good.png"]
    assert examples.broken.keys() == {"large.png", "latin.png", "pipe.png", "link.png", "../../secret.png", "b.heic"}
    assert "more than the 2,000 that are allowed" in examples.broken["large.png"]
    assert "UTF-8" in examples.broken["latin.png"]
    assert "left out, no pictures: 2 .heic" in caplog.text


def test_folders_that_are_not_read_are_told(tmp_path, caplog, monkeypatch):
    source = folder(tmp_path / "source", {"a.png": encoded(), "b/c.png": encoded(), "locked/d.png": encoded()})
    folder(tmp_path / "outside", {"e.png": encoded()})
    (tmp_path / "source" / "b" / "more").symlink_to(tmp_path / "outside")
    (tmp_path / "source" / "loop").symlink_to(tmp_path / "source")
    (tmp_path / "source" / ".hidden").symlink_to(tmp_path / "outside")
    scandir = os.scandir

    def refuse(path):  # chmod would not keep a root user out
        if os.path.basename(path) == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return scandir(path)

    with monkeypatch.context() as patches, caplog.at_level(logging.WARNING):
        patches.setattr(os, "scandir", refuse)
        examples = open_examples(source, caption="")
    assert [examples.name(i) for i in range(len(examples))] == ["a.png", "b/c.png"]
    [told] = [record.getMessage() for record in caplog.records]
    assert told == f"{source}: 3 folders left out: loop (a link), b/more (a link), locked (Permission denied)"


def test_files_that_cannot_be_looked_at_are_told(tmp_path):
    """Nor is a picture without its caption learned from with another."""
    source = folder(tmp_path, {"a.png": encoded(), "b.png": encoded(), "c.png": encoded()})
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d.png").symlink_to("x" * 300)
    (tmp_path / "c.txt").mkdir()  # is no caption
    examples = open_examples(source, caption="default")
    assert [examples.name(i) for i in range(len(examples))] == ["a.png", "c.png"]
    assert examples.broken["b.png"] == "cannot be read (No such file or directory)"
    assert examples.broken["d.png"] == "cannot be read (File name too long)"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"text": "a"}', "no file_name"),
        ('{"file_name": 3, "text": "a"}', "no file_name"),
        ('{"file_name": "a.png", "text": 3}', "not text"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "not text"),
        ('{"file_name": "./b.png", "text": "again"}', "a line above tells of the same picture"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_bad_metadata_is_an_error_that_tells_the_line(tmp_path, line, reason):
    line = line.encode() if isinstance(line, str) else line
    folder(tmp_path, {"a.png": encoded(), "metadata.jsonl": b'{"file_name": "b.png", "text": ""}\n' + line})
    with pytest.raises(RequestError, match=r"metadata.jsonl, line 2: .*" + reason) as error:
        open_examples(str(tmp_path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_metadata_that_cannot_be_opened_is_an_error(tmp_path):
    folder(tmp_path, {"a.png": encoded()})
    (tmp_path / "metadata.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RequestError, match=r"metadata.jsonl: cannot be read \(No such file"):
        open_examples(str(tmp_path))


def test_a_line_without_an_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_CAPTION_BYTES", 1000)
    folder(tmp_path, {"a.png": encoded(), "metadata.jsonl": '{"file_name": "a.png", "text": "' + "a" * 2000})
    with pytest.raises(RequestError, match=r"line 1: .*not valid JSON"):
        open_examples(str(tmp_path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
lines = st.one_of(
    st.binary(max_size=60),
    st.dictionaries(st.sampled_from(["file_name", "text", "caption", "x"]), json_values).map(
        lambda value: json.dumps(value).encode()
    ),
    st.builds(lambda name, text: json.dumps({"file_name": name, "text": text}).encode(), st.text(), st.text()),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(lines, max_size=4))
def test_any_metadata_is_read_or_refused(tmp_path, content):
    folder(tmp_path, {"a.png": encoded(), "metadata.jsonl": b"\n".join(content)})
    try:
        examples = open_examples(str(tmp_path), caption="c")
    except RequestError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert isinstance(examples[0].caption.encode(), bytes)
    assert len(examples.summary().splitlines()) == 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.dictionaries(st.sampled_from("abcdef"), st.text(min_size=1), min_size=1))
def test_metadata_round_trips(tmp_path, captions):
    text = "\n".join(json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in captions.items())
    (tmp_path / "metadata.jsonl").write_text(text)
    try:
        found = shards.read_metadata(tmp_path / "metadata.jsonl")
    except RequestError:
        assert any(0xD800 <= ord(character) <= 0xDFFF for text in captions.values() for character in text)
        return
    assert found == {f"{name}.png": text.strip() for name, text in captions.items()}


# ------------------------------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_every_format(tmp_path, format):
    long = "l" * 90 + ("" if format == tarfile.USTAR_FORMAT else "ong" * 60)
    unicode = "é" if format != tarfile.PAX_FORMAT else "日本"
    source = tar(
        tmp_path / "a.tar",
        {
            "0.png": encoded("red"),
            "0.txt": "red\n",
            "0.cls": "3",
            "sub.dir/1.JPEG": encoded("blue", format="JPEG", quality=100),
            "sub.dir/1.json": json.dumps({"caption": "blue", "width": 8}),
            f"{long}.webp": encoded("white", format="WEBP", lossless=True),
            f"{long}.txt": "white",
            f"{unicode}.txt": "before its picture",
            f"{unicode}.png": encoded("black"),
            "both.txt": "from txt",
            "both.json": json.dumps({"text": "from json"}),
            "both.png": encoded(),
            "none.json": json.dumps({"text": None}),
            "none.png": encoded(),
            "two.dots.txt": "not a caption",
            "two.png": encoded(),
        },
        format,
    )
    examples = open_examples(source, caption="default")
    assert examples.broken == {}
    found = contents(examples)
    assert {name: caption for name, (caption, _) in found.items()} == {
        "0.png": "red",
        "1.jpeg": "blue",
        f"{long}.webp": "white",
        f"{unicode}.png": "before its picture",
        "both.png": "from txt",
        "none.png": "default",
        "two.png": "default",
    }
    assert found["0.png"][1] == (255, 0, 0)
    assert found[f"{unicode}.png"][1] == (0, 0, 0)
    with pytest.raises(RequestError, match="2 of 7 pictures have no caption"):
        open_examples(source)


def test_other_files_of_shards_are_counted_and_named(tmp_path, caplog):
    tar(tmp_path / "0.tar", {"0.png": encoded(), "0.txt": "", "0.seg.png": encoded(), "5.AVIF": b"", ".hidden": b""})
    tar(tmp_path / "1.tar", {"1.png": encoded(), "6.avif": b"", "README": b""})
    source = str(tmp_path / "*.tar")
    with caplog.at_level(logging.WARNING):
        assert len(open_examples(source, caption="")) == 2
    [told] = [record.getMessage() for record in caplog.records]
    assert told == f"{source}: left out, no pictures: 1 .seg.png, 2 .avif, 1 without an ending"


def test_offsets_are_those_of_tarfile(tmp_path):
    random = np.random.default_rng(0)
    files = {f"{i}.txt": random.bytes(int(random.integers(2000))) for i in range(50)}
    path = Path(tar(tmp_path / "a.tar", files, tarfile.PAX_FORMAT))
    for key, sample in shards.index_shard(path, {"txt"}).samples.items():
        with sample["txt"].open(1 << 20) as file:
            assert file.read() == files[f"{key}.txt"]
            assert file.read() == b""
            assert file.seek(-1, os.SEEK_END) == max(len(files[f"{key}.txt"]) - 1, 0)
            assert file.read() == files[f"{key}.txt"][-1:]


def test_patterns(tmp_path):
    for i in range(12):
        tar(tmp_path / f"{i:03}.tar", {f"{i}.png": encoded(), f"{i}.txt": str(i)})
    for pattern, expected in {
        "{000..002}.tar": [0, 1, 2],
        "{009..011}.tar": [9, 10, 11],
        "*.tar": list(range(12)),
        "0{0,1}1.tar": [1, 11],
        "{00,01}{0..1}.tar": [0, 1, 10, 11],
        "00[3-4].tar": [3, 4],
        "005.tar": [5],
    }.items():
        examples = open_examples(str(tmp_path / pattern))
        assert [int(examples.caption(i)) for i in range(len(examples))] == expected, pattern
    literal = tmp_path / "{x,y}[1].tar"
    tar(literal, {"a.png": encoded(), "a.txt": "literal"})
    assert open_examples(str(literal)).caption(0) == "literal"


@pytest.mark.parametrize(
    "pattern",
    ["{000..012}.tar", "no*.tar", "{9..1}.tar", "{0..99999999}.tar", "{0..9999}{0..9999}.tar", "{0..9}" * 20 + ".tar",
     "a\0.tar", "a" * 5000 + ".tar", "[.tar", "nothing", "", "{.tar", "x{a..c}.tar"],
)  # fmt: skip
def test_patterns_without_a_shard_are_an_error(tmp_path, pattern):
    tar(tmp_path / "000.tar", {"0.png": encoded(), "0.txt": "a"})
    with pytest.raises(RequestError) as error:
        open_examples(str(tmp_path / "sub" / pattern) if pattern == "" else f"{tmp_path}/{pattern}" if pattern else "")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "pattern", ["a{1..3}b", "{08..11}", "{8..11}", "{0..0}", "{a,b}{1,2}", "x{,y}z", "{1..2}.{3..4}", "{001..3}", "{a}"]
)
def test_braces_are_those_of_the_shell(pattern):
    shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
    assert shards.expand(pattern) == shell.stdout.splitlines()


def test_count_is_for_shapes(tmp_path):
    with pytest.raises(RequestError, match="count is for shapes only"):
        open_examples(str(tmp_path), count=3)


def test_hostile_members_are_named_and_nothing_is_written(tmp_path, monkeypatch):
    path = tmp_path / "inner" / "h.tar"
    path.parent.mkdir()
    good = encoded()
    with tarfile.open(path, "w") as archive:

        def add(name, content=b"", **fields):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))

        add("../../escape.png", good)
        add("/absolute.png", good)
        add("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.png", type=tarfile.LNKTYPE, linkname="../../escape.png")
        add("device.png", type=tarfile.CHRTYPE)
        add("pipe.png", type=tarfile.FIFOTYPE)
        add("folder.png", type=tarfile.DIRTYPE)
        add("twice.png", good)
        add("twice.png", good)
        add("two.png", good)
        add("two.jpg", good)
        add("alone.txt", b"a caption")
        add("large.png", good + bytes(5000))
        add("long.png", good)
        add("long.txt", b"a" * 5000)
        add("number.png", good)
        add("number.json", b'{"text": 3}')
        add("deep.png", good)
        add("deep.json", b"[" * 4000)
        add("bad\x1b[31m.png", b"")
    monkeypatch.setattr(data, "MOST_PICTURE_BYTES", 5000)
    monkeypatch.setattr(data, "MOST_CAPTION_BYTES", 4000)
    before = sorted(tmp_path.rglob("*"))
    examples = open_examples(str(path), caption="")
    assert sorted(tmp_path.rglob("*")) == before
    assert {os.path.basename(examples.name(i)) for i in range(len(examples))} == {"escape.png", "absolute.png"}
    reasons = {os.path.basename(name): reason for name, reason in examples.broken.items()}
    for name, expected in {
        "link.png": "link",
        "hard.png": "link",
        "device.png": "not a plain file",
        "pipe.png": "not a plain file",
        "twice.png": "twice",
        "two": "2 pictures of this name",
        "alone": "0 pictures of this name",
        "large.png": "more than the 5,000",
        "long.png": "more than the 4,000",
        "number.png": "not text",
        "deep.png": "not valid JSON",
        "bad\x1b[31m.png": "not a readable image",
    }.items():
        assert expected in reasons.pop(name), name
    assert not reasons
    assert examples.summary().isprintable()


def member_header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """A header of GNU's format whose size may be anything, in its base-256 form."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")
    block[136:148], block[148:156], block[156:157] = b"00000000000\0", b" " * 8, kind
    block[257:265] = b"ustar  \0"
    if kind == b"S":
        block[483:495] = b"%011o\0" % size  # with its holes
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


GOOD = member_header(b"good.png", len(encoded())) + padded(encoded())
END = bytes(1024)


DAMAGES = {
    "huge size": (member_header(b"huge.png", 1 << 60), {"huge.png", "h.tar"}),
    "negative size": (member_header(b"minus.png", -1024) + END, {"h.tar"}),
    "back to the start": (member_header(b"minus.png", -len(GOOD) - 512) + END, {"h.tar"}),
    "negative long name": (member_header(b"x", -512, b"L") + END, {"h.tar"}),
    "huge long name": (member_header(b"x", 1 << 60, b"L") + END, {"h.tar"}),
    "long name of a megabyte": (
        member_header(b"x", 1 << 20, b"L") + b"a" * (1 << 20) + member_header(b"p.png", 0) + END,
        {"h.tar"},
    ),
    "huge pax": (member_header(b"x", 1 << 60, b"x") + END, {"h.tar"}),
    "pax of negative size": (
        member_header(b"x", 16, b"x") + padded(b"16 size=-000512\n") + member_header(b"p.png", 0) + END,
        {"h.tar"},
    ),
    "pax of no number": (
        member_header(b"x", 12, b"x") + padded(b"12 size=abc\n") + member_header(b"p.png", 0) + END,
        {"p.png"},
    ),
    "long names without end": (member_header(b"x", 0, b"L") * 5000, {"h.tar"}),
    "cut off in a file": ((member_header(b"cut.png", 9000) + bytes(9000))[:4000], {"cut.png", "h.tar"}),
    "cut off in a header": (member_header(b"cut.png", 90)[:100], {"h.tar"}),
    "cut off between files": (b"", {"h.tar"}),
    "rubbish": (b"rubbish!" * 500, {"h.tar"}),
    "sparse": (GOOD.replace(GOOD[:512], member_header(b"sparse.png", len(encoded()), b"S")) + END, {"sparse.png"}),
    "digits": (member_header(b"x", 16384, b"x") + b"1" * 16384 + member_header(b"p.png", 0) + END, {"p.png"}),
}


@pytest.mark.parametrize(("rest", "left"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_archives_keep_what_is_whole(tmp_path, rest, left):
    path = tmp_path / "h.tar"
    path.write_bytes(GOOD + rest)
    start = time.perf_counter()
    examples = open_examples(str(path), caption="")
    assert time.perf_counter() - start < 5
    assert contents(examples) == {"good.png": ("", (255, 0, 0))}
    assert {os.path.basename(name) for name in examples.broken} == left, examples.broken


@pytest.mark.parametrize("content", [b"", b"hello" * 1000, bytes(4000), b"\x1f\x8b" + bytes(600)])
def test_what_is_no_archive_is_named(tmp_path, content):
    good = tar(tmp_path / "0.tar", {"0.png": encoded()})
    (tmp_path / "1.tar").write_bytes(content)
    examples = open_examples(str(tmp_path / "*.tar"), caption="")
    assert len(examples) == 1
    if content.strip(b"\0"):  # nothing but zeros is an archive without files
        assert "not a plain tar archive" in examples.broken[str(tmp_path / "1.tar")]
        assert str(tmp_path / "1.tar") in examples.summary()
        os.remove(good)
        with pytest.raises(RequestError, match="not a plain tar archive"):
            open_examples(str(tmp_path / "*.tar"), caption="")


WHOLE = GOOD + member_header(b"b.txt", 3) + padded(b"abc") + member_header(b"x" * 99, 9, b"x") + padded(b"9 path=a\n")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(WHOLE)))
def test_any_archive_is_read_or_refused(tmp_path, changes, length):
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place] = value
    for start in range(0, len(content), 512):  # so that more than the checksum is tried
        if content[start + 257 : start + 262] == b"ustar":
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path = tmp_path / "h.tar"
    path.write_bytes(content[:length])
    try:
        load_example(open_examples(str(path), caption=""), 0)
    except RequestError as error:
        assert len(str(error).splitlines()) == 1


def test_a_shard_is_indexed_by_its_headers(tmp_path):
    """A member is not read but for its own header: 2 GB of zeros, which are a hole in the file, cost nothing."""
    path = tmp_path / "h.tar"
    with path.open("wb") as file:
        for i in range(8):
            file.write(member_header(b"%d.bin" % i, 1 << 28))
            file.seek(1 << 28, os.SEEK_CUR)
        file.write(GOOD + END)
    start = time.perf_counter()
    assert len(open_examples(str(path), caption="")) == 1
    assert time.perf_counter() - start < 0.5


# ------------------------------------------------------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_example_comes_once_an_epoch(count, size, seed):
    batches = Batches(count, size, seed)
    epochs = 4
    stream = [index for step in range(math.ceil(epochs * count / size)) for index in batches[step]]
    orders = [stream[epoch * count : (epoch + 1) * count] for epoch in range(epochs)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count > 12:
        assert len({tuple(order) for order in orders}) == epochs


@settings(max_examples=60, deadline=None)
@given(buckets=st.lists(st.integers(0, 4), min_size=1, max_size=60), size=st.integers(1, 9), seed=st.integers(0, 3))
def test_batches_of_one_bucket(buckets, size, seed):
    batches = Batches(len(buckets), size, seed, buckets)
    members = Counter(buckets)
    steps = sum(math.ceil(number / size) for number in members.values())
    assert batches.groups_per_epoch == steps
    for epoch in range(3):
        plan = [batches[epoch * steps + step] for step in range(steps)]
        assert all(len(batch) == size for batch in plan)
        assert all(len({buckets[index] for index in batch}) == 1 for batch in plan)
        times = Counter(index for batch in plan for index in batch)
        for index, bucket in enumerate(buckets):
            most = 2 if members[bucket] >= size else math.ceil(size / members[bucket])
            assert 1 <= times[index] <= most
        for batch in plan:
            if members[buckets[batch[0]]] >= size:
                assert len(set(batch)) == size
        for bucket, number in members.items():  # no more is repeated than fills the last batch
            assert sum(times[i] for i, own in enumerate(buckets) if own == bucket) == math.ceil(number / size) * size


def test_groups_of_one_bucket():
    """A batch of several groups mixes buckets, so that nothing repeats where a group is one example."""
    buckets = [0] * 7 + [1] * 2 + [2]
    batches = Batches(10, 4, 0, buckets, group=1)
    epoch = [index for step in range(5) for index in batches[step]]
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10)) and epoch[:10] != epoch[10:]
    pairs = Batches(10, 4, 0, buckets, group=2)
    for step in range(12):
        batch = pairs[step]
        assert len(batch) == 4 and all(buckets[a] == buckets[b] for a, b in (batch[:2], batch[2:]))
    with pytest.raises(RequestError, match="batch size"):
        Batches(10, 4, 0, buckets, group=3)


def test_one_bucket_that_batches_divide_is_an_order_without_repeats():
    batches = Batches(24, 4, 1, [7] * 24)
    first, second = ([index for step in range(6) for index in batches[start + step]] for start in (0, 6))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second


def test_buckets_are_mixed_within_an_epoch():
    buckets = [0] * 500 + [1] * 500
    batches = Batches(1000, 10, 0, buckets)
    kinds = [buckets[batches[step][0]] for step in range(100)]
    changes = sum(a != b for a, b in pairwise(kinds))
    assert 30 < changes < 70  # 49.5 are expected, with a deviation of 5


@pytest.mark.parametrize("buckets", [None, [i % 4 for i in range(101)]])
def test_a_run_resumed_at_any_step_sees_the_same(buckets):
    whole = [Batches(101, 8, 5, buckets)[step] for step in range(60)]
    sequential = Batches(101, 8, 5, buckets)
    assert [sequential[step] for step in range(60)] == whole
    for start in (1, 12, 13, 14, 59):
        resumed = Batches(101, 8, 5, buckets)
        assert [resumed[step] for step in range(start, 60)] == whole[start:]
    assert [sequential[step] for step in reversed(range(60))] == whole[::-1]
    assert Batches(101, 8, 6, buckets)[0] != whole[0]
    assert Batches(101, 8, 5, buckets)[0] != whole[13]


def test_the_order_is_the_same_on_every_machine():
    assert Batches(10, 5, 0)[0] == [0, 9, 8, 1, 7]
    assert Batches(10, 5, 0, [0, 1] * 5)[0] == [9, 1, 7, 3, 5]


def test_orders_are_uniform():
    """The place of one example over 2000 seeds: chi-squared of 10 places, 9 degrees of freedom."""
    from scipy.stats import chisquare

    places = Counter(Batches(10, 10, seed)[0].index(3) for seed in range(2000))
    assert chisquare([places[place] for place in range(10)]).pvalue > 1e-4


@pytest.mark.parametrize("buckets", [None, [i % 20 for i in range(1_000_000)]])
def test_a_million_examples_are_fast(buckets):
    batches = Batches(1_000_000, 64, 0, buckets)
    start = time.perf_counter()
    batches[0]
    first = time.perf_counter() - start
    start = time.perf_counter()
    for step in range(1000):
        batches[step]
    assert first < 15
    assert time.perf_counter() - start < 1
    print(f"first {first:.2f} s, 1000 more {time.perf_counter() - start:.3f} s")


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 0), (3, 1, 0, [0, 1]), (1, 1, 0, [])])
def test_batches_refuse(arguments):
    with pytest.raises(RequestError, match="expected 1 or more examples"):
        Batches(*arguments)
    with pytest.raises(IndexError):
        Batches(3, 1, 0)[-1]


# ------------------------------------------------------------------------------------------------------------- sizes


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 8, 64]), st.integers(1, 40), st.integers(1, 80))
def test_bucket_sizes_are_all_that_are_as_large_as_can_be(side, multiple, least, most):
    side, least, most = 8 * side, 8 * least, 8 * most
    sides = [n for n in range(multiple, most + 1, multiple) if n >= least]
    allowed = {(w, h) for w in sides for h in sides if w * h <= side * side} if len(sides) < 99 else None
    try:
        sizes = bucket_sizes(side, multiple, least, most)
    except RequestError:
        assert not allowed
        return
    assert sizes == sorted(set(sizes))
    if allowed is not None:
        wide = set(dict(sorted(allowed)).items())  # the highest of each width
        assert set(sizes) == wide | {(h, w) for w, h in wide}


def test_bucket_sizes_of_sd_v1():
    sizes = bucket_sizes(512)
    assert (512, 512) in sizes
    assert (256, 1024) in sizes
    assert (1024, 256) in sizes
    assert all(w % 64 == h % 64 == 0 and w * h <= 512 * 512 for w, h in sizes)
    assert {(384, 640), (448, 576), (320, 768)} <= set(sizes)
    with pytest.raises(RequestError, match="no size has sides"):
        bucket_sizes(512, 64, 600, 700)
    with pytest.raises(RequestError, match="positive"):
        bucket_sizes(512, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20), st.randoms())
def test_pictures_go_to_the_nearest_ratio(sizes, random):
    buckets = bucket_sizes(512)
    random.shuffle(buckets)
    for (width, height), bucket in zip(sizes, assign(sizes, buckets), strict=True):
        distances = [abs(math.log(width / height) - math.log(w / h)) for w, h in buckets]
        assert distances[bucket] == pytest.approx(min(distances), abs=1e-12)


def test_exact_sizes_go_to_their_own_bucket():
    buckets = bucket_sizes(512)
    assert assign(buckets, buckets) == list(range(len(buckets)))
    assert assign([(3, 7)], [(64, 64)]) == [0]
    start = time.perf_counter()
    assert len(assign([(640, 480)] * 1_000_000, buckets)) == 1_000_000
    assert time.perf_counter() - start < 5


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width) * 255 / width, np.arange(height) * 255 / height)
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(("source", "size"), [((96, 64), (32, 32)), ((64, 128), (32, 32)), ((60, 40), (120, 40))])
def test_fit_is_to_resize_and_to_cut_the_middle(source, size):
    image = gradient(*source)
    scale = max(size[0] / source[0], size[1] / source[1])
    whole = image.resize((round(source[0] * scale), round(source[1] * scale)), Image.Resampling.LANCZOS)
    left, top = (whole.width - size[0]) // 2, (whole.height - size[1]) // 2
    expected = np.asarray(whole.crop((left, top, left + size[0], top + size[1])), dtype=int)
    fitted = fit(image, size)
    inside = (slice(4, -4), slice(4, -4))  # at a cut, the filter sees what is cut off in one and not in the other
    assert np.abs(np.asarray(fitted, dtype=int) - expected)[inside].max() <= 1
    assert np.array_equal(np.asarray(fit(image, size, flip=True)), np.asarray(fitted)[:, ::-1])


def test_fit_crops_by_chance_within_the_picture():
    image = gradient(256, 64)
    lefts = []
    for seed in range(200):
        cut = np.asarray(fit(image, (64, 64), Random(seed)), dtype=float)
        assert np.array_equal(cut, fit(image, (64, 64), Random(seed)))
        assert np.allclose(np.diff(cut[32, 4:-4, 0]), 1, atol=1)  # nothing is stretched
        lefts.append(cut[32, 32, 0] - 32)
    assert min(lefts) < 12 <= 180 < max(lefts) <= 193
    assert np.mean(lefts) == pytest.approx(96, abs=15)


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (64, 64), (63, 65)])
def test_fit_of_any_picture_costs_no_more_than_its_result(size):
    start = time.perf_counter()
    assert fit(Image.new("RGB", size, "red"), (512, 448)).getcolors() == [(512 * 448, (255, 0, 0))]
    assert time.perf_counter() - start < 2


class HalfVAE(torch.nn.Module):
    """Takes the mean of each 8×8 for a latent."""

    def __init__(self):
        super().__init__()
        self.encoder = self.quant_conv = torch.nn.Linear(1, 1)
        self.config = SimpleNamespace(latent_channels=3, downsampling=8)
        self.calls = 0

    def encode(self, image):
        self.calls += 1
        mean = torch.nn.functional.avg_pool2d(image, 8)
        return SimpleNamespace(mean=mean, logvar=torch.zeros_like(mean))


def test_cache_follows_its_pictures(tmp_path):
    """Read where nothing changed, made anew where a picture did; a broken one gives way to another and its caption."""
    folder, file, sizes = tmp_path / "pictures", tmp_path / "latents.safetensors", [(16, 16)] * 3
    folder.mkdir()
    for number, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(colour)
    vae = HalfVAE()

    def cached():
        examples = open_examples(str(folder))
        return examples, open_cache(file, vae, examples, sizes, torch.device("cpu"))

    examples, cache = cached()
    assert torch.equal(cache[0][:3].mean(dim=(1, 2)), torch.tensor([1, -1, -1]).half()) and cache.sources == [0, 1, 2]
    assert torch.equal(cache[0][3:], torch.ones(3, 2, 2).half())
    cached()
    assert vae.calls == 1
    content = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes((folder / "2.png").read_bytes())
    _, cache = cached()
    assert vae.calls == 2 and torch.equal(cache[0], cache[2])
    (folder / "0.png").write_bytes(content[:45])  # whose header is whole
    for _ in range(2):
        examples, cache = cached()
        assert cache.sources == [1, 1, 2] and torch.equal(cache[0], cache[1])
    assert vae.calls == 3 and examples.caption(cache.sources[0]) == "lime"


# ------------------------------------------------------------------------------------------------------------- prior


class Drawn:
    """Stands in for the pipeline."""

    def __init__(self, *_):
        self.resolve = lambda request: request
        self.generate = lambda request: [Image.new("RGB", (8, 8), "red")]


@pytest.mark.parametrize("lost", [("0.png",), ("0.txt",), ("0.png", "0.txt"), ()])
def test_what_a_prior_lacks_is_drawn_again(tmp_path, monkeypatch, lost):
    (tmp_path / "t.toml").write_text(
        'task = "diffusion"\nfolder = "run"\nmodel = "m"\n[data]\nsource = "s"\n[loop]\nsteps = 1\nbatch_size = 1\n'
    )
    config = read_train_config(tmp_path / "t.toml", ['prior.prompts=["a", "b"]', "prior.count=3"])
    monkeypatch.setattr(prior, "StableDiffusion", Drawn)
    networks = {name: torch.nn.Linear(1, 1) for name in ("unet", "vae", "text")}
    model = SimpleNamespace(**networks, config=SimpleNamespace(schedule=None))

    def draw():
        return prior.draw_prior(tmp_path, model, config, Accelerator(cpu=True))

    drawn = draw()
    written = {path.name: path.stat().st_mtime_ns for path in drawn.iterdir()}
    assert sorted(written) == ["0.png", "0.txt", "1.png", "1.txt", "2.png", "2.txt"]
    for name in lost:
        (drawn / name).unlink()
    assert draw() == drawn
    examples = open_examples(str(drawn))
    assert [examples.caption(i) for i in range(len(examples))] == ["a", "b", "a"]
    again = {path.name for path in drawn.iterdir() if path.stat().st_mtime_ns != written[path.name]}
    assert again == ({"0.png", "0.txt"} if lost else set())
