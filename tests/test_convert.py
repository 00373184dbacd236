"""Conversion both ways: bit for bit, whole or not at all, and with little memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import SHIPPED, SHIPPED_TEXT, SIDE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic import hollow_file, shapes, state_dict
from torch import Tensor

from ldm import Request, StableDiffusion
from ldm.checkpoint import load_model, load_vae
from ldm.checkpoint.convert import Conversion, convert
from ldm.checkpoint.inspect import inspect
from ldm.checkpoint.sources import Choices
from ldm.cli import main
from ldm.config import LABELS, SD_V1
from ldm.errors import CheckpointError, RequestError

VERIFIED = Conversion(verify=True)
UNET, VAE = "model.diffusion_model.", "first_stage_model."
UNET_TENSORS = len(load_file(SHIPPED / "unet" / "diffusion_pytorch_model.safetensors"))
POSITIONS = torch.arange(SHIPPED_TEXT.max_length)[None]


@pytest.fixture
def single(tmp_path) -> Path:
    """The shipped model as a single file."""
    convert(SHIPPED, tmp_path / "single.safetensors", conversion=VERIFIED)
    return tmp_path / "single.safetensors"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def same_weights(first, second) -> bool:
    return all(same(getattr(first, name).state_dict(), getattr(second, name).state_dict()) for name in LABELS)


def with_everything(single: Path) -> Path:
    """A single file with all that may be in one: schedule, EMA, position ids, marks, keys of unknown use, metadata."""
    tensors = load_file(single)
    ema = {
        "model_ema.diffusion_model" + key.removeprefix(UNET).replace(".", ""): 2 * tensor
        for key, tensor in tensors.items()
        if key.startswith(UNET)
    }
    extras = {
        "betas": torch.rand(9),
        "model_ema.decay": torch.tensor(0.5),
        "v_pred": torch.zeros(0),
        "somebodys.own": torch.rand(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": POSITIONS,
    }
    path = single.with_name("everything.safetensors")
    save_file(tensors | ema | extras, path, metadata=metadata(single) | {"author": "a painter", "format": "pt"})
    return path


def test_there_and_back(single, tmp_path):
    path = with_everything(single)
    convert(path, tmp_path / "folder", conversion=VERIFIED)
    convert(tmp_path / "folder", tmp_path / "back.safetensors", conversion=VERIFIED)
    assert same(load_file(tmp_path / "back.safetensors"), load_file(path))
    assert metadata(tmp_path / "back.safetensors")["author"] == "a painter"
    first, second = load_model(path), load_model(tmp_path / "back.safetensors")
    assert first.config == second.config == load_model(tmp_path / "folder").config
    assert same_weights(first, second)


def test_a_folder_there_and_back(single, tmp_path, shipped):
    """What CompVis's names and shapes do not tell goes along: heads, groups, scale, size, the tokenizer."""
    convert(single, tmp_path / "folder", conversion=VERIFIED)
    for path in SHIPPED.glob("*/*.safetensors"):
        assert same(load_file(tmp_path / "folder" / path.relative_to(SHIPPED)), load_file(path))
    for model in (single, tmp_path / "folder"):
        sd = StableDiffusion.load(model, device="cpu", dtype="float32")
        assert sd.config == StableDiffusion.load(device="cpu", dtype="float32").config
        request = Request("a large red circle on a blue background", steps=2, seed=1, width=SIDE, height=SIDE)
        assert sd.generate(request)[0].tobytes() == shipped.generate(request)[0].tobytes()


