"""Bytes and configs nobody would write: an answer or a CheckpointError, and nothing else."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import MEASURED, SHIPPED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ldm import ScheduleConfig
from ldm.checkpoint import detect, load_model, load_text
from ldm.checkpoint.inspect import inspect, to_text
from ldm.cli import main
from ldm.diffusion import NoiseSchedule
from ldm.errors import CheckpointError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    """The smallest of files that might be a model: every name that tells a network, with a shape too small for one."""
    path = tmp_path_factory.mktemp("hostile") / "m.safetensors"
    names = [
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "first_stage_model.quant_conv.weight",
        "betas",
    ]
    save_file({name: torch.zeros(2, 2) for name in names}, path, metadata={"format": "pt"})
    return path.read_bytes()


@settings(SLOW, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    st.integers(0, 500),
)
def test_mutated_files(valid, tmp_path, edits, cut):
    content = bytearray(valid)
    for position, patch in edits:
        content[position : position + len(patch)] = patch
    path = tmp_path / "m.safetensors"
    path.write_bytes(content[: len(content) - cut] if cut < 100 else content)
    with pytest.raises(CheckpointError):
        load_model(path)


@SLOW
@given(st.binary(max_size=300))
def test_arbitrary_files(tmp_path, content):
    path = tmp_path / "m"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_model(path)


@pytest.mark.parametrize(
    ("file", "parse"),
    [
        ("unet/config.json", detect.unet_from_json),
        ("unet/config.json", detect.cfg_scale_from_json),
        ("vae/config.json", detect.vae_from_json),
        ("text_encoder/config.json", detect.text_from_json),
        ("scheduler/scheduler_config.json", detect.schedule_from_json),
    ],
)
@settings(SLOW, max_examples=200)
@given(data=st.data())
def test_mutated_configs(file, parse, data):
    config = json.loads((SHIPPED / file).read_text())
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(config)), JSON, min_size=1, max_size=3))
    try:
        parsed = parse(config | changes, file)
        if isinstance(parsed, ScheduleConfig):
            NoiseSchedule(parsed)
    except (CheckpointError, ValueError) as error:  # the caller makes one of the other
        assert "\n" not in str(error)


@SLOW
@given(st.dictionaries(st.text(max_size=40), st.lists(st.integers(0, 9), max_size=4).map(tuple)))
def test_arbitrary_shapes(shapes):
    shapes["input_blocks.1.0.in_layers.2.weight"] = shapes["encoder.conv_in.weight"] = (4, 4)
    for parse in (
        lambda: detect.unet_from_shapes(shapes, "compvis", "f"),
        lambda: detect.vae_from_shapes(shapes, "compvis", "f"),
        lambda: detect.text_from_shapes(shapes, "compvis", "f"),
    ):
        with pytest.raises((CheckpointError, KeyError, IndexError, ValueError)):
            parse()


# --- files that lie ---------------------------------------------------------------------------------------------------


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header: text, or what becomes JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape=(1,), offsets=(0, 4), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


KEY = "first_stage_model.quant_conv.weight"
FOUR = b"\0" * 4
BYTES = {  # content of a file under the name m.safetensors → what the message must say
    "no bytes": (b"", "it has 0 bytes, the format begins with 8"),
    "one byte": (b"\x01", "it has 1 bytes"),
    "seven bytes": (b"\x01" * 7, "it has 7 bytes"),
    "header of 2^63 bytes": (raw(b"{}", length=1 << 63), "it is cut short or of another kind"),
    "header of 2^64 - 1 bytes": (raw(b"{}", length=(1 << 64) - 1), "it is cut short or of another kind"),
    "header past the end": (raw({KEY: entry()}, length=500), "it is cut short or of another kind"),
    "header of no bytes": (raw(b""), "the header is not a JSON object"),
    "header that is no JSON": (raw(b"{nonsense}"), "the header is not valid JSON"),
    "header that is a list": (raw([1, 2]), "the header is not a JSON object"),
    "header with text behind it": (raw(b"{} {}"), "the header is not valid JSON"),
    "header not in UTF-8": (raw(b'{"\xff\xfe": 1}'), "not text in UTF-8"),
    "deep nesting": (raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
    "deep nesting of lists": (raw(b'{"a":' + b"[" * 500_000), "nested too deeply"),
    "too many entries": (raw(b'{"a":[' + b"1," * 1_000_001 + b"1]}"), "more entries than any model"),
    "huge integer": (raw(b'{"a":' + b"9" * 100_000 + b"}"), "a number of 100000 digits"),
    "duplicate names": (raw(b'{"a":{},"a":{}}'), "the header has 'a' twice"),
    "duplicate dtype": (
        raw(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', FOUR),
        "the header has 'dtype' twice",
    ),
    "metadata that is not text": (raw({"__metadata__": {"a": 1}}), "__metadata__ must map names to text"),
    "metadata that is a list": (raw({"__metadata__": ["a"]}), "__metadata__ must map names to text"),
    "entry that is a number": (raw({KEY: 1}), "must have a dtype, a shape and data_offsets"),
    "entry without a shape": (raw({KEY: {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR), "must have a dtype"),
    "entry with more": (raw({KEY: entry() | {"code": "x"}}, FOUR), "must have a dtype"),
    "unknown dtype": (raw({KEY: entry(dtype="Q4_0")}, FOUR), "has the dtype 'Q4_0'"),
    "dtype that is a list": (raw({KEY: entry(dtype=["F32"])}, FOUR), "has the dtype"),
    "negative shape": (raw({KEY: entry([-1])}, FOUR), "has the shape [-1]"),
    "fractional shape": (raw({KEY: entry([1.0])}, FOUR), "has the shape [1.0]"),
    "boolean shape": (raw({KEY: entry([True])}, FOUR), "has the shape [True]"),
    "shape of too many dimensions": (raw({KEY: entry([1] * 99)}, FOUR), "has the shape"),
    "shape × dtype overflows": (raw({KEY: entry([1 << 62, 4])}, FOUR), "bytes by dtype and shape, 4 by data_offsets"),
    "shape × dtype wraps around to 4": (raw({KEY: entry([(1 << 62) + 1])}, FOUR), "by dtype and shape"),
    "offsets reversed": (raw({KEY: entry(offsets=(4, 0))}, FOUR), "by data_offsets"),
    "three offsets": (raw({KEY: entry(offsets=(0, 2, 4))}, FOUR), "has the data_offsets"),
    "offsets past the end": (raw({KEY: entry(offsets=(96, 100))}, FOUR), "leaves a hole"),
    "data cut short": (raw({KEY: entry([4], (0, 16))}, FOUR), "the tensors end at byte"),
    "overlap": (raw({"a": entry(), "b": entry()}, FOUR), "'b' overlaps the tensor before it"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(8, 12))}, FOUR * 3), "'b' leaves a hole before it"),
    "trailing bytes": (raw({"a": entry()}, FOUR + b"#!/bin/sh"), "the tensors end at byte"),
    "web page": (b"<!doctype html><html>Access denied</html>", "a web page, not a model"),
    "web page with white space": (b"\n  <html>\n" + b" " * 99, "a web page, not a model"),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n",
        "a Git LFS pointer, not the file it stands for",
    ),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 99, "a GGUF file"),
    "plain pickle": (pickle.dumps({"a": 1}), "a pickle under the name of a safer format"),
    "text": (b"hello, I am a text file\n" * 9, "it is cut short or of another kind"),
    "a name that is no text": (raw(json.dumps({"\ud800": entry([0], (0, 0))}).encode()), "half a character in a name"),
    "metadata that are no text": (
        raw(json.dumps({"__metadata__": {"author": "\udfff"}}).encode()),
        "half a character in a name or in its metadata",
    ),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "it is a picture"),
    "a gigantic network of no bytes": (
        raw(
            json.dumps(
                {
                    "input_blocks.0.0.weight": entry([1 << 30, 4, 0, 3], (0, 0)),
                    "input_blocks.1.0.in_layers.2.weight": entry([1 << 30, 0], (0, 0)),
                    "out.2.weight": entry([4, 0], (0, 0)),
                    "middle_block.1.transformer_blocks.0.attn2.to_k.weight": entry([0, 768], (0, 0)),
                }
            ).encode()
        ),
        "channels is 1073741824; only 1 to 16384",
    ),
    "zip that is no PyTorch file": (
        b"PK\x03\x04 not really a zip",
        "it is a PyTorch file that is damaged or cut short: download it again",
    ),
}


class Harmful:
    """A pickle that makes a file when it is opened by a careless reader."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)


