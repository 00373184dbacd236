"""Every layout loads, with nothing dropped in silence; every fault is one line."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHIPPED, TINY_UNET, relative_error
from safetensors.torch import load_file, save_file
from synthetic import hollow_file, shapes, state_dict

from ldm import ModelConfig, ScheduleConfig, StableDiffusion, TextConfig, UNetConfig, VAEConfig
from ldm.checkpoint import load_model, load_text, load_unet, load_vae
from ldm.checkpoint.names import text_names, unet_names, vae_names
from ldm.checkpoint.sources import Choices, open_checkpoint
from ldm.errors import CheckpointError
from ldm.models.unet import UNet
from ldm.models.vae import VAE

MODEL = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}


@pytest.fixture(scope="module")
def tiny():
    return state_dict("tiny-keys.json")


@pytest.fixture(scope="module")
def shipped_as_compvis(shipped) -> dict[str, torch.Tensor]:
    """The shipped model under the names of a single file."""
    tensors = {}
    for part, table in {"unet": unet_names, "vae": vae_names, "text": text_names}.items():
        names = {row.ours: row.compvis for row in table(getattr(shipped.config, part))}
        for key, tensor in getattr(shipped, part).state_dict().items():
            module, _, leaf = key.rpartition(".")
            level = "text_model." if part == "text" else ""
            tensors[f"{MODEL[part]}{level}{names[module]}.{leaf}"] = tensor.contiguous()
    return tensors


def save(tensors, path):
    save_file(tensors, path)
    return path


def same_weights(first, second) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_configs_are_read_from_shapes(tiny_path):
    parts = open_checkpoint(tiny_path).parts
    assert parts["unet"].read_config() == replace(TINY_UNET, heads=8)  # heads leave no trace
    assert parts["vae"].read_config() == VAEConfig(channels=32, channel_mult=(1, 2, 2, 4))


def test_sd_v1_configs_are_the_defaults(tmp_path, caplog):
    checkpoint = open_checkpoint(hollow_file(tmp_path / "v1.safetensors", shapes("sd-v1-keys.json")))
    configs = {name: part.read_config() for name, part in checkpoint.parts.items()}
    assert configs == {"unet": UNetConfig(), "vae": VAEConfig(), "text": TextConfig()}
    with caplog.at_level("INFO", logger="ldm"):
        checkpoint.report()
    assert "left out, not needed: noise schedule (12 tensors)" in caplog.text
    assert "left out, not needed: position ids (1 tensors)" in caplog.text
    assert "predicts epsilon (Stable Diffusion v1's: nothing else is said)" in caplog.text


@pytest.mark.parametrize("channels", [8, 9])
def test_input_channels_are_read_from_shapes(tiny, tmp_path, channels):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    path = save(tiny | {key: torch.zeros(32, channels, 3, 3)}, tmp_path / "m.safetensors")
    assert load_unet(path).config.in_channels == channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_single_files(shipped, shipped_as_compvis, tmp_path, dtype, suffix):
    tensors = {key: tensor.to(dtype) for key, tensor in shipped_as_compvis.items()}
    path = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    else:
        save_file(tensors, path)
    for network, original in [
        (load_unet(path, shipped.config.unet), shipped.unet),
        (load_vae(path, shipped.config.vae), shipped.vae),
    ]:
        expected = original.state_dict()
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, expected[key].to(dtype).float())


@pytest.mark.parametrize("level", ["text_model.", ""])
def test_text_encoder_with_and_without_its_level(tmp_path, level):
    torch.manual_seed(0)
    shapes = {
        "embeddings.token_embedding.weight": [49408, 64],
        "embeddings.position_embedding.weight": [77, 64],
        "final_layer_norm.weight": [64],
        "final_layer_norm.bias": [64],
    }
    for name, (rows, columns) in {
        "self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64),
        "self_attn.out_proj": (64, 64), "mlp.fc1": (128, 64), "mlp.fc2": (64, 128),
    }.items():  # fmt: skip
        shapes[f"encoder.layers.0.{name}.weight"] = [rows, columns]
        shapes[f"encoder.layers.0.{name}.bias"] = [rows]
    for norm in ("layer_norm1", "layer_norm2"):
        shapes |= {f"encoder.layers.0.{norm}.weight": [64], f"encoder.layers.0.{norm}.bias": [64]}
    tensors = {MODEL["text"] + level + key: torch.randn(shape) for key, shape in shapes.items()}
    tensors[MODEL["text"] + level + "embeddings.position_ids"] = torch.arange(77)[
        None
    ].float()  # as some merges have it
    text = load_text(save(tensors, tmp_path / "m.safetensors"))
    assert text.config == TextConfig(width=64, layers=1, heads=1, mlp_width=128)
    assert text.encode(["a horse"]).shape == (1, 77, 64)
    assert not any(tensor.is_meta for tensor in [*text.parameters(), *text.buffers()])


def test_what_is_left_out_is_counted_by_reason(tiny, tmp_path, caplog):
    extra = {
        "model_ema.decay": torch.zeros(()),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "betas": torch.zeros(1000),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    path = save(tiny | extra, tmp_path / "m.safetensors")
    with caplog.at_level("INFO", logger="ldm"):
        unet = load_unet(path, TINY_UNET)
        open_checkpoint(path).report()
    assert "EMA weights (1 tensors)" in caplog.text
    assert "VAE training loss (1 tensors)" in caplog.text
    assert same_weights(unet, load_unet(save(tiny, tmp_path / "n.safetensors"), TINY_UNET))


def test_left_out_tensors_are_logged(tmp_path, caplog):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    with caplog.at_level("INFO", logger="ldm"):
        load_model(folder)
    assert "position ids (1 tensors)" in caplog.text


@pytest.mark.parametrize("spelled", ["bare", "prefixed"])
def test_vae_files(shipped, shipped_as_compvis, tmp_path, spelled):
    prefix = MODEL["vae"]
    tensors = {key: tensor for key, tensor in shipped_as_compvis.items() if key.startswith(prefix)}
    if spelled == "bare":
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    vae = load_vae(save(tensors, tmp_path / "vae.safetensors"), shipped.config.vae)
    assert same_weights(vae, shipped.vae)


def test_diffusers_vae_file_alone_is_known_by_its_shapes(tmp_path, shipped):
    path = shutil.copy(SHIPPED / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "anything")
    vae = load_vae(path, shipped.config.vae)  # shapes do not tell its 8 groups
    assert same_weights(vae, shipped.vae)


def test_old_diffusers_vae_attention_names(tmp_path, shipped):
    renamed = {}
    for key, tensor in load_file(SHIPPED / "vae" / "diffusion_pytorch_model.safetensors").items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = tensor
    path = save(renamed, tmp_path / "vae.safetensors")
    shutil.copy(SHIPPED / "vae" / "config.json", tmp_path)
    assert same_weights(load_vae(path), shipped.vae)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_component_folders_and_files(part, shipped):
    load = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text}[part]
    expected = {"unet": shipped.unet, "vae": shipped.vae, "text_encoder": shipped.text}[part]
    assert same_weights(load(SHIPPED), expected)
    assert same_weights(load(SHIPPED / part), expected)
    [file] = (SHIPPED / part).glob("*.safetensors")
    assert same_weights(load(file), expected)


def test_vae_in_place_of_the_models_own(tmp_path, shipped):
    other = VAEConfig(channels=16, channel_mult=(1, 1, 1, 1), blocks_per_level=1, norm_groups=8, scale_factor=0.5)
    torch.manual_seed(0)
    vae = VAE(other)
    names = {row.ours: row.diffusers for row in vae_names(other)}
    tensors = {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": t for key, t in vae.state_dict().items()}
    save(tensors, tmp_path / "vae.safetensors")
    config = json.loads((SHIPPED / "vae" / "config.json").read_text())
    changes = {"block_out_channels": [16] * 4, "norm_num_groups": 8, "scaling_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    model = load_model(SHIPPED, choices=Choices(vae=tmp_path / "vae.safetensors"))
    assert same_weights(model.vae, vae)
    assert model.config.vae == other
    assert same_weights(model.unet, shipped.unet)
    folder = shutil.copytree(SHIPPED, tmp_path / "model", ignore=shutil.ignore_patterns("vae"))
    assert same_weights(
        load_model(folder, choices=Choices(vae=SHIPPED / "vae")).vae, shipped.vae
    )  # a model without one
    assert "holds no VAE (found: U-Net)" in fault(lambda: load_model(SHIPPED, choices=Choices(vae=SHIPPED / "unet")))


def test_fp16_variant_folder(tmp_path, shipped):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    for part, name in {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
    }.items():
        (folder / part / f"{name}.safetensors").rename(folder / part / f"{name}.fp16.safetensors")
    assert same_weights(load_model(folder).unet, shipped.unet)


def test_scheduler_config_is_honoured(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "num_train_timesteps": 500}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    schedule = load_model(folder).config.schedule
    assert (schedule.beta_schedule, schedule.prediction_type, schedule.timesteps) == ("cosine", "sample", 500)
    file.write_text(json.dumps(settings | {"rescale_betas_zero_snr": True}))
    assert load_model(folder).config.schedule.zero_terminal_snr
    file.write_text(json.dumps(settings | {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}))
    assert "zero-terminal SNR needs v_prediction" in fault(load_model, folder)


def test_weights_are_views_of_the_file_where_nothing_changes(tiny_path):
    """Linear layers in the file's own dtype share its memory map; only convolutions are laid out anew."""
    vae = load_vae(tiny_path)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tiny_path) in line]
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
    pointer = vae.decoder.middle[1].to_q.weight.data_ptr()
    assert any(start <= pointer < end for start, end in ranges)
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_heads_are_sd_v1s_unless_told(tiny_path, golden):
    wrong = load_unet(tiny_path)(golden["unet.x"], golden["unet.t"], golden["unet.context"])
    assert relative_error(wrong, golden["unet.eps"]) > 1e-2  # eight heads instead of four