def test_folders_load_in_diffusers(single, tmp_path):
    convert(single, tmp_path / "folder")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    original = diffusers.StableDiffusionPipeline.from_pretrained(SHIPPED, local_files_only=True)
    for name in ("unet", "vae", "text_encoder"):
        assert same(getattr(pipe, name).state_dict(), getattr(original, name).state_dict())
    prompts = ["a large red circle on a blue background", "¡Ünicode & 日本!"]
    assert pipe.tokenizer(prompts)["input_ids"] == original.tokenizer(prompts)["input_ids"]
    ours, theirs = (
        {key: value for key, value in p.scheduler.config.items() if not key.startswith("_")} for p in (pipe, original)
    )
    assert ours == theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(single, tmp_path, dtype):
    path = with_everything(single)
    convert(path, tmp_path / "cast.safetensors", conversion=Conversion(dtype, verify=True))
    cast = load_file(tmp_path / "cast.safetensors")
    for key, tensor in load_file(path).items():
        of_a_network = (
            key.startswith((UNET, VAE, "cond_stage_model.", "model_ema.diffusion_model")) and tensor.is_floating_point()
        )
        assert torch.equal(cast[key], tensor.to(getattr(torch, dtype)) if of_a_network else tensor)
        assert cast[key].dtype == (getattr(torch, dtype) if of_a_network else tensor.dtype)


def test_pickles_become_safetensors(tiny_path, tmp_path):
    """Of a model whose shapes tell its norm groups, for a pickle has no metadata."""
    tiny = Path(shutil.copy(tiny_path, tmp_path / "tiny.safetensors"))
    tensors = {key: tensor.clone() for key, tensor in load_file(with_everything(tiny)).items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("cond_stage_model.")}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "m.ckpt")
    convert(tmp_path / "m.ckpt", tmp_path / "m.safetensors", conversion=VERIFIED)
    assert same(load_file(tmp_path / "m.safetensors"), tensors)


def test_ema_takes_the_place_of_the_weights(single, tmp_path):
    path = with_everything(single)
    convert(path, tmp_path / "ema.safetensors", Choices(ema=True), VERIFIED)
    before, after = load_file(path), load_file(tmp_path / "ema.safetensors")
    assert not any(key.startswith("model_ema.diffusion_model") for key in after)
    assert all(torch.equal(after[key], 2 * before[key]) for key in before if key.startswith(UNET))


def test_pruning(single, tmp_path):
    convert(with_everything(single), tmp_path / "pruned.safetensors", conversion=Conversion(prune=True, verify=True))
    assert same(load_file(tmp_path / "pruned.safetensors"), load_file(single))


def test_another_vae_baked_in(single, tmp_path):
    vae = {
        key: 0 * tensor for key, tensor in load_file(SHIPPED / "vae" / "diffusion_pytorch_model.safetensors").items()
    }
    folder = shutil.copytree(SHIPPED / "vae", tmp_path / "vae")
    save_file(vae, folder / "diffusion_pytorch_model.safetensors")
    save_file(vae, single.with_suffix(".vae.safetensors"))  # which lies there and was not asked for
    convert(single, tmp_path / "same.safetensors", conversion=VERIFIED)
    assert same(load_file(tmp_path / "same.safetensors"), load_file(single))
    convert(single, tmp_path / "baked.safetensors", Choices(vae=folder), VERIFIED)
    baked = load_file(tmp_path / "baked.safetensors")
    assert not any(tensor.any() for key, tensor in baked.items() if key.startswith(VAE))
    assert any(tensor.any() for key, tensor in baked.items() if key.startswith(UNET))


def test_a_network_of_a_whole_model_brings_nothing_else(single, tmp_path):
    """Neither the EMA weights of the model whose VAE is taken, nor its schedule, nor what nobody knows."""
    convert(single, tmp_path / "baked.safetensors", Choices(vae=with_everything(single)), VERIFIED)
    assert same(load_file(tmp_path / "baked.safetensors"), load_file(single))
    convert(single, tmp_path / "text.safetensors", Choices(text_encoder=with_everything(single)), VERIFIED)
    added = load_file(tmp_path / "text.safetensors").keys() - load_file(single).keys()
    assert added == {"cond_stage_model.transformer.text_model.embeddings.position_ids"}


