"""Every layout that SD v1 files come in, each a small generated file, read back tensor by tensor."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import SHIPPED, SHIPPED_TEXT
from safetensors.torch import load_file, save_file
from synthetic import hollow_file, shapes
from torch import Tensor

from ldm import ScheduleConfig, StableDiffusion, UNetConfig, VAEConfig
from ldm.checkpoint import load_model, load_text, load_unet, load_vae
from ldm.checkpoint.files import open_tensors
from ldm.checkpoint.layouts import NAMES, read_layout
from ldm.checkpoint.sources import Choices, open_checkpoint
from ldm.config import LABELS
from ldm.errors import CheckpointError, RequestError
from ldm.models import unet, vae

Tensors = dict[str, Tensor]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
MIDDLE = {"compvis": "mid.attn_1", "diffusers": "mid_block.attentions.0"}


@pytest.fixture(scope="module")
def weights(shipped) -> dict[str, Tensors]:
    """The shipped model's tensors by network, under our names."""
    return {
        name: {key: tensor.clone().contiguous() for key, tensor in getattr(shipped, name).state_dict().items()}
        for name in LABELS
    }


def spell(weights: dict[str, Tensors], config, name: str, spelling: str, prefix: str = "") -> Tensors:
    """A network's tensors in a spelling, after a prefix, in the shapes that real files have."""
    tensors = {}
    for row in NAMES[name](getattr(config, name)):
        for ours, theirs in zip(row.keys("ours"), row.keys(spelling), strict=True):
            tensor = weights[name][ours]
            if ".proj_in.weight" in ours or ".proj_out.weight" in ours:
                tensor = tensor[:, :, None, None] if "feed_forward" not in ours else tensor
            elif name == "vae" and tensor.ndim == 2 and spelling == "compvis":
                tensor = tensor[:, :, None, None]
            tensors[prefix + theirs] = tensor
    return tensors


@pytest.fixture(scope="module")
def spelled(weights, shipped) -> Callable[[str, str, str], Tensors]:
    return partial(spell, weights, shipped.config)


def in_one_file(spelled: Callable[[str, str, str], Tensors]) -> Tensors:
    return spelled("unet", "compvis", UNET) | spelled("vae", "compvis", VAE) | spelled("text", "compvis", TEXT)


@pytest.fixture(scope="module")
def whole(spelled) -> Tensors:
    """The shipped model as a single file in CompVis's names."""
    return in_one_file(spelled)


@pytest.fixture(scope="module")
def plain(weights, shipped) -> Tensors:
    """A small model with SD v1's norm groups, so that shapes tell all of it, as a single file in CompVis's names."""
    config = replace(
        shipped.config,
        unet=UNetConfig(
            channels=32, channel_mult=(1, 2), blocks_per_level=1, attention_levels=(1,), context_dim=SHIPPED_TEXT.width
        ),
        vae=VAEConfig(channels=32, channel_mult=(1, 1), blocks_per_level=1),
    )
    networks = {"unet": unet.UNet(config.unet).state_dict(), "vae": vae.VAE(config.vae).state_dict()}
    return in_one_file(partial(spell, weights | networks, config))


def rename(tensors: Tensors, changes: dict[str, str]) -> Tensors:
    for old, new in changes.items():
        tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    return tensors


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def ema_of(tensors: Tensors) -> Tensors:
    """The same weights, doubled, as training keeps their moving average."""
    ema = {
        "model_ema.diffusion_model" + key.removeprefix(UNET).replace(".", ""): 2 * tensor
        for key, tensor in tensors.items()
        if key.startswith(UNET)
    }
    return ema | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


BUFFERS = {"betas": torch.zeros(9), "sqrt_one_minus_alphas_cumprod": torch.zeros(9), "logvar": torch.zeros(9)}
IDS = TEXT + "embeddings.position_ids"
OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
NEW_ATTENTION = {"attn_1.q.": "attn_1.to_q.", "attn_1.k.": "attn_1.to_k.", "attn_1.v.": "attn_1.to_v."}


