"""What `ldm inspect` says, and that it reads no more than a header."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import MEASURED, SHIPPED
from safetensors.torch import save_file
from synthetic import hollow_file, shapes, state_dict

from ldm.checkpoint.inspect import inspect, to_text
from ldm.cli import main
from ldm.errors import CheckpointError

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."


@pytest.fixture
def full(tmp_path):
    """A full-size file without its data: 4.3 GB that take no space."""
    return hollow_file(tmp_path / "v1.safetensors", shapes("sd-v1-keys.json"), metadata={"format": "pt"})


def test_a_whole_model(full):
    report = inspect(full)
    assert (report["family"], report["variant"]) == ("Stable Diffusion v1", "text to image")
    assert {name: part["parameters"] for name, part in report["parts"].items()} == {
        "unet": 859_520_964, "vae": 83_653_863, "text": 123_060_480,
    }  # fmt: skip
    assert all(part["dtypes"] == {"float32": part["tensors"]} for part in report["parts"].values())
    assert all(part["missing"] == part["unexpected"] == [] for part in report["parts"].values())
    assert report["ignored"] == {"noise schedule": 12, "position ids": 1}
    assert (report["absent"], report["unknown"], report["ema"]) == ([], [], 0)
    assert report["prediction_type"] == "epsilon"
    assert report["metadata"] == {"format": "pt"}
    text = to_text(report)
    assert "v1.safetensors: Stable Diffusion v1, text to image" in text
    assert "859.5 M parameters in 686 tensors, float32, compvis names, model.diffusion_model.*" in text


def test_what_is_absent_missing_surplus_and_repaired(tmp_path):
    manifest = shapes("sd-v1-keys.json", [UNET, TEXT])
    missing = UNET + "out.2.bias"
    del manifest[missing]
    manifest[UNET + "input_blocks.0.0.weight"] = [320, 9, 3, 3]
    manifest |= {UNET + "surplus": [1], "somebodys.own": [2], "model_ema.x": []}
    path = hollow_file(
        tmp_path / "m.safetensors", manifest, dtype="F8_E4M3", metadata={"evil\n": "\x1b[31m" + "x" * 999}
    )
    report = inspect(path)
    assert report["variant"] == "inpainting"
    assert report["absent"] == ["vae"]
    assert report["parts"]["unet"]["missing"] == [missing]
    assert report["parts"]["unet"]["unexpected"] == [UNET + "surplus"]
    assert report["unknown"] == ["somebodys.own"]
    assert report["ema"] == 1
    assert f"{TEXT}embeddings.position_ids are float8_e4m3fn: made anew" in report["repaired"]
    assert any("tensors widened from float8" in text for text in report["repaired"])
    lines = to_text(report).splitlines()
    assert all(line.isprintable() for line in lines)
    assert f"missing: 1: {missing}" in "\n".join(lines)
    assert any("absent" in line and "VAE" in line for line in lines)


def test_an_incomplete_network(tmp_path):
    manifest = shapes("sd-v1-keys.json", [UNET])
    key = UNET + "input_blocks.1.0.in_layers.2.weight"
    report = inspect(hollow_file(tmp_path / "m.safetensors", {k: s for k, s in manifest.items() if k != key}))
    assert f"the U-Net is incomplete: {key} is missing" in report["parts"]["unet"]["fault"]
    assert "fault" in to_text(report)


def test_vae_attention_in_other_spellings(tmp_path, shipped):
    manifest = {
        key.removeprefix("first_stage_model.").replace("attn_1.q.", "attn_1.to_q."): shape[:2]
        if "attn_1.k.w" in key
        else shape
        for key, shape in shapes("sd-v1-keys.json", ["first_stage_model."]).items()
    }
    report = inspect(hollow_file(tmp_path / "m.safetensors", manifest))
    assert report["repaired"] == ["VAE: 4 tensors renamed from another spelling", "VAE: 2 attention weights reshaped"]


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        ({"lora_unet_mid_block.lora_down.weight": torch.zeros(4, 8)}, "a LoRA"),
        ({"emb_params": torch.zeros(2, 768)}, "a textual inversion embedding"),
        ({"control_model.input_blocks.0.0.weight": torch.zeros(1)}, "a ControlNet"),
        ({"conditioner.embedders.0.x": torch.zeros(1)}, "a Stable Diffusion XL model"),
        ({"cond_stage_model.model.ln_final.weight": torch.zeros(1)}, "a Stable Diffusion 2.x model"),
        ({"double_blocks.0.img_attn.proj.weight": torch.zeros(1)}, "a Stable Diffusion 3 or Flux model"),
        ({"ip_adapter.1.to_k_ip.weight": torch.zeros(1)}, "an IP-Adapter"),
    ],
)
def test_other_families(tmp_path, tensors, family):
    save_file(tensors, tmp_path / "m.safetensors", metadata={"ss_network_dim": "4"})
    report = inspect(tmp_path / "m.safetensors")
    assert report["family"] == family
    assert report["metadata"] == {"ss_network_dim": "4"}
    assert "float32" in to_text(report)


def test_sd2_by_its_context(tmp_path):
    manifest = shapes("sd-v1-keys.json", [UNET])
    wide = {key: [shape[0], 1024] if ".attn2.to_k." in key else shape for key, shape in manifest.items()}
    assert inspect(hollow_file(tmp_path / "m.safetensors", wide))["family"] == "a Stable Diffusion 2.x model"


def test_folders_and_pickles(tmp_path):
    report = inspect(SHIPPED)
    assert report["prediction_reason"] == "scheduler_config.json"
    assert [part["names"] for part in report["parts"].values()] == ["diffusers"] * 3
    torch.save({"state_dict": state_dict("tiny-keys.json"), "epoch": 1}, tmp_path / "m.ckpt")
    report = inspect(tmp_path / "m.ckpt")
    assert list(report["parts"]) == ["unet", "vae"]
    assert "left out, training state: epoch" in report["notes"][0]
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(tmp_path / "absent")


def test_command_line(tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    save_file(state_dict("tiny-keys.json"), path)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert main(["inspect", str(path), "--hash"]) == 0
    out = capsys.readouterr().out
    assert f"sha256        {expected}" in out
    assert f"short hash    {expected[:10]}\n" in out
    assert main(["inspect", str(path), "--hash", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sha256"] == expected
    assert report["parts"]["unet"]["config"]["context_dim"] == 48
    assert main(["inspect", str(SHIPPED), "--hash"]) == 2
    assert "--hash is of files" in capsys.readouterr().err
    page = tmp_path / "page.safetensors"
    page.write_text("<html>")
    assert main(["inspect", str(path), str(page), str(SHIPPED)]) == 1
    out, err = capsys.readouterr()
    assert out.count("Stable Diffusion v1,") == 2
    assert "a web page" in err and "1 of 3 cannot be read" in err.splitlines()[-1]
    path.with_suffix(".vae.pt").touch()
    assert main(["inspect", str(path)]) == 0
    assert "will take the place of its VAE" in capsys.readouterr().out


MEASURE = """
import re, sys, time
start = time.perf_counter()
from ldm.cli import main
assert main(["inspect", sys.argv[1]]) == 0
seconds = time.perf_counter() - start
assert "torch" not in sys.modules
with open("/proc/self/status") as status:  # getrusage would tell the parent's peak, if that is higher
    print(seconds, int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) >> 10, file=sys.stderr)
"""


def test_the_header_alone_is_read(full):
    done = subprocess.run([sys.executable, "-c", MEASURE, full], capture_output=True, text=True, check=True)
    seconds, mebibytes = map(float, done.stderr.split())
    MEASURED.append(f"inspect of a 4.3 GB file: {seconds:.2f} s, {mebibytes:.0f} MiB")
    assert seconds < 0.5
    assert mebibytes < 300