def test_a_given_config_takes_the_place_of_detection(tmp_path, shipped, tiny_path):
    assert load_unet(tiny_path).config == replace(TINY_UNET, heads=8)  # which leave no trace in shapes
    assert load_unet(tiny_path, TINY_UNET).config == TINY_UNET
    path = shutil.copy(SHIPPED / "unet" / "diffusion_pytorch_model.safetensors", tmp_path)
    assert same_weights(load_unet(path, shipped.config.unet), shipped.unet)
    odd = UNetConfig(channels=48, channel_mult=(1, 2), attention_levels=(0,), heads=4, context_dim=8, norm_groups=16)
    unet = UNet(odd)
    names = {row.ours: row.compvis for row in unet_names(odd)}
    tensors = {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": t for key, t in unet.state_dict().items()}
    path = save(tensors, tmp_path / "odd.safetensors")
    assert "norm_groups is 32, which does not divide" in fault(load_unet, path)
    assert same_weights(load_unet(path, odd), unet)


@pytest.mark.parametrize("name", ["m.bin", "m.ckpt", "m"])
def test_content_decides_whatever_the_header_length(tmp_path, tiny, name):
    """The first byte of a safetensors file is the low byte of its header's length, and may be that of a pickle."""
    vae = {key: tensor for key, tensor in tiny.items() if key.startswith(MODEL["vae"])}
    for padding in range(0, 400, 8):
        save_file(vae, tmp_path / name, metadata={"padding": "x" * padding})
        if (tmp_path / name).read_bytes()[0] == 0x80:
            break
    assert (tmp_path / name).read_bytes()[0] == 0x80
    assert load_vae(tmp_path / name).config.channels == 32


def test_plain_weights_are_preferred_to_half_precision(tmp_path, shipped):
    folder = shutil.copytree(SHIPPED / "vae", tmp_path / "vae")
    save_file({"not": torch.zeros(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert same_weights(load_vae(folder), shipped.vae)


def test_activation_of_the_text_encoder(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    before = load_text(folder).encode(["a red circle"])
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}))
    assert relative_error(load_text(folder).encode(["a red circle"]), before) > 1e-3


# --- faults -----------------------------------------------------------------------------------------------------------


def fault(load, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_missing_unexpected_and_misshapen_tensor_is_named(tiny, tmp_path):
    prefix = MODEL["vae"]
    tensors = dict(tiny)
    del tensors[prefix + "quant_conv.bias"]
    tensors[prefix + "surplus.weight"] = torch.zeros(1)
    tensors[prefix + "encoder.conv_in.bias"] = torch.zeros(31)
    tensors[prefix + "decoder.conv_in.bias"] = torch.zeros(128, dtype=torch.long)
    path = save(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_vae(path)
    message = str(caught.value)
    assert "1 tensors (quant_conv.bias) missing" in message
    assert "1 tensors (surplus.weight) unexpected" in message
    assert "encoder.conv_in.bias is F32[31], not [32]" in message
    assert "decoder.conv_in.bias is I64[128], not [128]" in message
    assert len(caught.value.details) == 4


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "a LoRA"),
        ("emb_params", "a textual inversion embedding"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "a Stable Diffusion XL model"),
        ("cond_stage_model.model.ln_final.weight", "a Stable Diffusion 2.x model"),
        ("model.diffusion_model.joint_blocks.0.context_block.attn.proj.weight", "a Stable Diffusion 3 or Flux model"),
        ("double_blocks.0.img_attn.proj.weight", "a Stable Diffusion 3 or Flux model"),
    ],
)
def test_other_families_are_named(tmp_path, key, family):
    path = save({key: torch.zeros(2, 2)}, tmp_path / "m.safetensors")
    assert f"this is {family}; expected a Stable Diffusion v1.x model" in fault(load_model, path)


def test_sd2_unet_is_known_by_its_context(tiny, tmp_path):
    wide = {key: torch.zeros(t.shape[0], 1024) if ".attn2.to_k." in key else t for key, t in tiny.items()}
    assert "Stable Diffusion 2.x" in fault(load_unet, save(wide, tmp_path / "m.safetensors"))


def test_absent_parts_are_named(tiny_path):
    message = fault(load_model, tiny_path)
    assert "holds no text encoder" in message
    assert "found: " in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a readable .safetensors file"),
        (b"hello, I am a text file\n" * 9, "not a readable .safetensors file"),
        (b"\xff" * 64, "not a readable .safetensors file"),
        (b"PK\x03\x04 not really a zip", "not a readable .safetensors file"),
        (b"\x80\x04\x95 not really a pickle", "a pickle under the name of a safer format"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
        ((2).to_bytes(8, "little") + b"[]", "not a readable .safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "not a readable .safetensors file"),
    ],
)
def test_damaged_files(tmp_path, content, expected):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert expected in fault(load_model, path)


def test_truncated_file(tiny_path, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(tiny_path.read_bytes()[:-1000])
    assert "not a readable .safetensors file" in fault(load_model, path)


def test_incomplete_unet(tiny, tmp_path):
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    path = save({k: t for k, t in tiny.items() if k != key}, tmp_path / "m.safetensors")
    assert f"the U-Net is incomplete: {key} is missing" in fault(load_unet, path)


class Harmful:
    def __reduce__(self):
        return print, ("code from a checkpoint was run",)


def test_pickles_run_no_code(tmp_path, capsys):
    path = tmp_path / "m.ckpt"
    with path.open("wb") as file:
        pickle.dump({"state_dict": Harmful()}, file)
    assert "holds more than tensors" in fault(load_model, path)
    torch.save({"state_dict": {"a": Harmful()}}, path)
    assert "holds more than tensors" in fault(load_model, path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("unet/config.json", {"cross_attention_dim": 1024}, "a Stable Diffusion 2.x model"),
        ("unet/config.json", {"cross_attention_dim": 2048}, "a Stable Diffusion XL model"),
        ("unet/config.json", {"transformer_layers_per_block": 10}, "only 1 is supported"),
        ("unet/config.json", {"block_out_channels": [64, 10**9, 1]}, "list of 1 to 8 whole numbers"),
        ("unet/config.json", {"block_out_channels": [64, 100, 192]}, "not multiples of the first"),
        ("unet/config.json", {"_guidance_scale": "7"}, "only a positive number up to 1000 is supported"),
        ("unet/config.json", {"_guidance_scale": 2000}, "_guidance_scale is 2000; only a positive number up to 1000"),
        ("unet/config.json", {"norm_num_groups": 7}, "norm_groups is 7, which does not divide"),
        ("unet/config.json", {"layers_per_block": True}, "a whole number from 1 to"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D"] * 3}, "the mirror of down_block_types"),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 3}, "CrossAttnDownBlock2D"),
        ("unet/config.json", {"in_channels": 9}, "of the wrong shape"),
        ("vae/config.json", {"scaling_factor": "big"}, "a positive number"),
        ("vae/config.json", {"shift_factor": 0.1}, "only None is supported"),
        ("text_encoder/config.json", {"num_hidden_layers": 65}, "layers is 65; only 1 to 64 is supported"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "quick_gelu or gelu"),
        ("text_encoder/config.json", {"hidden_size": 64}, "the U-Net attends to 128 channels, the text has 64"),
        ("vae/config.json", {"latent_channels": 8}, "the VAE reads 8"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "heads is 5, which does not divide width, 128"),
        ("text_encoder/config.json", {"layer_norm_eps": 0.5}, "only 1e-05 is supported"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "epsilon or v_prediction"),
        ("scheduler/scheduler_config.json", {"beta_end": 2.0}, "of the signal at the end"),
        ("scheduler/scheduler_config.json", {"beta_start": 1e-300}, "of the signal at the end"),
    ],
)
def test_configs_that_are_not_ours(tmp_path, file, change, expected):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    assert expected in fault(load_model, folder)


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        ("vae", "holds no VAE"),
        ("model_index.json", "without model_index.json"),
        ("scheduler", "scheduler_config.json is missing"),
        ("tokenizer", "knows 678 tokens, the tokenizer 49408"),
        ("unet/diffusion_pytorch_model.safetensors", "no weights found"),
    ],
)
def test_incomplete_folders(tmp_path, absent, expected):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    target = folder / absent
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert expected in fault(load_model, folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00"])
def test_broken_json(tmp_path, text):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    (folder / "vae" / "config.json").write_text(text)
    assert "JSON" in fault(load_model, folder)


def test_old_and_new_names_at_once(tmp_path):
    tensors = load_file(SHIPPED / "vae" / "diffusion_pytorch_model.safetensors")
    key = "encoder.mid_block.attentions.0.to_q.weight"
    path = save(tensors | {key.replace("to_q", "query"): tensors[key].clone()}, tmp_path / "vae.safetensors")
    assert f"has {key} twice" in fault(load_vae, path)


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [
        ([1], []), (None, None), ({"a": 10**8}, []), ({"a": "0"}, []), ({"a": 0, "b": 0}, []), ({"a": 0}, []),
        ("valid", 5), ("valid", [1]), ("valid", [["a"]]), ("valid", [[1, 2]]), ("valid", [["no", "such"]]),
    ],
)  # fmt: skip
def test_broken_tokenizers(tmp_path, vocabulary, merges):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    valid = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    model = {"vocab": valid if vocabulary == "valid" else vocabulary, "merges": merges}
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert "tokenizer" in fault(load_model, folder)
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": [1]}))
    assert "not a CLIP tokenizer" in fault(load_model, folder)


