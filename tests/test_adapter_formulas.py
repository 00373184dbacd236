"""LoRAs and their relatives: their formulas in float64, LyCORIS's own, and the outputs of diffusers with peft."""

from __future__ import annotations

import diffusers
import lycoris.functional as lycoris
import numpy as np
import peft
import pytest
import torch
from conftest import SHIPPED, SHIPPED_TEXT, assert_parity, relative_error
from lora_files import CONTEXT, CONV, LINEAR, NARROW, SQUARE, WIDE, lora, of, rand, saved
from lycoris.functional.general import weight_decompose
from test_pipeline import PROMPT
from torch import Tensor

from ldm import StableDiffusion
from ldm.adapters.lora import read_lora
from ldm.checkpoint.names import text_names, unet_names

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# --- formulas ---------------------------------------------------------------------------------------------------------


def f64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def einsum(equation: str, *tensors: Tensor) -> np.ndarray:
    return np.einsum(equation, *map(f64, tensors))


def lora_linear():
    up, down = rand(WIDE, 4), rand(4, CONTEXT)
    return (
        LINEAR,
        {"up": up, "down": down, "alpha": torch.tensor(2.0)},
        einsum("or,ri->oi", up, down) / 2,
    )


def lora_linear_of_1x1_convolutions():
    up, down = rand(WIDE, 4, 1, 1), rand(4, WIDE, 1, 1)
    return (
        "down.2.transformer.proj_in",
        {"up": up, "down": down},
        einsum("orxy,riyx->oi", up, down),
    )


def locon():
    up, down = rand(WIDE, 4, 1, 1), rand(4, NARROW, 3, 3)
    parts = {"up": up, "down": down, "alpha": torch.tensor(3)}
    return CONV, parts, einsum("or,rixy->oixy", up[:, :, 0, 0], down) * 3 / 4


def locon_tucker():
    up, mid, down = rand(WIDE, 4, 1, 1), rand(4, 4, 3, 3), rand(4, NARROW, 1, 1)
    parts = {"up": up, "mid": mid, "down": down, "alpha": torch.tensor(2.0)}
    return CONV, parts, einsum("om,mnxy,ni->oixy", up[:, :, 0, 0], mid, down[:, :, 0, 0]) / 2


def loha():
    a1, b1, a2, b2 = rand(WIDE, 4), rand(4, CONTEXT), rand(WIDE, 4), rand(4, CONTEXT)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    return LINEAR, parts, einsum("or,ri->oi", a1, b1) * einsum("or,ri->oi", a2, b2) / 4


def loha_conv():
    a1, b1, a2, b2 = rand(WIDE, 4), rand(4, NARROW * 9), rand(WIDE, 4), rand(4, NARROW * 9)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return CONV, parts, (einsum("or,rk->ok", a1, b1) * einsum("or,rk->ok", a2, b2)).reshape(WIDE, NARROW, 3, 3)


def loha_tucker():
    a1, b1, a2, b2 = rand(4, WIDE), rand(4, NARROW), rand(4, WIDE), rand(4, NARROW)
    t1, t2 = rand(4, 4, 3, 3), rand(4, 4, 3, 3)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_t1": t1, "hada_w2_a": a2, "hada_w2_b": b2, "hada_t2": t2}
    first, second = (einsum("po,pqxy,qi->oixy", a, t, b) for a, t, b in [(a1, t1, b1), (a2, t2, b2)])
    return CONV, parts | {"alpha": torch.tensor(2.0)}, first * second / 2