def save_compressed(content: dict, path: Path) -> None:
    torch.save(content, path.with_suffix(".tmp"))
    with (
        zipfile.ZipFile(path.with_suffix(".tmp")) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    path.with_suffix(".tmp").unlink()


PICKLES = {  # how to write m.ckpt, given the path of a file that must not appear → what the message must say
    "code in a zip": (lambda path, canary: torch.save({"a": Harmful(canary)}, path), "it wants to call posix.system"),
    "code in a state dict": (
        lambda path, canary: torch.save({"state_dict": {"a": torch.zeros(1), "b": Harmful(canary)}}, path),
        "it wants to call posix.system",
    ),
    "code in an old PyTorch file": (
        lambda path, canary: torch.save(Harmful(canary), path, _use_new_zipfile_serialization=False),
        "it wants to call posix.system",
    ),
    "code in a plain pickle": (
        lambda path, canary: path.write_bytes(pickle.dumps(Harmful(canary), protocol=2)),
        "damaged or holds more than tensors",
    ),
    "not really a pickle": (lambda path, canary: path.write_bytes(b"\x80\x04\x95 no"), "damaged or holds more"),
    "compressed archive": (lambda path, canary: save_compressed({KEY: torch.zeros(9)}, path), "a compressed archive"),
    "sparse tensor": (lambda path, canary: torch.save({KEY: torch.eye(3).to_sparse()}, path), "a sparse_coo tensor"),
    "quantised tensor": (lambda path, canary: torch.save({KEY: quantised()}, path), "a quantised tensor"),
    "complex tensor": (lambda path, canary: torch.save({KEY: torch.zeros(2).cfloat()}, path), "a complex64 tensor"),
    "tensor larger than its data": (
        lambda path, canary: torch.save({KEY: torch.zeros(()).expand(1 << 20, 1 << 20)}, path),
        "claims the shape [1048576, 1048576]",
    ),
    "no tensors": (lambda path, canary: torch.save({"a": 1}, path), "holds no tensors"),
    "a list": (lambda path, canary: torch.save([1], path), "holds no state dict"),
    "hypernetwork": (
        lambda path, canary: torch.save({"step": 1, 768: [{"linear.weight": torch.zeros(1)}]}, path),
        "this is a hypernetwork",
    ),
    "keys that are no names": (
        lambda path, canary: torch.save({("a",) * 9: 1, "\x1b[31m\nldm: all is well": 2}, path),
        "holds no tensors",
    ),
    "index of many megabytes": (
        lambda path, canary: torch.save({"a": "x" * (5 << 20)}, path),
        "at most 4194304 are allowed",
    ),
    "embedding": (
        lambda path, canary: torch.save({"string_to_param": {"*": torch.zeros(1, 768)}}, path),
        "this is a textual inversion embedding",
    ),
}


def index_of(folder: Path, file: str) -> None:
    """The U-Net's weights by an index that says they are in `file`."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    keys = list(load_file(path))
    path.rename(folder / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(keys, file)}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def link_out(folder: Path) -> None:
    index_of(folder, "a.safetensors")
    (folder / "unet" / "a.safetensors").symlink_to(folder / "elsewhere.safetensors")


def set_config(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NOT_OF_ITS_FOLDER = "which is not a file of its folder"
FOLDERS = {  # what to do to a good folder → what the message must say
    "index leads up": (lambda folder: index_of(folder, "../elsewhere.safetensors"), NOT_OF_ITS_FOLDER),
    "index is absolute": (lambda folder: index_of(folder, str(folder / "elsewhere.safetensors")), NOT_OF_ITS_FOLDER),
    "index with a backslash": (lambda folder: index_of(folder, "..\\elsewhere.safetensors"), NOT_OF_ITS_FOLDER),
    "index names the folder": (lambda folder: index_of(folder, ".."), NOT_OF_ITS_FOLDER),
    "index with a NUL": (lambda folder: index_of(folder, "a\0.safetensors"), NOT_OF_ITS_FOLDER),
    "index with half a character": (lambda folder: index_of(folder, "\ud800.safetensors"), NOT_OF_ITS_FOLDER),
    "index names nothing": (lambda folder: index_of(folder, "absent.safetensors"), "no such file"),
    "link out of the folder": (link_out, NOT_OF_ITS_FOLDER),
    "index of numbers": (
        lambda folder: (
            index_of(folder, "x"),
            (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
        ),
        "weight_map must map",
    ),
    "gigantic U-Net": (
        lambda folder: set_config(folder, "unet/config.json", block_out_channels=[1 << 40] * 3),
        "block_out_channels is",
    ),
    "sizes that are no numbers": (
        lambda folder: set_config(folder, "vae/config.json", layers_per_block="__import__('os')"),
        "layers_per_block is",
    ),
    "activation that is a program": (
        lambda folder: set_config(folder, "text_encoder/config.json", hidden_act="os.system"),
        "hidden_act is 'os.system'; only quick_gelu or gelu is supported",
    ),
    "config with code": (
        lambda folder: set_config(folder, "unet/config.json", act_fn="eval"),
        "act_fn is 'eval'; only 'silu' is supported",
    ),
    "config that is a list": (lambda folder: (folder / "vae/config.json").write_text("[]"), "expected a JSON object"),
}


@pytest.fixture
def run(tmp_path, capsys) -> Callable[[Path, str], None]:
    """Every command that reads models says what is wrong in one line, fails, and writes nothing."""

    def run(path: Path, expected: str) -> None:
        before = set(tmp_path.rglob("*"))
        for command in (
            ["inspect", str(path)],
            ["convert", str(path), str(tmp_path / "out.safetensors")],
            ["convert", str(path), str(tmp_path / "out")],
            ["convert", str(path), str(path), "--dtype", "float16"],
            ["txt2img", "--model", str(path), "--prompt", "", "--outdir", str(tmp_path / "out"), "--device", "cpu"],
        ):
            code = main(command)
            out, err = capsys.readouterr()
            if command[0] == "inspect" and code == 0:  # it describes what only the others refuse
                continue
            message = err.splitlines()[-1]
            assert code == 1, command
            assert message.startswith("ldm: ") and message.isprintable() and len(message) < 1000, message
            assert expected in message, command
            assert "Traceback" not in err and not out
            assert set(tmp_path.rglob("*")) == before, command

    return run


@pytest.mark.parametrize("case", BYTES)
def test_hostile_bytes(case, run, tmp_path):
    content, expected = BYTES[case]
    (tmp_path / "m.safetensors").write_bytes(content)
    run(tmp_path / "m.safetensors", expected)


@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickles(case, run, tmp_path):
    write, expected = PICKLES[case]
    canary = tmp_path / "canary"
    write(tmp_path / "m.ckpt", canary)
    run(tmp_path / "m.ckpt", expected)
    assert not canary.exists()
    (tmp_path / "m.ckpt").rename(tmp_path / "m.safetensors")
    run(tmp_path / "m.safetensors", "a pickle under the name of a safer format")
    assert not canary.exists()


@pytest.mark.parametrize("case", FOLDERS)
def test_hostile_folders(case, run, tmp_path):
    spoil, expected = FOLDERS[case]
    spoil(shutil.copytree(SHIPPED, tmp_path / "model"))
    run(tmp_path / "model", expected)


def test_a_network_of_many_layers_of_no_bytes(tmp_path):
    layers = {f"encoder.layers.{i}.mlp.fc1.weight": entry([8, 0], (0, 0)) for i in range(10_000)}
    ends = {f"embeddings.{what}_embedding.weight": entry([77, 8], (0, 77 * 8 * 4)) for what in ("token", "position")}
    ends["embeddings.position_embedding.weight"]["data_offsets"] = [77 * 8 * 4, 2 * 77 * 8 * 4]
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw(json.dumps(layers | ends).encode(), bytes(2 * 77 * 8 * 4)))
    with pytest.raises(CheckpointError, match="layers is 10000; only 1 to 64 is supported"):
        load_text(path)


def test_header_larger_than_any_models(run, tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(raw(b"{}", length=101 << 20))
        file.truncate(200 << 20)
    run(path, "the header has 105906176 bytes")


def test_pipes_are_not_waited_for(run, tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    run(tmp_path / "m.safetensors", "not a regular file")


def test_unreadable_files(run, tmp_path, monkeypatch):
    """By a stand-in for the system's refusal, which those who may read everything never meet."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw({"a": entry()}, FOUR))

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    run(path, "cannot be read (Permission denied)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_weights(value, tmp_path, run, capsys):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"].view(-1)[7] = value
    save_file(tensors, file, metadata={"format": "pt"})
    run(folder, "conv_in.weight")
    with pytest.raises(CheckpointError, match=r"1 tensors \(conv_in\.weight\) of the U-Net hold NaN or infinity"):
        load_model(folder)
    load_model(folder, allow_nonfinite=True)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--allow-nonfinite"]) == 0


def test_weights_too_large_for_the_dtype(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {key: tensor.float() for key, tensor in load_file(file).items()}
    tensors["decoder.conv_out.bias"][0] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    load_model(folder)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias\) of the VAE hold NaN or infinity in float16"):
        load_model(folder, dtype=torch.float16)


def test_there_are_many_hostile_files():
    assert len(BYTES) + len(PICKLES) + len(FOLDERS) >= 25


COST = {"seconds": 0.0, "examples": 0.0}
JSON_TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"-",
    b"9" * 30,
    b"null",
    b"1e999",
    b"\\u0000",
    b"\\ud800",
    b"\xff",
    b"F64",
]