def test_a_vae_alone(tmp_path, shipped):
    convert(SHIPPED / "vae", tmp_path / "vae.safetensors", conversion=VERIFIED)
    assert "encoder.mid.attn_1.q.weight" in load_file(tmp_path / "vae.safetensors")
    assert load_file(tmp_path / "vae.safetensors")["encoder.mid.attn_1.q.weight"].ndim == 4
    vae = load_vae(tmp_path / "vae.safetensors")
    assert same(vae.state_dict(), shipped.vae.state_dict())
    assert vae.config == shipped.config.vae
    with pytest.raises(CheckpointError, match="holds no U-Net"):
        convert(SHIPPED / "vae", tmp_path / "folder")


def test_a_unet_alone_keeps_its_size_and_guidance(tmp_path, shipped):
    convert(SHIPPED / "unet", tmp_path / "unet.safetensors", conversion=VERIFIED)
    choices = Choices(vae=SHIPPED / "vae", text_encoder=SHIPPED / "text_encoder")
    config = load_model(tmp_path / "unet.safetensors", choices=choices).config
    assert (config.image_size, config.cfg_scale) == (128, shipped.config.cfg_scale) != (128, SD_V1.cfg_scale)


@pytest.mark.parametrize("ids", [POSITIONS.half(), POSITIONS * 2, POSITIONS[0].int()])
def test_position_ids_are_repaired(single, tmp_path, ids, caplog):
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    save_file(load_file(single) | {key: ids}, tmp_path / "m.safetensors", metadata=metadata(single))
    convert(tmp_path / "m.safetensors", tmp_path / "out.safetensors", conversion=VERIFIED)
    assert torch.equal(load_file(tmp_path / "out.safetensors")[key], POSITIONS)
    assert "repaired" in caplog.text


@pytest.mark.parametrize(("prediction_type", "spelled"), [("v_prediction", "v"), ("sample", "x0")])
@pytest.mark.parametrize("layout", ["out.safetensors", "folder"])
def test_prediction_type_is_kept(tmp_path, layout, prediction_type, spelled):
    choices = Choices(prediction_type=prediction_type, zero_terminal_snr=True)
    convert(SHIPPED, tmp_path / layout, choices, VERIFIED)
    schedule = load_model(tmp_path / layout).config.schedule
    assert (schedule.prediction_type, schedule.zero_terminal_snr) == (prediction_type, True)
    if layout == "out.safetensors":
        assert metadata(tmp_path / layout)["modelspec.prediction_type"] == spelled


def test_a_chosen_prediction_type_wins_over_marks(single, tmp_path):
    tensors = load_file(single) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"modelspec.prediction_type": "v"} | metadata(single))
    choices = Choices(prediction_type="epsilon", zero_terminal_snr=False)
    convert(tmp_path / "m.safetensors", tmp_path / "out.safetensors", choices, VERIFIED)
    schedule = load_model(tmp_path / "out.safetensors").config.schedule
    assert (schedule.prediction_type, schedule.zero_terminal_snr) == ("epsilon", False)
    assert metadata(tmp_path / "out.safetensors")["modelspec.prediction_type"] == "epsilon"


def test_plain_models_get_no_metadata_of_ours(tmp_path):
    """The heads, groups and scale of SD v1 need not be told."""
    path = hollow_file(tmp_path / "v1.safetensors", shapes("sd-v1-keys.json", [VAE]))
    convert(path, tmp_path / "vae.safetensors")
    assert metadata(tmp_path / "vae.safetensors") == {"format": "pt"}


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_in_place(single):
    original = load_file(single)
    convert(single, single, conversion=Conversion("float32", verify=True))
    assert same(load_file(single), {key: tensor.float() for key, tensor in original.items()})
    assert [path.name for path in single.parent.iterdir()] == [single.name]