def kron(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(a, c) and (b, d, …) → (ab, cd, …): block (i, j) of the result is first[i, j] · second."""
    rows = [np.concatenate([value * second for value in row], axis=1) for row in first]
    return np.concatenate(rows, axis=0)


def lokr_whole():
    w1, w2 = rand(8, 4), rand(WIDE // 8, CONTEXT // 4)
    return (
        LINEAR,
        {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1.0)},
        kron(f64(w1), f64(w2)),
    )  # no rank: no alpha


def lokr():
    w1, a, b = rand(8, 4), rand(WIDE // 8, 2), rand(2, CONTEXT // 4)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    return LINEAR, parts, kron(f64(w1), einsum("or,ri->oi", a, b)) / 2


def lokr_both():
    a1, b1, a2, b2 = rand(8, 2), rand(2, 4), rand(WIDE // 8, 2), rand(2, CONTEXT // 4)
    parts = {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2_a": a2, "lokr_w2_b": b2, "alpha": torch.tensor(1.0)}
    return LINEAR, parts, kron(einsum("or,ri->oi", a1, b1), einsum("or,ri->oi", a2, b2)) / 2


def lokr_first():
    a1, b1, w2 = rand(8, 3), rand(3, 4), rand(WIDE // 8, CONTEXT // 4)
    parts = {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2": w2, "alpha": torch.tensor(1.0)}
    return LINEAR, parts, kron(einsum("or,ri->oi", a1, b1), f64(w2)) / 3


def lokr_conv():
    w1, w2 = rand(8, 4), rand(WIDE // 8, NARROW // 4, 3, 3)
    return CONV, {"lokr_w1": w1, "lokr_w2": w2}, kron(f64(w1), f64(w2))


def lokr_conv_pair():
    w1, a, b = rand(8, 4), rand(WIDE // 8, 2), rand(2, NARROW // 4 * 9)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    return CONV, parts, kron(f64(w1), einsum("or,rixy->oixy", a, b.view(2, -1, 3, 3))) / 2


def lokr_conv_tucker():
    w1, a, t, b = rand(8, 4), rand(2, WIDE // 8), rand(2, 2, 3, 3), rand(2, NARROW // 4)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_t2": t, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    return CONV, parts, kron(f64(w1), einsum("po,pqxy,qi->oixy", a, t, b)) / 2


def difference():
    diff = rand(WIDE, NARROW, 3, 3)
    return CONV, {"diff": diff}, f64(diff)


KINDS = [
    lora_linear, lora_linear_of_1x1_convolutions, locon, locon_tucker, loha, loha_conv, loha_tucker,
    lokr_whole, lokr, lokr_both, lokr_first, lokr_conv, lokr_conv_pair, lokr_conv_tucker, difference,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_weights_are_those_of_the_formula(sd, tmp_path, kind):
    module, parts, delta = kind()
    original = f64(sd.unet.get_parameter(f"{module}.weight"))
    with sd.load_lora(saved(tmp_path, of(sd, module, **parts)), 0.75):
        merged = sd.unet.get_parameter(f"{module}.weight")
        assert relative_error(merged, torch.from_numpy(original + 0.75 * delta)) < 1e-6


@pytest.mark.parametrize(
    "kind", [lora_linear, locon, locon_tucker, loha, lokr, lokr_conv_tucker], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_dora(sd, tmp_path, kind, axis, strength):
    """W + s (m (W + Δ) / ‖W + Δ‖ - W), with lengths of rows or of columns."""
    module, parts, delta = kind()
    original = f64(sd.unet.get_parameter(f"{module}.weight"))
    lengths = rand(original.shape[axis]).abs() + 0.5
    shape = [-1 if i == axis else 1 for i in range(original.ndim)]
    path = saved(tmp_path, of(sd, module, **parts, dora_scale=lengths.reshape(shape)))
    moved = original + delta
    others = tuple(i for i in range(original.ndim) if i != axis)
    rescaled = moved * f64(lengths).reshape(shape) / np.sqrt((moved**2).sum(axis=others, keepdims=True))
    with sd.load_lora(path, strength):
        merged = sd.unet.get_parameter(f"{module}.weight")
        assert relative_error(merged, torch.from_numpy(original + strength * (rescaled - original))) < 2e-6


def test_dora_of_a_square_weight_by_its_axis(sd, tmp_path):
    up, down, lengths = rand(WIDE, 4), rand(4, WIDE), rand(WIDE).abs() + 0.5
    weight = sd.unet.get_parameter(f"{SQUARE}.weight").detach()
    for on_rows, shape in [(True, (WIDE, 1)), (False, (1, WIDE))]:
        parts = {"up": up, "down": down, "dora_scale": lengths.reshape(shape)}
        theirs = weight_decompose(weight + up @ down, lengths.reshape(shape), wd_on_out=on_rows)
        with sd.load_lora(saved(tmp_path, of(sd, SQUARE, **parts))):
            assert relative_error(sd.unet.get_parameter(f"{SQUARE}.weight"), theirs) < 1e-6


def test_changes_of_norms_and_biases(sd, tmp_path):
    norm, conv = "down.2.resnet.norm1", CONV
    parts = {"w_norm": rand(NARROW), "b_norm": rand(NARROW)}
    biased = {"diff_b": rand(WIDE), "up": rand(WIDE, 2, 1, 1), "down": rand(2, NARROW, 3, 3)}
    path = saved(tmp_path, of(sd, norm, **parts) | of(sd, conv, **biased))
    originals = {key: value.detach().clone() for key, value in sd.unet.named_parameters()}
    with sd.load_lora(path, -0.5):
        for key, delta in [
            (f"{norm}.weight", parts["w_norm"]),
            (f"{norm}.bias", parts["b_norm"]),
            (f"{conv}.bias", biased["diff_b"]),
        ]:
            assert relative_error(sd.unet.get_parameter(key), originals[key] - 0.5 * delta) < 1e-6
        assert not torch.equal(sd.unet.get_parameter(f"{conv}.weight"), originals[f"{conv}.weight"])


LOCON = lycoris.locon.diff_weight, ["down", "up", "mid"]
LOHA = lycoris.loha.diff_weight, ["hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2"]
LOKR = lycoris.lokr.diff_weight, [f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
KRON = lycoris.lokr.kron_weight, LOKR[1]


@pytest.mark.parametrize(
    ("kind", "function", "names", "scale"),
    [
        (lora_linear, *LOCON, {"gamma": 2 / 4}),
        (locon, *LOCON, {"gamma": 3 / 4}),
        (locon_tucker, *LOCON, {"gamma": 2 / 4}),
        (loha, *LOHA, {"gamma": torch.tensor(1 / 4)}),
        (loha_tucker, *LOHA, {"gamma": torch.tensor(2 / 4)}),
        (lokr_whole, *LOKR, {"gamma": 1.0}),  # alpha: the rank, which it is divided by, it finds itself
        (lokr, *LOKR, {"gamma": 1.0}),
        (lokr_both, *LOKR, {"gamma": 1.0}),
        (lokr_conv_tucker, *KRON, {"scale": 1 / 2}),  # but for this form, where it takes another width for the rank
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_changes_equal_lycoris(sd, tmp_path, kind, function, names, scale):
    module, parts, _ = kind()
    path = saved(tmp_path, of(sd, module, **parts))
    weight = sd.unet.get_parameter(f"{module}.weight")
    ours = read_lora(path, sd.unet, sd.text).changes["unet", f"{module}.weight"].delta(weight)
    theirs = function(*(parts.get(name) for name in names), **scale)
    assert_parity(f"{kind.__name__}, LyCORIS", ours, theirs.reshape(weight.shape), 1e-6)


# --- diffusers and peft -----------------------------------------------------------------------------------------------

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONV_TARGETS = [
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "conv_in",
    "conv_out",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture
def pipeline(sd):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        SHIPPED, torch_dtype=torch.float32, local_files_only=True
    )
    # transformers before 5.6 does not find the text encoder's weights under the names that later ones gave them.
    getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder).load_state_dict(
        sd.text.transformer.state_dict()
    )
    return pipeline


def assert_outputs_equal(sd: StableDiffusion, pipeline, what: str) -> None:
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 801]), torch.randn(2, SHIPPED_TEXT.max_length, CONTEXT)
    theirs = pipeline.unet(x, t, context).sample
    assert_parity(f"U-Net with {what}", sd.unet(x, t, context), theirs, 1e-5)
    ids = sd.text.tokenize([PROMPT, ""])
    assert_parity(f"text encoder with {what}", sd.text(ids), pipeline.text_encoder(ids).last_hidden_state, 1e-5)


def adapted(pipeline, unet: dict, text: dict | None) -> None:
    """Give diffusers' networks random adapters of peft's."""
    pipeline.unet.add_adapter(peft.LoraConfig(init_lora_weights=False, **unet))
    if text:
        pipeline.text_encoder.add_adapter(peft.LoraConfig(init_lora_weights=False, **text))


CONFIGS = {
    "LoRA": {"r": 4, "lora_alpha": 4},
    "LoRA, alpha 6 of 4": {"r": 4, "lora_alpha": 6},
    "rank-stabilised LoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "LoRA of many ranks": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"fc1": 3, "to_q": 2},
        "alpha_pattern": {"fc2": 1, "to_k": 5},
    },
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_files_of_diffusers(sd, pipeline, tmp_path, what):
    """Adapters that peft made, saved by diffusers with their settings as metadata."""
    config = CONFIGS[what]
    adapted(
        pipeline,
        config | {"target_modules": UNET_TARGETS + CONV_TARGETS},
        config | {"target_modules": TEXT_TARGETS},
    )
    layers = {
        "unet_lora_layers": peft.get_peft_model_state_dict(pipeline.unet),
        "text_encoder_lora_layers": peft.get_peft_model_state_dict(pipeline.text_encoder),
    }
    settings = {
        "unet_lora_adapter_metadata": pipeline.unet.peft_config["default"].to_dict(),
        "text_encoder_lora_adapter_metadata": pipeline.text_encoder.peft_config["default"].to_dict(),
    }
    for values in settings.values():
        values["target_modules"] = sorted(values["target_modules"])
    pipeline.save_lora_weights(tmp_path, **layers, **settings)
    with sd.load_lora(tmp_path / "pytorch_lora_weights.safetensors"):
        assert_outputs_equal(sd, pipeline, f"{what}, saved by diffusers")


def test_files_of_a_network_alone(sd, pipeline, tmp_path):
    """As diffusers' networks save their adapters themselves, whose settings then have no prefix."""
    config = CONFIGS["LoRA, alpha 6 of 4"]
    pipeline.unet.add_adapter(
        peft.LoraConfig(init_lora_weights=False, target_modules=UNET_TARGETS, **config), "default"
    )
    pipeline.unet.save_lora_adapter(tmp_path)
    with sd.load_lora(tmp_path / "pytorch_lora_weights.safetensors"):
        assert_outputs_equal(sd, pipeline, "LoRA, alpha 6 of 4, saved by a network of diffusers")


@pytest.mark.parametrize("what", ["LoRA, alpha 6 of 4", "DoRA"])
def test_files_of_peft(sd, pipeline, tmp_path, what):
    """`adapter_model.safetensors`, with its settings in a file beside it."""
    for network, targets in [("unet", UNET_TARGETS + CONV_TARGETS), ("text_encoder", TEXT_TARGETS)]:
        config = peft.LoraConfig(init_lora_weights=False, target_modules=targets, **CONFIGS[what])
        peft.get_peft_model(getattr(pipeline, network), config).save_pretrained(tmp_path / network)
    path = "adapter_model.safetensors"
    with sd.load_lora(tmp_path / "unet" / path), sd.load_lora(tmp_path / "text_encoder" / path):
        assert_outputs_equal(sd, pipeline, f"{what}, saved by peft")


@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_files_of_kohya(sd, pipeline, tmp_path, strength):
    """The same file, read by diffusers, whose own converter knows kohya's names."""
    targets = (*UNET_TARGETS, "conv1", "conv2", "conv_shortcut", "time_emb_proj", *TEXT_TARGETS)
    rows = [*unet_names(sd.config.unet), *text_names(sd.config.text)]
    tensors = lora(sd, [row.ours for row in rows if row.diffusers.endswith(targets)])
    path = saved(tmp_path, tensors)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="x")
    pipeline.set_adapters("x", strength)
    with sd.load_lora(path, strength):
        assert_outputs_equal(sd, pipeline, f"LoRA in kohya's names, strength {strength}")
