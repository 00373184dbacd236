"""LoRAs and their relatives: names, merging and its undoing, and files nobody has vouched for."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from conftest import TINY_UNET, load_small, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import (
    CONTEXT,
    CONV,
    DOWN,
    LINEAR,
    NARROW,
    SQUARE,
    TEXT,
    WIDE,
    assert_restored,
    kohya,
    lora,
    of,
    rand,
    saved,
    snapshot,
)
from test_pipeline import PROMPT

from ldm import SD_V1, StableDiffusion
from ldm.adapters.keys import KOHYA_PREFIXES, PREFIXES, SUFFIXES, Target, spellings, split
from ldm.adapters.keys import _names as module_names
from ldm.adapters.lora import read_lora
from ldm.adapters.merge import Dose
from ldm.checkpoint.names import text_names, unet_names
from ldm.errors import CheckpointError, RequestError

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# --- names ------------------------------------------------------------------------------------------------------------

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_LAYER = "text_model.encoder.layers.0.self_attn"
OUT, TIME, PROJ = "middle.0.transformer.cross_attention.to_out", "down.2.time_proj", "down.2.transformer.proj_in"
FEED, NORM = "down.2.transformer.feed_forward.proj_in", "down.2.resnet.norm1"
BLOCK = "transformer_blocks_0"

NAMINGS = [  # a kind of file, a key in one, the module that it changes, the tensor's part in the change
    ("kohya", f"lora_unet_down_blocks_1_attentions_0_{BLOCK}_attn1_to_q.lora_down.weight", SQUARE, "down"),
    ("kohya, out", f"lora_unet_mid_block_attentions_0_{BLOCK}_attn2_to_out_0.lora_up.weight", OUT, "up"),
    ("kohya, CompVis blocks", f"lora_unet_input_blocks_3_1_{BLOCK}_attn1_to_q.lora_up.weight", SQUARE, "up"),
    ("kohya, text", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha", TEXT, "alpha"),
    ("kohya, text 1", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.dora_scale", TEXT, "dora_scale"),
    ("kohya, resnet", "lora_unet_down_blocks_1_resnets_0_conv1.lora_mid.weight", CONV, "mid"),
    ("kohya, CompVis resnet", "lora_unet_input_blocks_3_0_in_layers_2.hada_w1_a", CONV, "hada_w1_a"),
    ("kohya, time", "lora_unet_down_blocks_1_resnets_0_time_emb_proj.diff_b", TIME, "diff_b"),
    ("LyCORIS", f"lycoris_down_blocks_1_attentions_0_{BLOCK}_attn1_to_q.lokr_w1", SQUARE, "lokr_w1"),
    ("kohya, CompVis time", "lora_unet_input_blocks_3_0_emb_layers_1.diff", TIME, "diff"),
    ("kohya, time mlp", "lora_unet_time_embedding_linear_1.lokr_w1", "time_mlp.0", "lokr_w1"),
    ("kohya, downsampler", "lora_unet_down_blocks_0_downsamplers_0_conv.lokr_t2", DOWN, "lokr_t2"),
    ("kohya, CompVis downsampler", "lora_unet_input_blocks_2_0_op.lora_up.weight", DOWN, "up"),
    ("kohya, proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in.alpha", PROJ, "alpha"),
    ("kohya, feed-forward", f"lora_unet_down_blocks_1_attentions_0_{BLOCK}_ff_net_0_proj.lora_up.weight", FEED, "up"),
    ("kohya, norm", "lora_unet_down_blocks_1_resnets_0_norm1.w_norm", NORM, "w_norm"),
    ("diffusers, PEFT", f"unet.{QUERY}.lora_A.weight", SQUARE, "down"),
    ("diffusers, PEFT, DoRA", f"unet.{QUERY}.lora_magnitude_vector", SQUARE, "magnitude"),
    ("diffusers, PEFT, text", f"text_encoder.{TEXT_LAYER}.q_proj.lora_B.weight", TEXT, "up"),
    ("diffusers, PEFT, newer text", "text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.weight", TEXT, "up"),
    ("PEFT's state dict", f"unet.{QUERY}.lora_A.default.weight", SQUARE, "down"),
    ("PEFT's own file", f"base_model.model.{QUERY}.lora_B.weight", SQUARE, "up"),
    ("PEFT's own file, text", f"base_model.model.{TEXT_LAYER}.q_proj.lora_A.weight", TEXT, "down"),
    ("bare U-Net", f"{QUERY}.lora_A.weight", SQUARE, "down"),
    ("diffusers, lora", f"unet.{QUERY}.lora.down.weight", SQUARE, "down"),
    ("diffusers, linear layer", f"text_encoder.{TEXT_LAYER}.q_proj.lora_linear_layer.up.weight", TEXT, "up"),
    ("processors", f"unet.{QUERY.replace('to_q', 'processor.to_q')}_lora.down.weight", SQUARE, "down"),
    (
        "bare processors",
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight",
        OUT,
        "up",
    ),
    ("diffusers, old text", f"text_encoder.{TEXT_LAYER}.to_q_lora.up.weight", TEXT, "up"),
    ("ComfyUI", "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.lora_up.weight", SQUARE, "up"),
    ("ComfyUI, text", f"text_encoders.clip_l.transformer.{TEXT_LAYER}.q_proj.lora_up.weight", TEXT, "up"),
]


@pytest.mark.parametrize(("naming", "key", "module", "part"), NAMINGS, ids=[row[0] for row in NAMINGS])
def test_every_naming_resolves(sd, naming, key, module, part):
    spelled, found = split(key)
    target = Target("text" if module == TEXT else "unet", module)
    assert (spellings(sd.config.unet, sd.config.text)[spelled], found) == (target, part)


@pytest.mark.parametrize("unet", [SD_V1.unet, TINY_UNET], ids=["full", "tiny"])
def test_no_two_modules_share_a_spelling(unet):
    owners: dict[str, set[Target]] = {}
    for part, rows in [("unet", unet_names(unet)), ("text", text_names(SD_V1.text))]:
        for row in rows:
            for name in module_names(part, row):
                for spelling in [
                    *(prefix + name for prefix in PREFIXES[part]),
                    *(prefix + name.replace(".", "_") for prefix in KOHYA_PREFIXES[part]),
                ]:
                    owners.setdefault(spelling, set()).add(Target(part, row.ours))
    assert not {name: targets for name, targets in owners.items() if len(targets) > 1}
    assert (
        spellings(unet, SD_V1.text).items() <= {name: next(iter(targets)) for name, targets in owners.items()}.items()
    )


def test_names_of_sd_v1_are_found_in_kohyas_way():
    """A few of the names in a LoRA for SD v1.5 that sd-scripts has trained."""
    names = spellings(SD_V1.unet, SD_V1.text)
    for spelling in [
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v",
        "lora_unet_output_blocks_11_1_transformer_blocks_0_attn2_to_v",
    ]:
        assert names[spelling] == Target("unet", "up.14.transformer.cross_attention.to_v")
    assert names["lora_te_text_model_encoder_layers_11_mlp_fc2"] == Target(
        "text", "transformer.encoder.layers.11.mlp.fc2"
    )


# --- several, and none ------------------------------------------------------------------------------------------------


def test_several_at_once_in_any_order(sd, tmp_path):
    before = snapshot(sd)
    paths = [saved(tmp_path, lora(sd), f"{name}.safetensors") for name in "abc"]
    alone = []
    for path in paths:
        with sd.load_lora(path, 0.5):
            alone.append(sd.unet.get_parameter(f"{CONV}.weight").detach().clone())
    a, b, c = (sd.load_lora(path, 0.5) for path in paths)
    original = before[f"unet.{CONV}.weight"][1].double()
    expected = original + sum(weight.double() - original for weight in alone)
    assert relative_error(sd.unet.get_parameter(f"{CONV}.weight"), expected) < 1e-6
    b.remove()
    expected = alone[0].double() + alone[2].double() - original
    assert relative_error(sd.unet.get_parameter(f"{CONV}.weight"), expected) < 1e-6
    a.remove()
    assert torch.equal(sd.unet.get_parameter(f"{CONV}.weight"), alone[2])  # no trace of those that have gone
    a.remove()
    c.remove()
    assert_restored(sd, before)


def test_strengths_of_the_parts(sd, tmp_path):
    path = saved(tmp_path, lora(sd))
    unet, text = sd.unet.get_parameter(f"{SQUARE}.weight"), sd.text.get_parameter(f"{TEXT}.weight")
    with sd.load_lora(path, 0.5, text_strength=0):
        assert sd.text.get_parameter(f"{TEXT}.weight") is text
        assert not torch.equal(sd.unet.get_parameter(f"{SQUARE}.weight"), unet)
    with sd.load_lora(path, 0, text_strength=1):
        assert sd.unet.get_parameter(f"{SQUARE}.weight") is unet
        assert not torch.equal(sd.text.get_parameter(f"{TEXT}.weight"), text)
    with pytest.raises(RequestError, match="use finite numbers"):
        sd.load_lora(path, math.nan)


def test_bfloat16_is_rounded_once(tmp_path):
    sd = load_small("bfloat16")
    before = snapshot(sd)
    parameter = sd.unet.get_parameter(f"{CONV}.weight")
    paths = [saved(tmp_path, lora(sd, scale=0.02), f"{name}.safetensors") for name in "ab"]
    key = ("unet", f"{CONV}.weight")
    loras = [read_lora(path, sd.unet, sd.text) for path in paths]
    exact = sum((lora.changes[key].delta(parameter.float()) for lora in loras), start=parameter.float())
    with sd.load_lora(paths[0]), sd.load_lora(paths[1]):
        merged = sd.unet.get_parameter(f"{CONV}.weight")
        assert merged.dtype == torch.bfloat16
        assert merged.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(merged, exact.bfloat16())
        sd.txt2img(PROMPT, seed=1, steps=1)
    assert_restored(sd, before)


def test_a_model_that_moves_meanwhile(tmp_path):
    moved, still = (StableDiffusion.load(device="cpu", dtype="float32") for _ in range(2))
    handle = moved.load_lora(saved(tmp_path, lora(moved)))
    moved.unet.bfloat16()
    handle.remove()
    still.unet.bfloat16()
    for (name, weight), expected in zip(moved.unet.named_parameters(), still.unet.parameters(), strict=True):
        assert torch.equal(weight, expected), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    sd = StableDiffusion.load(device="cuda", dtype="float16")
    before = {name: (value, value.clone()) for name, value in sd.unet.named_parameters()}
    with sd.load_lora(saved(tmp_path, lora(sd))):
        assert sd.unet.get_parameter(f"{CONV}.weight").is_cuda
        assert {original.device.type for original in sd.adapters._originals.values()} == {"cpu"}
        sd.txt2img(PROMPT, seed=1, steps=1)
    for name, weight in sd.unet.named_parameters():
        assert weight.is_cuda
        assert torch.equal(weight, before[name][1])


def test_a_failure_half_way_changes_nothing(sd, tmp_path, monkeypatch):
    paths = [saved(tmp_path, lora(sd), f"{name}.safetensors") for name in "ab"]
    with sd.load_lora(paths[0]):
        before = snapshot(sd)
        calls = []

        def fail(self, weight):
            calls.append(weight)
            if len(calls) == 3:
                raise MemoryError
            return torch.ones_like(weight)

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr("ldm.adapters.kinds.Change.delta", fail)
            sd.load_lora(paths[1])
        assert_restored(sd, before)


# --- files nobody has vouched for -------------------------------------------------------------------------------------


def faulty(sd):
    """What is wrong with a file: its tensors, and what the error says."""

    def at(**parts: torch.Tensor):
        return of(sd, LINEAR, **parts)

    up, down = rand(WIDE, 4), rand(4, CONTEXT)
    good = {"up": up, "down": down}
    w1, w2 = rand(8, 4), rand(WIDE // 8, CONTEXT // 4)
    w2_a, w2_b = rand(WIDE // 8, 2), rand(2, CONTEXT // 4)
    sdxl = "lora_unet_input_blocks_4_1_transformer_blocks_9_attn1_to_q.lora_up.weight"
    return {
        "width": (at(up=up, down=rand(4, 1024)), rf"lora_down\.weight.*{WIDE}×1024, .*{WIDE}×{CONTEXT}"),
        "height": (at(up=rand(WIDE + 1, 4), down=down), rf"lora_up\.weight.*{WIDE + 1}×{CONTEXT}"),
        "ranks": (at(up=up, down=rand(5, CONTEXT)), rf"lora_down\.weight.*\[5, {CONTEXT}\]"),
        "no up": (at(down=down), r"lora_down\.weight.* has no up beside it"),
        "no down": (at(up=up), r"lora_up\.weight.* has no down beside it"),
        "only mid": (of(sd, CONV, mid=rand(4, 4, 3, 3)), r"lora_mid\.weight.* has no down or up beside it"),
        "only alpha": (at(alpha=torch.tensor(1.0)), r"changes nothing .* without anything to scale: 1 tensors"),
        "only lengths": (at(dora_scale=rand(WIDE)), r"dora_scale.* has no factors"),
        "endless alpha": (at(up=up, down=down, alpha=torch.tensor(1e30)), r"alpha.* should be a number"),
        "half a LoHa": (at(hada_w1_a=up, hada_w1_b=down), r"hada_w.* has no hada_w2_a or hada_w2_b"),
        "half a LoKr": (at(lokr_w1=w1, lokr_w2_a=w2_a), r"lokr_w2_a.* has no lokr_w2_b"),
        "two changes": (at(**good, diff=rand(WIDE, CONTEXT)), "two changes"),
        "two forms": (at(lokr_w1=w1, lokr_w2=w2, lokr_w2_a=w2_a, lokr_w2_b=w2_b), "two forms"),
        "NaN": (at(up=up, down=down * math.nan), r"lora_down\.weight.* NaN or infinity"),
        "no rank": (at(up=rand(WIDE, 0), down=rand(0, CONTEXT)), "rank 0"),
        "huge rank": (at(up=rand(WIDE, 5000), down=rand(5000, CONTEXT)), "rank 5000"),
        "huge Kronecker product": (at(lokr_w1=rand(1000, 1000), lokr_w2=rand(1000, 1000)), "1000000×1000000"),
        "LoHa of two sizes": (
            at(hada_w1_a=up, hada_w1_b=down, hada_w2_a=up[:1].clone(), hada_w2_b=down + 1),
            f"{WIDE}×{CONTEXT} and 1×{CONTEXT}",
        ),
        "integers": (at(up=up.long(), down=down), r"lora_up\.weight.*I64"),
        "no matrix": (at(up=torch.tensor(1.0), down=down), r"lora_up\.weight.*\[\]"),
        "alpha of two": (at(**good, alpha=rand(2)), r"alpha.* should be a number"),
        "infinite alpha": (at(**good, alpha=torch.tensor(math.inf)), "alpha"),
        "lengths": (at(**good, dora_scale=rand(7, 1)), r"dora_scale.*\[7, 1\]"),
        "a bias where none is": (at(diff_b=rand(WIDE)), r"diff_b.* has no bias"),
        "a norm": (of(sd, NORM, w_norm=rand(NARROW + 1)), rf"w_norm.*{NARROW + 1}×1"),
        "twice": (
            at(up=up) | {f"unet.{QUERY.replace('attn1.to_q', 'attn2.to_k')}.lora_B.weight": up + 1},
            "spelled in two ways",
        ),
        "SDXL": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": up}, "for SDXL"),
        "SDXL's U-Net": ({sdxl: up}, "changes nothing.*not in this model"),
        "OFT": (at(oft_blocks=rand(4, 4, 4)), "changes nothing.*of an unknown kind: 1 tensors"),
        "a model": ({"model.diffusion_model.out.2.weight": rand(4, 4)}, "this is a model or a part of one"),
    }


def test_faulty_files(sd, tmp_path):
    for what, (tensors, message) in faulty(sd).items():
        path = saved(tmp_path, tensors, f"{what}.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            sd.load_lora(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize("content", [b"", b"x", b"\x80\x04nonsense", b"{}" * 50])
def test_files_of_nothing(sd, tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError):
        sd.load_lora(tmp_path / "x")
    with pytest.raises(CheckpointError, match="no such file"):
        sd.load_lora(tmp_path / "y")


@pytest.mark.parametrize(
    "settings",
    [
        "not JSON",
        '{"unet.lora_alpha": "4"}',
        '{"unet.lora_alpha": true}',
        '{"unet.alpha_pattern": {"(a+)+$": 1}}',
        '{"unet.alpha_pattern": [1]}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": 1' + "0" * 400 + "}",
        '{"lora_alpha": 1e300}',
    ],
)
def test_faulty_settings(sd, tmp_path, settings):
    tensors = {f"unet.{QUERY}.lora_A.weight": rand(4, WIDE), f"unet.{QUERY}.lora_B.weight": rand(WIDE, 4)}
    with pytest.raises(CheckpointError):
        sd.load_lora(saved(tmp_path, tensors, lora_adapter_metadata=settings))


def test_settings_of_another_method_are_refused(sd, tmp_path):
    path = saved(tmp_path, lora(sd), "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(CheckpointError, match="'LOHA' is not read"):
        sd.load_lora(path)


def test_what_is_left_out_is_said_once(sd, tmp_path, caplog):
    strays = {"lora_unet_x.lora_up.weight": rand(1), f"{kohya(sd, SQUARE)}.oft_blocks": rand(1)}
    with sd.load_lora(saved(tmp_path, lora(sd) | strays)):
        [record] = caplog.records
    assert record.levelno == logging.WARNING
    for what in ("not in this model: 1 tensors (lora_unet_x.lora_up.weight)", "of an unknown kind: 1 tensors"):
        assert what in record.getMessage()


def test_nan_on_request(sd, tmp_path):
    parts = {"diff": torch.full((WIDE, WIDE), math.nan)}
    with sd.load_lora(saved(tmp_path, of(sd, SQUARE, **parts)), allow_nonfinite=True):
        assert sd.unet.get_parameter(f"{SQUARE}.weight").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_pickles(sd, tmp_path, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in lora(sd).items()}
    torch.save(tensors, tmp_path / "x.pt")
    with sd.load_lora(tmp_path / "x.pt"):
        merged = sd.unet.get_parameter(f"{CONV}.weight").detach().clone()
    with sd.load_lora(saved(tmp_path, {key: tensor.float() for key, tensor in tensors.items()})):
        assert torch.equal(sd.unet.get_parameter(f"{CONV}.weight"), merged)


def test_names_and_strengths(sd, tmp_path):
    read = read_lora(saved(tmp_path, lora(sd)), sd.unet, sd.text, name="n")
    assert read.name == "n"
    assert {part for part, _ in read.changes} == {"unet", "text"}
    with pytest.raises(RequestError, match=r"the strength of n is inf and 1\.0"):
        Dose(read, math.inf)


PARTS = sorted(set(SUFFIXES.values()))
SIZES = st.sampled_from([0, 1, 2, 3, 8, 12, NARROW, WIDE, CONTEXT, NARROW * 9])


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(PARTS), st.lists(SIZES, max_size=5), min_size=1, max_size=6), st.booleans())
def test_arbitrary_shapes(sd, tmp_path, shapes, convolution):
    """A file is merged, or refused in one line, and nothing else."""
    tensors = {part: torch.zeros(shape) for part, shape in shapes.items() if math.prod(shape) < 1 << 20}
    path = saved(tmp_path, of(sd, CONV if convolution else LINEAR, **tensors))
    try:
        with sd.load_lora(path, 0.5):
            pass
    except CheckpointError as error:
        assert "\n" not in str(error)