def test_merges_that_are_not_text(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    (folder / "tokenizer" / "merges.txt").write_bytes(b"\xff\xfe\x00")
    assert "not text in UTF-8" in fault(load_model, folder)


def test_names_of_tensors_may_be_anything(tmp_path):
    path = save({"evil\n\x1b[31m": torch.zeros(1), "x" * 100_000: torch.zeros(1)}, tmp_path / "m.safetensors")
    message = fault(load_model, path)
    assert message.isprintable()
    assert len(message) < 1000
    torch.save({0: torch.zeros(1)}, tmp_path / "m.ckpt")
    assert "holds no tensors" in fault(load_model, tmp_path / "m.ckpt")


def test_absent_path(tmp_path):
    assert "no such file or folder" in fault(load_model, tmp_path / "v1-5.safetensors")


def test_model_config_is_the_files_own():
    sd = StableDiffusion.load(SHIPPED, device="cpu", dtype="float32")
    assert sd.config == ModelConfig(
        unet=UNetConfig(
            channels=48,
            channel_mult=(1, 2, 4),
            blocks_per_level=1,
            attention_levels=(1, 2),
            heads=4,
            context_dim=128,
            norm_groups=16,
        ),
        vae=VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), blocks_per_level=1, scale_factor=0.35766, norm_groups=8),
        text=TextConfig(vocab_size=678, width=128, layers=3, heads=4, mlp_width=512, max_length=32),
        schedule=ScheduleConfig(prediction_type="v_prediction"),
        image_size=128,
        cfg_scale=2.0,
    )