def test_a_folder_in_place(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    convert(folder, folder, conversion=Conversion("float32", verify=True))
    assert load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_is_replaced_unasked(single, tmp_path):
    (tmp_path / "taken.safetensors").write_text("mine")
    shutil.copytree(SHIPPED, tmp_path / "folder")
    for taken in ("taken.safetensors", "folder"):
        with pytest.raises(RequestError, match="exists; choose another name, or --overwrite"):
            convert(single, tmp_path / taken)
    shutil.copy(single, tmp_path / "file")
    with pytest.raises(RequestError, match="is a file; choose another name"):
        convert(single, tmp_path / "file", conversion=Conversion(overwrite=True))
    for name in ("m.ckpt", "m.safetensor"):
        with pytest.raises(RequestError, match=r"only \.safetensors files are written"):
            convert(single, tmp_path / name)
    with pytest.raises(RequestError, match="dtype is 'int8': use one of float32"):
        Conversion("int8")
    convert(single, tmp_path / "folder", conversion=Conversion("bf16", overwrite=True))
    assert inspect(tmp_path / "folder")["parts"]["unet"]["dtypes"] == {"bfloat16": UNET_TENSORS}
    (tmp_path / "empty").mkdir()
    convert(single, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_what_is_no_model_is_never_replaced(single, tmp_path):
    """Neither pictures in a folder, nor other models, nor what else people keep beside a model."""
    pictures, models = tmp_path / "pictures", tmp_path / "models"
    for folder in (pictures, models):
        folder.mkdir()
    (pictures / "mine.png").write_bytes(b"a picture")
    inside = shutil.copy(single, models / "m.safetensors")
    for source, target in [(single, pictures), (inside, models)]:
        before = sorted(target.rglob("*"))
        with pytest.raises(RequestError, match="holds 1 files that are no part of a model and would be lost"):
            convert(source, target, conversion=Conversion(overwrite=True))
        assert sorted(target.rglob("*")) == before
    model = shutil.copytree(SHIPPED, tmp_path / "model")
    for other in (
        "README.md",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        ".git/x",
    ):
        (model / other).parent.mkdir(exist_ok=True)
        (model / other).write_text("mine")
        with pytest.raises(RequestError, match="no part of a model"):
            convert(model, model, conversion=Conversion("float16"))
        (model / other).unlink()
    convert(model, model, conversion=Conversion("float16", verify=True))


def test_through_a_link(single, tmp_path):
    """What it stands for is replaced."""
    for real in (shutil.copytree(SHIPPED, tmp_path / "folder"), single):
        link = tmp_path / f"link-{real.name}"
        link.symlink_to(real)
        convert(link, link, conversion=Conversion("bfloat16"))
        assert link.is_symlink()
        assert inspect(real)["parts"]["unet"]["dtypes"] == {"bfloat16": UNET_TENSORS}
    assert not list(tmp_path.glob("*.part"))


def test_no_name_is_written_twice(single, tmp_path):
    tensors = load_file(single)
    key = VAE + "decoder.conv_in.weight"
    twice = tensors | {key.removeprefix(VAE): tensors[key].clone()}
    save_file(twice, tmp_path / "twice.safetensors", metadata=metadata(single))
    convert(SHIPPED, tmp_path / "folder")
    save_file({key: tensors[key]}, tmp_path / "folder" / "extras.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors \(.*decoder\.conv_in\.weight\) would be in the result twice"):
        convert(tmp_path / "folder", tmp_path / "x.safetensors")
    convert(tmp_path / "folder", tmp_path / "x.safetensors", conversion=Conversion(prune=True, verify=True))
    convert(tmp_path / "twice.safetensors", tmp_path / "y.safetensors", conversion=VERIFIED)
    assert key.removeprefix(VAE) in load_file(tmp_path / "y.safetensors")


def test_what_is_left_out_is_said(single, tmp_path, caplog):
    path = with_everything(single)
    caplog.set_level("INFO")
    convert(path, tmp_path / "a.safetensors", Choices(ema=True), Conversion(prune=True))
    shutil.copy(SHIPPED / "vae" / "diffusion_pytorch_model.safetensors", path.with_suffix(".vae.safetensors"))
    convert(path, tmp_path / "b.safetensors")
    torch.save({"state_dict": state_dict("tiny-keys.json", [VAE]), "epoch": 3}, tmp_path / "m.ckpt")
    convert(tmp_path / "m.ckpt", tmp_path / "c.safetensors", conversion=VERIFIED)
    model = shutil.copytree(SHIPPED, tmp_path / "model")
    (model / "safety_checker").mkdir()
    convert(model, tmp_path / "d.safetensors")
    for said in (
        f"left out: weights that the EMA weights replace ({UNET_TENSORS} tensors",
        "left out: noise schedule (1 tensors (betas))",
        "left out: of no known use (1 tensors (somebodys.own))",
        "everything.vae.safetensors, which takes the place of the VAE when this is loaded",
        "left out, training state: epoch",
        "verified: every tensor is bit for bit that of the source",
        "not read: safety_checker",
    ):
        assert said in caplog.text
    assert " (0 tensors" not in caplog.text


def test_a_failure_leaves_no_folders(single, tmp_path):
    tensors = load_file(single)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, single, metadata=metadata(single))
    with pytest.raises(CheckpointError, match="hold NaN or infinity"):
        convert(single, tmp_path / "new" / "deep" / "out.safetensors")
    assert not (tmp_path / "new").exists()


def test_a_network_alone_makes_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="holds no U-Net and no text encoder, and a folder needs all three"):
        convert(SHIPPED / "vae", tmp_path / "folder")