def in_diffusers_names(spell, prefixes: tuple[str, str, str]) -> Tensors:
    parts = zip(LABELS, prefixes, strict=True)
    return {key: t for name, prefix in parts for key, t in spell(name, "diffusers", prefix).items()}


def flat_attention(tensors: Tensors) -> Tensors:
    return {key: t.flatten(1) if "mid.attn_1" in key and t.ndim == 4 else t for key, t in tensors.items()}


def deep_attention(tensors: Tensors) -> Tensors:
    linear = "mid_block.attentions"
    return {key: t[..., None, None] if linear in key and t.ndim == 2 else t for key, t in tensors.items()}


POSITIONS = torch.arange(SHIPPED_TEXT.max_length)[None]

# Files of all three networks, made from (the whole in CompVis's names, a function that spells).
WHOLE: dict[str, Callable[[Tensors, Callable], Tensors]] = {
    "CompVis": lambda whole, spell: whole,
    "CompVis, no text_model level": lambda whole, spell: rename(whole, {TEXT: "cond_stage_model.transformer."}),
    "CompVis, with schedule buffers": lambda whole, spell: whole | BUFFERS,
    "CompVis, position ids in int64": lambda whole, spell: whole | {IDS: POSITIONS},
    "CompVis, position ids in float16": lambda whole, spell: whole | {IDS: POSITIONS.half()},
    "CompVis, position ids averaged": lambda whole, spell: whole | {IDS: POSITIONS * 0.3},
    "CompVis, position ids in int32, flat": lambda whole, spell: whole | {IDS: POSITIONS[0].int()},
    "CompVis, with EMA weights": lambda whole, spell: whole | ema_of(whole),
    "CompVis, with a VAE's training loss": lambda whole, spell: whole | {VAE + "loss.logvar": torch.zeros(())},
    "CompVis, with keys of no use": lambda whole, spell: whole | {"lora_unet_x.alpha": torch.zeros(1)},
    "CompVis, with a safety checker": lambda whole, spell: whole | {"safety_checker.concept": torch.zeros(1)},
    "CompVis, linear VAE attention": lambda whole, spell: flat_attention(whole),
    "CompVis, VAE attention in diffusers' names": lambda whole, spell: rename(whole, NEW_ATTENTION),
    "CompVis, U-Net projections linear": lambda whole, spell: {
        key: t.flatten(1) if ".proj_" in key and t.ndim == 4 and key.startswith(UNET) else t for key, t in whole.items()
    },
    "CompVis, VAE in diffusers' names": lambda whole, spell: (
        {key: t for key, t in whole.items() if not key.startswith(VAE)} | spell("vae", "diffusers", VAE)
    ),
    "diffusers' names, text_encoder.": lambda whole, spell: in_diffusers_names(
        spell, ("unet.", "vae.", "text_encoder.text_model.")
    ),
    "diffusers' names, te.": lambda whole, spell: in_diffusers_names(spell, ("unet.", "vae.", "te.text_model.")),
    "diffusers' names, no text_model level": lambda whole, spell: in_diffusers_names(
        spell, ("unet.", "vae.", "text_encoder.")
    ),
    "diffusers' names, old VAE attention": lambda whole, spell: (
        spell("unet", "diffusers", "unet.")
        | rename(spell("vae", "diffusers", "vae."), OLD_ATTENTION)
        | spell("text", "diffusers", "te.")
    ),
}


@pytest.fixture(scope="module")
def config(shipped):
    return shipped.config


@pytest.fixture
def clip_tokens(monkeypatch, shipped):
    """Single files carry no tokenizer: the shipped model's tokens take CLIP's place."""
    tokenizer = json.loads((SHIPPED / "tokenizer" / "vocab.json").read_text())
    lines = (SHIPPED / "tokenizer" / "merges.txt").read_text().split("\n")[1:]
    tables = tokenizer, [tuple(line.split()) for line in lines if line]
    monkeypatch.setattr("ldm.checkpoint.vocabulary.shipped_vocabulary", lambda: tables)