@settings(SLOW, max_examples=2500)
@given(
    edits=st.lists(
        st.tuples(
            st.floats(0, 1),
            st.sampled_from(JSON_TOKENS) | st.binary(min_size=1, max_size=8),
            st.sampled_from([0, 1, 5, 60]),
        ),
        min_size=1,
        max_size=4,
    ),
    length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 700),
    cut=st.sampled_from([0, 0, 0, 1, 7, 300]),
)
def test_mutated_headers(sound, tmp_path, edits, length, cut):
    """An answer or one line, whatever the header; no more than a second."""
    text, data = bytearray(sound[0]), sound[1]
    for where, patch, removed in edits:
        start = int(where * len(text))
        text[start : start + removed] = patch
    content = raw(bytes(text), data, length)
    path = tmp_path / "m.safetensors"
    path.write_bytes(content[: len(content) - cut])
    start_time = time.perf_counter()
    try:
        report = inspect(path)
        to_text(report)
        json.dumps(report, ensure_ascii=False).encode()
    except CheckpointError as error:
        assert "\n" not in str(error)
    COST["seconds"] = max(COST["seconds"], time.perf_counter() - start_time)
    COST["examples"] += 1
    assert COST["seconds"] < 1


@pytest.fixture(scope="module")
def sound() -> Iterator[tuple[bytes, bytes]]:
    """Header and data of a small file with what a model's has: metadata, several dtypes, several networks."""
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": entry([2, 4], (0, 32)),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": entry(
            [1, 768], (32, 1568), "F16"
        ),
        "first_stage_model.quant_conv.weight": entry([8, 8, 1, 1], (1568, 1632), "F8_E4M3"),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": entry([1, 77], (1632, 2248), "I64"),
        "betas": entry([0], (2248, 2248)),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield json.dumps({"__metadata__": {"format": "pt"}} | tensors).encode(), bytes(2248)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) >> 10
    MEASURED.append(
        f"{COST['examples']:.0f} mutated headers: at most {COST['seconds'] * 1000:.0f} ms each, {grown} MiB more memory"
    )
    assert COST["examples"] >= 2000
    assert grown < 200
