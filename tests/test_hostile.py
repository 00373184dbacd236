"""Bytes and configs nobody would write: an answer or a CheckpointError, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHIPPED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ldm import ScheduleConfig
from ldm.checkpoint import detect, load_model
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