def test_a_failed_verification_leaves_nothing(single, tmp_path, monkeypatch):
    def spoil(source, result, conversion, bar):
        raise CheckpointError("verification failed")

    monkeypatch.setattr("ldm.checkpoint.convert.verify", spoil)
    with pytest.raises(CheckpointError):
        convert(single, tmp_path / "out.safetensors", conversion=VERIFIED)
    with pytest.raises(CheckpointError):
        convert(single, single, conversion=VERIFIED)
    assert [path.name for path in tmp_path.iterdir()] == [single.name]


@pytest.mark.parametrize("target", ["out.safetensors", "folder"])
def test_verification_finds_one_wrong_bit(single, tmp_path, target, monkeypatch):
    from ldm.checkpoint import writing

    def flip(self):
        tensor = original(self).clone()
        if self.source.name.endswith("input_blocks.0.0.weight"):
            tensor.view(-1).view(torch.int16)[5] ^= 1
        return tensor

    original = writing.Output.make
    monkeypatch.setattr(writing.Output, "make", flip)
    with pytest.raises(CheckpointError, match=r"1 tensors \(model.diffusion_model.input_blocks.0.0.weight\) differ"):
        convert(single, tmp_path / target, conversion=VERIFIED)


def test_a_full_disk(single, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(CheckpointError, match="GB free"):
        convert(single, tmp_path / "out.safetensors")


KILLED = """
import sys
from pathlib import Path
from ldm.checkpoint.convert import Conversion, convert
print("ready", flush=True)
for dtype in ["float32", "float16"] * 1000:
    convert(Path(sys.argv[1]), Path(sys.argv[1]), conversion=Conversion(dtype))
"""


@pytest.mark.parametrize("layout", ["single.safetensors", "folder"])
def test_killed_at_any_moment(single, tmp_path, layout):
    """The old model or the new one is there, whole; what was begun has another name."""
    path = single if layout == "single.safetensors" else shutil.copytree(SHIPPED, tmp_path / "folder")
    expected = load_model(path)
    for delay in (0.0, 0.13, 0.31, 0.47):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert same_weights(load_model(path), expected)


def test_command_line(tmp_path, capsys):
    assert main(["convert", str(SHIPPED), str(tmp_path / "a.safetensors"), "--dtype", "bfloat16", "--verify"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.safetensors'}\n"
    assert load_file(tmp_path / "a.safetensors")[f"{UNET}out.2.bias"].dtype == torch.bfloat16
    assert main(["convert", str(SHIPPED), str(tmp_path / "a.safetensors")]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    script = Path(__file__).parent.parent / "scripts" / "convert_checkpoint.py"
    done = subprocess.run([sys.executable, script, SHIPPED, tmp_path / "b"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'b'}\n"
    assert json.loads((tmp_path / "b" / "unet" / "config.json").read_text())["attention_head_dim"] == 4