def assert_is_the_shipped_model(model, weights: dict[str, Tensors], via: torch.dtype = torch.float32) -> None:
    for name in LABELS:
        state = getattr(model, name).state_dict()
        assert state.keys() == weights[name].keys()
        for key, tensor in weights[name].items():
            assert torch.equal(state[key], tensor.to(via).float()), key


@pytest.mark.parametrize("layout", WHOLE)
def test_single_files(layout, whole, spelled, weights, config, clip_tokens, tmp_path):
    save_file(WHOLE[layout](whole, spelled), tmp_path / "m.safetensors")
    assert_is_the_shipped_model(load_model(tmp_path / "m.safetensors", config), weights)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_single_file_dtypes(dtype, whole, weights, config, clip_tokens, tmp_path):
    save_file(cast(whole, dtype), tmp_path / "m.safetensors")
    assert_is_the_shipped_model(load_model(tmp_path / "m.safetensors", config), weights, via=dtype)


def lightning(tensors: Tensors) -> dict:
    return {"state_dict": tensors, "epoch": 3, "global_step": 7, "optimizer_states": [], "callbacks": {}}


@pytest.mark.parametrize("content", [lightning, dict, lambda t: {"state_dict": t}, lambda t: t | {"epoch": 3}])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(content, zipped, whole, weights, config, clip_tokens, tmp_path):
    torch.save(content(whole), tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    assert_is_the_shipped_model(load_model(tmp_path / "m.ckpt", config), weights)


def test_pickle_of_parameters(whole, weights, config, clip_tokens, tmp_path):
    torch.save({key: torch.nn.Parameter(tensor) for key, tensor in whole.items()}, tmp_path / "m.pt")
    assert_is_the_shipped_model(load_model(tmp_path / "m.pt", config), weights)


def test_pickles_of_training_code(whole, weights, config, clip_tokens, tmp_path, monkeypatch):
    """As PyTorch Lightning left them in the first public checkpoints: classes that are not installed here."""
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    omegaconf = ModuleType("omegaconf.dictconfig")
    omegaconf.DictConfig = type("DictConfig", (), {"__module__": omegaconf.__name__})
    for name in ("omegaconf", omegaconf.__name__):
        monkeypatch.setitem(sys.modules, name, omegaconf)
    settings = omegaconf.DictConfig()
    settings.object_types = [dict, list, int, defaultdict]  # as a real one names them
    callback = module.ModelCheckpoint()
    callback.best = 0.5
    state = {"callbacks": {module.ModelCheckpoint: {"best_model_score": np.float64(0.5), "it": callback}}}
    torch.save({"state_dict": whole, "loss": np.float32(1), "config": settings, **state}, tmp_path / "m.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__, "omegaconf", omegaconf.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert_is_the_shipped_model(load_model(tmp_path / "m.ckpt", config), weights)
    assert module.__name__ not in sys.modules


# Files of one network, by (network, how to make it from a function that spells).
ALONE: dict[str, tuple[str, Callable[[Callable], Tensors]]] = {
    "U-Net, CompVis": ("unet", lambda spell: spell("unet", "compvis")),
    "U-Net, CompVis, prefixed": ("unet", lambda spell: spell("unet", "compvis", UNET)),
    "U-Net, diffusers": ("unet", lambda spell: spell("unet", "diffusers")),
    "U-Net, diffusers, prefixed": ("unet", lambda spell: spell("unet", "diffusers", "unet.")),
    "VAE, CompVis": ("vae", lambda spell: spell("vae", "compvis")),
    "VAE, CompVis, first_stage_model.": ("vae", lambda spell: spell("vae", "compvis", VAE)),
    "VAE, CompVis, vae.": ("vae", lambda spell: spell("vae", "compvis", "vae.")),
    "VAE, CompVis, linear attention": ("vae", lambda spell: flat_attention(spell("vae", "compvis"))),
    "VAE, diffusers": ("vae", lambda spell: spell("vae", "diffusers")),
    "VAE, diffusers, vae.": ("vae", lambda spell: spell("vae", "diffusers", "vae.")),
    "VAE, diffusers, first_stage_model.": ("vae", lambda spell: spell("vae", "diffusers", VAE)),
    "VAE, diffusers, query key value": ("vae", lambda spell: rename(spell("vae", "diffusers"), OLD_ATTENTION)),
    "VAE, diffusers, attention by convolution": ("vae", lambda spell: deep_attention(spell("vae", "diffusers"))),
    "VAE, CompVis, with its training loss": (
        "vae",
        lambda spell: spell("vae", "compvis") | {"loss.discriminator.main.0.bias": torch.zeros(3)},
    ),
    "VAE, with the settings of its EMA weights": (
        "vae",
        lambda spell: (
            spell("vae", "compvis") | {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
        ),
    ),
    "VAE, with EMA weights of its own": (
        "vae",
        lambda spell: spell("vae", "compvis", VAE) | {"model_ema.encoderconv_inweight": torch.zeros(3)},
    ),
    "text encoder": ("text", lambda spell: spell("text", "compvis")),
    "text encoder, text_model.": ("text", lambda spell: spell("text", "compvis", "text_model.")),
    "text encoder, CompVis": ("text", lambda spell: spell("text", "compvis", TEXT)),
    "text encoder of a whole CLIP": (
        "text",
        lambda spell: (
            spell("text", "compvis", "text_model.")
            | {"vision_model.pre_layrnorm.bias": torch.zeros(3), "visual_projection.weight": torch.zeros(3, 3)}
            | {"text_projection.weight": torch.zeros(3, 3), "logit_scale": torch.zeros(())}
        ),
    ),
}


@pytest.mark.parametrize("layout", ALONE)
def test_files_of_one_network(layout, spelled, weights, config, clip_tokens, tmp_path):
    name, make = ALONE[layout]
    save_file(make(spelled), tmp_path / "m.safetensors")
    network = {"unet": load_unet, "vae": load_vae, "text": load_text}[name](
        tmp_path / "m.safetensors", getattr(config, name)
    )
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name][key]), key


@pytest.mark.parametrize("whole_clip", [True, False])
def test_a_text_encoder_with_its_config(whole_clip, tmp_path):
    """CLIP's own config.json has the text encoder's below it."""
    folder = shutil.copytree(SHIPPED / "text_encoder", tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    if whole_clip:
        (folder / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": config}))
    assert open_checkpoint(folder).part("text").read_config().width == config["hidden_size"]


def test_there_are_many_layouts():
    assert len(WHOLE) + len(ALONE) >= 30


# --- what can be chosen, and what is told by other means --------------------------------------------------------------


def test_ema_weights_on_request(whole, weights, config, clip_tokens, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(whole | ema_of(whole), path)
    unet = load_model(path, config, Choices(ema=True)).unet
    assert all(torch.equal(t, 2 * weights["unet"][key]) for key, t in unet.state_dict().items())
    lacking = {key: t for key, t in ema_of(whole).items() if "modelout2" not in key}
    save_file(whole | lacking, path)
    with pytest.raises(CheckpointError, match=r"its EMA weights lack 2 tensors \(out\.2\.bias, out\.2\.weight\)"):
        load_model(path, config, Choices(ema=True))
    save_file(whole, path)
    with pytest.raises(CheckpointError, match="holds no EMA weights; leave out --ema"):
        load_model(path, config, Choices(ema=True))
    contents = read_layout(open_tensors(hollow_file(path, {UNET + "a": [], "model_ema.diffusion_modela": [], 
        UNET + "input_blocks.0.0.weight": [4], "model_ema.diffusion_modelinput_blocks00weight": [4],
        "model_ema.surplus": [1], "model_ema.decay": []})), ema=True)  # fmt: skip
    assert {reason: len(tensors) for reason, tensors in contents.ignored.items()} == {
        "EMA settings": 1, "EMA weights": 1, "weights that the EMA weights replace": 2
    }  # fmt: skip


def test_a_file_of_ema_weights_alone(tmp_path):
    """Its names lost their dots, so they are looked up among SD v1's."""
    names = shapes("sd-v1-keys.json", [UNET])
    ema = {"model_ema.diffusion_model" + key.removeprefix(UNET).replace(".", ""): s for key, s in names.items()}
    part = open_checkpoint(hollow_file(tmp_path / "m.safetensors", ema)).parts["unet"]
    assert part.read_config() == UNetConfig()
    assert part.tensors.keys() == {key.removeprefix(UNET) for key in names}


@pytest.mark.parametrize(("absent", "given"), [(TEXT, "text_encoder"), (VAE, "vae")])
def test_what_a_file_lacks_comes_from_another(absent, given, whole, weights, config, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({key: tensor for key, tensor in whole.items() if not key.startswith(absent)}, path)
    flag = given.replace("_", "-")
    with pytest.raises(CheckpointError, match=rf"holds no .* \(found: .*\); give one with --{flag} FILE"):
        load_model(path, config)
    choices = {"text_encoder": SHIPPED / "text_encoder"} | {given: SHIPPED / given}
    assert_is_the_shipped_model(load_model(path, config, Choices(**choices)), weights)


def test_vae_beside_the_file(whole, spelled, shipped, weights, config, clip_tokens, tmp_path, caplog):
    path = tmp_path / "merge.v2.safetensors"
    save_file(whole | {key: 0 * t for key, t in whole.items() if key.startswith(VAE)}, path)
    save_file(spelled("vae", "compvis"), tmp_path / "merge.v2.vae.safetensors")
    with caplog.at_level("INFO", logger="ldm"):
        assert_is_the_shipped_model(load_model(path, config), weights)
    assert "its VAE is taken from merge.v2.vae.safetensors" in caplog.text
    zeros = load_model(path, config, Choices(vae=path)).vae  # what is asked for goes before what lies there
    assert not any(t.any() for t in zeros.parameters())


@pytest.mark.parametrize("channels", [4, 8, 9])
def test_variants(channels, tmp_path):
    manifest = shapes("sd-v1-keys.json") | {UNET + "input_blocks.0.0.weight": [320, channels, 3, 3]}
    part = open_checkpoint(hollow_file(tmp_path / "m.safetensors", manifest)).parts["unet"]
    assert part.read_config() == UNetConfig(in_channels=channels)


YAML = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.001
    linear_end: 0.011
    parameterization: "v"
    scale_factor: 0.25
    unet_config:
      params: {num_heads: 4, in_channels: 4}
"""
TOLD = [  # keys, metadata, YAML, choices → prediction type, zero-terminal SNR, reason
    ((), {}, "", {}, "epsilon", False, "Stable Diffusion v1's: nothing else is said"),
    (("v_pred",), {}, "", {}, "v_prediction", False, "its keys"),
    (("v_pred", "ztsnr"), {}, "", {}, "v_prediction", True, "its keys"),
    (("ztsnr",), {}, "", {}, "v_prediction", True, "its keys"),
    ((), {"modelspec.prediction_type": "v"}, "", {}, "v_prediction", False, "its metadata"),
    ((), {"modelspec.prediction_type": "epsilon"}, "", {}, "epsilon", False, "its metadata"),
    ((), {}, YAML, {}, "v_prediction", False, "m.yaml"),
    ((), {"modelspec.prediction_type": "epsilon"}, YAML, {}, "v_prediction", False, "m.yaml"),
    ((), {}, YAML, {"prediction_type": "epsilon"}, "epsilon", False, "asked for"),
    (("v_pred",), {}, "", {"zero_terminal_snr": True}, "v_prediction", True, "its keys"),
    (("ztsnr",), {}, "", {"zero_terminal_snr": False}, "v_prediction", False, "its keys"),
]


@pytest.mark.parametrize(("keys", "metadata", "yaml", "choices", "prediction_type", "zero_snr", "reason"), TOLD)
def test_prediction_types(
    keys, metadata, yaml, choices, prediction_type, zero_snr, reason, tmp_path, caplog, clip_tokens, plain
):
    path = tmp_path / "m.safetensors"
    save_file(plain | {key: torch.zeros(0) for key in keys}, path, metadata=metadata)
    if yaml:
        (tmp_path / "m.yaml").write_text(yaml)
    with caplog.at_level("INFO", logger="ldm"):
        config = load_model(path, choices=Choices(**choices)).config
    assert (config.schedule.prediction_type, config.schedule.zero_terminal_snr) == (prediction_type, zero_snr)
    assert f"predicts {prediction_type} ({reason})" in caplog.text
    if yaml:
        assert (config.schedule.beta_start, config.schedule.beta_end) == (0.001, 0.011)
        assert (config.unet.heads, config.vae.scale_factor) == (4, 0.25)


def test_faults_of_what_is_told(plain, tmp_path, clip_tokens):
    path = tmp_path / "m.safetensors"
    with pytest.raises(RequestError, match=r"prediction_type is 'x0': use one of epsilon, v_prediction"):
        Choices(prediction_type="x0")
    save_file(plain, path, metadata={"modelspec.prediction_type": "flow"})
    with pytest.raises(
        CheckpointError, match=r"modelspec\.prediction_type is 'flow'; only epsilon, v_prediction, sample"
    ):
        load_model(path)
    for told, expected in {
        "{": "ldm.config: not valid JSON",
        "[]": "ldm.config: expected a JSON object",
        '{"unet": 3}': "ldm.config must be a JSON object of objects",
        '{"unet": {"block_out_channels": 4}}': "block_out_channels is 4",
        '{"scheduler": {"beta_start": -1}}': "beta_start is -1",
    }.items():
        save_file(plain, path, metadata={"ldm.config": told})
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            load_model(path)
    save_file(plain, path, metadata={"ldm.config": '{"of another program": {}}'})
    load_model(path)
    save_file(plain, path)
    with pytest.raises(CheckpointError, match="zero-terminal SNR needs v_prediction"):
        load_model(path, choices=Choices(zero_terminal_snr=True))
    for yaml, expected in {
        "model: {params: {parameterization: flow}}": "parameterization is 'flow'; only epsilon or v_prediction",
        "model: {params: {linear_start: -1}}": "linear_start is -1; only a positive number",
        "model: {params: {unet_config: {params: {num_heads: 1e9}}}}": "num_heads is",
        "model: [": "not valid YAML",
        "!!python/object/apply:os.system [true]": "not valid YAML",
        "[" * 10_000: "not valid YAML",
        'a: !!int ""': "not valid YAML",
        "a: !!bool x": "not valid YAML",
        "a: !!timestamp x": "not valid YAML",
        "a: &a [1]\nb: [*a, *a]": "it has aliases",
        "x" * 40_000: "larger than any file of its kind",
    }.items():
        (tmp_path / "m.yaml").write_text(yaml)
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            load_model(path)
    for yaml in ("- just\n- a list", ""):  # which tell nothing
        (tmp_path / "m.yaml").write_text(yaml)
        load_model(path)


def test_tensors_of_no_known_use_are_named(whole, config, clip_tokens, tmp_path, caplog):
    save_file(whole | {"somebodys.own": torch.zeros(1)}, tmp_path / "m.safetensors")
    load_model(tmp_path / "m.safetensors", config)
    assert "left out, of no known use: 1 tensors (somebodys.own)" in caplog.text


# --- folders ----------------------------------------------------------------------------------------------------------


def shard(folder: Path, index: str, name: str = "diffusion_pytorch_model-{:05d}-of-00003.safetensors") -> None:
    """Split the weights in a folder into three files with an index."""
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    weight_map = {key: name.format(i % 3 + 1) for i, key in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(SHIPPED, tmp_path / "model")


def test_shards(folder, weights):
    shard(folder / "unet", "diffusion_pytorch_model.safetensors.index.json")
    shard(folder / "text_encoder", "model.safetensors.index.fp16.json", "model.fp16-{:05d}-of-00003.safetensors")
    assert_is_the_shipped_model(load_model(folder), weights)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].pop("conv_in.weight")
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"holds 1 tensors that .* does not list"):
        load_model(folder)


@pytest.mark.parametrize("variant", ["fp16", "non_ema", "bf16"])
def test_variants_of_a_folder(variant, folder, weights):
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(f".{variant}.safetensors"))
    assert_is_the_shipped_model(load_model(folder), weights)


def test_pickles_in_a_folder(folder, weights):
    for path in folder.glob("*/*.safetensors"):
        torch.save(load_file(path), path.with_name(path.name.replace("model.safetensors", "model.bin")))
        path.unlink()
    (folder / "text_encoder" / "model.bin").rename(folder / "text_encoder" / "pytorch_model.bin")
    assert_is_the_shipped_model(load_model(folder), weights)


def test_a_folder_in_the_hubs_cache(tmp_path, weights):
    """There, files are links to blobs that have their hashes for names."""
    cache = tmp_path / "models--someone--model"
    snapshot = shutil.copytree(SHIPPED, cache / "snapshots" / "0123456789")
    shard(snapshot / "unet", "diffusion_pytorch_model.safetensors.index.json")
    (cache / "blobs").mkdir()
    for i, path in enumerate(p for p in snapshot.rglob("*") if p.is_file()):
        path.rename(cache / "blobs" / str(i))
        path.symlink_to(Path("../" * len(path.relative_to(cache).parent.parts), "blobs", str(i)))
    assert_is_the_shipped_model(load_model(snapshot), weights)


@pytest.mark.parametrize("given", ["unet", "unet/diffusion_pytorch_model.safetensors"])
def test_the_unet_of_a_folder_keeps_its_schedule(given, folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample", "beta_end": 0.02}))
    checkpoint = open_checkpoint(folder / given)
    assert (checkpoint.schedule.prediction_type, checkpoint.schedule.beta_end) == ("sample", 0.02)
    assert checkpoint.prediction_reason == "scheduler_config.json"


def test_files_near_a_folder_are_no_part_of_it(folder, whole):
    """A single file may lie anywhere; only a network alone in its file belongs to the model around its folder."""
    path = folder / "checkpoints" / "m.safetensors"
    path.parent.mkdir()
    save_file(whole, path)
    (folder / "scheduler" / "scheduler_config.json").write_text("no JSON")
    checkpoint = open_checkpoint(path)
    assert (checkpoint.tokenizer, checkpoint.schedule) == (None, ScheduleConfig())


def test_ema_weights_are_not_in_a_folder(folder):
    for path in (folder, folder / "unet"):
        with pytest.raises(CheckpointError, match="leave out --ema"):
            open_checkpoint(path, Choices(ema=True))


def test_load_takes_every_choice(folder, weights):
    sd = StableDiffusion.load(
        folder, vae=folder / "vae", text_encoder=folder / "text_encoder", prediction_type="sample",
        zero_terminal_snr=True, device="cpu", dtype="float32",
    )  # fmt: skip
    assert_is_the_shipped_model(sd, weights)
    assert sd.config.schedule == ScheduleConfig(prediction_type="sample", zero_terminal_snr=True)
