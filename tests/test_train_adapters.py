"""LoRAs and embeddings that learn: what learns and what does not, and their files in this package and in diffusers."""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import assert_parity, relative_error, their_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import assert_restored, snapshot
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm import SD_V1, ModelConfig, StableDiffusion, TextConfig, UNetConfig, VAEConfig
from ldm.adapters.keys import spellings, split
from ldm.checkpoint import configs
from ldm.errors import NumericalError, RequestError
from ldm.models.text import TextEncoder
from ldm.models.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_characters
from ldm.models.unet import UNet
from ldm.train.inversion import TrainableEmbedding, end_inversion, save_embedding, start_inversion
from ldm.train.lora import LoRALayer, add_lora, lora_tensors, remove_lora, save_lora, save_tensors

LENGTH = 24  # of a prompt, its ends included
MERGES = [("t", "oy</w>"), ("o", "y</w>")]
TOKENS = [*byte_characters(), *(c + "</w>" for c in byte_characters()), *("".join(pair) for pair in MERGES)]
VOCABULARY = {token: i for i, token in enumerate([*TOKENS, *SPECIAL_TOKENS])}
TINY = ModelConfig(
    UNetConfig(channels=16, channel_mult=(1, 2, 2), blocks_per_level=1, attention_levels=(0, 1), heads=2,
               context_dim=24, norm_groups=8),
    VAEConfig(channels=8, channel_mult=(1, 2), blocks_per_level=1, norm_groups=4),
    TextConfig(len(VOCABULARY), width=24, layers=2, heads=2, mlp_width=48, max_length=LENGTH),
    image_size=32,
)  # fmt: skip
PROMPTS = ["a toy", "two toys on a table", "", "a <toy> and a toy"]
WHICH, LAYOUTS = ["attention", "attention+conv"], ["kohya", "peft"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model that diffusers has made."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("train") / "model"
    parts = configs.parts_to_json({"unet": TINY.unet, "vae": TINY.vae, "text": TINY.text}, TINY)
    diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel.from_config(parts["unet"]),
        vae=diffusers.AutoencoderKL.from_config(parts["vae"]),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(parts["text_encoder"])),
        tokenizer=their_tokenizer(VOCABULARY, MERGES, LENGTH),
        scheduler=diffusers.DDIMScheduler.from_config(configs.schedule_to_json(TINY.schedule)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


@pytest.fixture
def sd(folder) -> StableDiffusion:
    torch.manual_seed(0)
    return StableDiffusion.load(folder, device="cpu", dtype="float32")


@pytest.fixture
def pipeline(folder):
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def outputs(sd: StableDiffusion) -> tuple[Tensor, Tensor]:
    """What the text encoder and the U-Net answer to the same input each time."""
    states = sd.text(sd.text.tokenize(PROMPTS))
    return states, sd.unet(torch.randn(4, 4, 8, 8, generator=seeded(1)), torch.tensor([1, 300, 700, 999]), states)


@torch.enable_grad()
def train(sd: StableDiffusion, steps: int = 20, lr: float = 0.02) -> list[float]:
    """Fit what learns to noise that was drawn once; answers with the losses."""
    parameters = [p for network in (sd.unet, sd.text) for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    losses = []
    for _ in range(steps):
        _, predicted = outputs(sd)
        loss = F.mse_loss(predicted, torch.randn(predicted.shape, generator=seeded(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_lora(sd: StableDiffusion, which: str, rank: int = 4, alpha: float = 6) -> tuple[dict, dict]:
    return tuple(add_lora(network, which, rank, alpha, seeded(3)) for network in (sd.unet, sd.text))


# --- LoRA -------------------------------------------------------------------------------------------------------------

BASES = {
    "linear": lambda: (nn.Linear(12, 20), torch.randn(2, 5, 12)),
    "linear without a bias": lambda: (nn.Linear(12, 20, bias=False), torch.randn(2, 12)),
    "convolution": lambda: (nn.Conv2d(12, 20, 3, padding=1), torch.randn(2, 12, 7, 6)),
    "convolution with a stride": lambda: (nn.Conv2d(12, 20, 3, stride=2, padding=1), torch.randn(2, 12, 7, 6)),
}


@pytest.mark.parametrize("base", BASES)
def test_the_formula(base):
    """W x + b with W + alpha / rank · up · down for W, in float64."""
    torch.manual_seed(0)
    module, x = BASES[base]()
    layer = LoRALayer(module, 4, 3.0, seeded())
    assert torch.equal(layer(x), module(x))  # at first
    nn.init.normal_(layer.up.weight)
    up, down = layer.up.weight.double().flatten(1), layer.down.weight.double()
    merged = module.weight.double() + 3 / 4 * torch.einsum("or,r...->o...", up, down)
    bias = None if module.bias is None else module.bias.double()
    if isinstance(module, nn.Linear):
        expected = F.linear(x.double(), merged, bias)
    else:
        expected = F.conv2d(x.double(), merged, bias, module.stride, module.padding)
    assert_parity(f"LoRA that learns, {base}", layer(x), expected, 1e-6)


def test_first_values():
    """Kaiming's with a = √5, uniform within ±1/√fan-in; the same for a seed whatever else was drawn."""
    first, second = (LoRALayer(nn.Conv2d(64, 8, 3, padding=1), 32, 1, seeded(7)).down.weight for _ in range(2))
    assert torch.equal(first, second)
    bound = 1 / math.sqrt(64 * 9)
    assert 0.99 * bound < first.abs().max() <= bound
    assert first.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_which_layers_learn():
    """As many of SD v1 as sd-scripts tells when it begins to train: 192 and 72, and 22 ResBlocks and 6 samplers."""
    tokenizer = Tokenizer(VOCABULARY, MERGES, 77)
    with torch.device("meta"):
        counts = [
            [len(add_lora(network, which, 1, 1, seeded())) for network in (UNet(SD_V1.unet), encoder)]
            for which, encoder in [(which, TextEncoder(SD_V1.text, tokenizer)) for which in WHICH]
        ]
    assert counts == [[192, 72], [192 + 2 * 22 + 6, 72]]


@pytest.mark.parametrize("which", WHICH)
def test_only_the_factors_learn(sd, which):
    before = {name: p.detach().clone() for network in (sd.unet, sd.text) for name, p in network.named_parameters()}
    layers = with_lora(sd, which)
    factors = {id(f.weight) for part in layers for layer in part.values() for f in (layer.up, layer.down)}
    losses = train(sd)
    assert losses[-1] < 0.9 * losses[0]
    for network in (sd.unet, sd.text):
        for name, parameter in network.named_parameters():
            assert parameter.requires_grad == (id(parameter) in factors), name
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (id(parameter) in factors), name
            if id(parameter) not in factors:
                assert torch.equal(parameter, before[name.replace(".base.", ".")]), name


def test_removal_leaves_nothing(sd):
    modules = [(name, id(module)) for network in (sd.unet, sd.text) for name, module in network.named_modules()]
    before, expected = snapshot(sd), outputs(sd)
    with_lora(sd, "attention+conv")
    train(sd, 2)
    assert not torch.equal(outputs(sd)[1], expected[1])
    for network in (sd.unet, sd.text):
        remove_lora(network)
    assert modules == [(n, id(m)) for network in (sd.unet, sd.text) for n, m in network.named_modules()]
    assert_restored(sd, before)
    assert all(torch.equal(now, then) for now, then in zip(outputs(sd), expected, strict=True))


@torch.enable_grad()
def test_factors_of_a_bfloat16_model_are_float32(folder):
    sd = StableDiffusion.load(folder, device="cpu", dtype="bfloat16")
    layers = add_lora(sd.unet, "attention+conv", 2, 2, seeded())
    predicted = sd.unet(torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([5]), torch.randn(1, LENGTH, 24).bfloat16())
    predicted.float().square().mean().backward()
    assert predicted.dtype == torch.bfloat16
    for layer in layers.values():
        assert (layer.base.weight.dtype, layer.up.weight.dtype) == (torch.bfloat16, torch.float32)
        assert layer.up.weight.grad.dtype == torch.float32
        assert layer.up.weight.grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", WHICH)
def test_lora_files(sd, pipeline, tmp_path, which, layout):
    """What was trained, what its file makes of this package's model, and of diffusers'."""
    untrained = outputs(sd)
    layers = with_lora(sd, which)
    train(sd, 6, lr=0.05)
    trained = outputs(sd)
    path = tmp_path / "x.safetensors"
    save_lora(path, *layers, TINY.unet, TINY.text, layout, {"ss_base": "tiny"})
    for network in (sd.unet, sd.text):
        remove_lora(network)
    with sd.load_lora(path):
        merged = outputs(sd)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    states = pipeline.text_encoder(sd.text.tokenize(PROMPTS)).last_hidden_state
    x, t = torch.randn(4, 4, 8, 8, generator=seeded(1)), torch.tensor([1, 300, 700, 999])
    theirs = states, pipeline.unet(x, t, states).sample
    for i, network in enumerate(["text", "U-Net"]):
        assert relative_error(trained[i], untrained[i]) > 0.05
        assert_parity(f"{network}, LoRA of {which} ({layout}), loaded", merged[i], trained[i], 1e-5)
        assert_parity(f"{network}, LoRA of {which} ({layout}), diffusers", theirs[i], trained[i], 1e-5)


def test_a_lora_of_one_network(sd, pipeline, tmp_path):
    layers = add_lora(sd.unet, "attention", 2, 2, seeded())
    train(sd, 3)
    trained = outputs(sd)[1]
    save_lora(tmp_path / "x.safetensors", layers, {}, TINY.unet, TINY.text, "kohya")
    remove_lora(sd.unet)
    with sd.load_lora(tmp_path / "x.safetensors"):
        assert_parity("U-Net, LoRA of it alone, loaded", outputs(sd)[1], trained, 1e-5)


def test_what_kohyas_files_tell(sd, tmp_path):
    unet, text = add_lora(sd.unet, "attention", 4, 6, seeded()), add_lora(sd.text, "attention", 2, 6, seeded())
    save_lora(tmp_path / "x.safetensors", unet, text, TINY.unet, TINY.text, "kohya", {"ss_steps": "20"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": "Dynamic",
            "ss_network_alpha": "6", "ss_steps": "20",
        }  # fmt: skip
    tensors = load_file(tmp_path / "x.safetensors")
    block, text_layer = "lora_unet_down_blocks_0_attentions_0", "lora_te_text_model_encoder_layers_1_mlp_fc2"
    assert tensors[f"{block}_proj_in.lora_down.weight"].shape == (4, 16, 1, 1)  # a convolution of diffusers
    assert tensors[f"{block}_transformer_blocks_0_attn2_to_k.lora_up.weight"].shape == (16, 4)
    assert tensors[f"{text_layer}.lora_down.weight"].shape == (2, 48)
    assert tensors[f"{text_layer}.alpha"] == 6


UNETS = st.builds(
    lambda mult, blocks, attends: UNetConfig(
        channels=4, channel_mult=tuple(mult), blocks_per_level=blocks, heads=1, context_dim=4, norm_groups=1,
        attention_levels=tuple(level for level in range(len(mult)) if attends[level]),
    ),
    st.lists(st.integers(1, 2), min_size=1, max_size=4), st.integers(1, 2), st.lists(st.booleans(), min_size=4),
)  # fmt: skip


@settings(deadline=None, max_examples=20)
@given(config=UNETS, layout=st.sampled_from(LAYOUTS), which=st.sampled_from(WHICH))
def test_every_layer_is_found_again(config, layout, which):
    layers = add_lora(UNet(config), which, 1, 1, seeded())
    names = spellings(config, TINY.text)
    found = [split(key) for key in lora_tensors(layers, {}, config, TINY.text, layout)]
    for part in {"kohya": ("down", "up", "alpha"), "peft": ("down", "up")}[layout]:
        assert [("unet", name) for name in layers] == [names[spelled] for spelled, p in found if p == part]


def test_what_is_wrong_with_a_lora(sd, tmp_path):
    for arguments, message in [
        (("everything", 4, 4), "LoRA is for 'everything': use one of attention, attention"),
        (("attention", 0, 4), "the rank is 0: use 1 to 4096"),
        (("attention", 4, 0.0), "alpha is 0.0: use a number above 0"),
        (("attention", 4, math.nan), "alpha is nan"),
    ]:
        with pytest.raises(RequestError, match=message):
            add_lora(sd.unet, *arguments, seeded())
    assert not any(isinstance(module, LoRALayer) for module in sd.unet.modules())
    layers = add_lora(sd.unet, "attention", 1, 1, seeded())
    with pytest.raises(RequestError, match="has LoRA layers already"):
        add_lora(sd.unet, "attention", 1, 1, seeded())
    with pytest.raises(RequestError, match="layout is 'x': use one of kohya, peft"):
        save_lora(tmp_path / "x", layers, {}, TINY.unet, TINY.text, "x")
    with pytest.raises(RequestError, match="nothing to write"):
        save_lora(tmp_path / "x", {}, {}, TINY.unet, TINY.text, "kohya")


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    with pytest.raises(NumericalError, match=r"not written, because NaN .* in 2 tensors \(a, b\)"):
        save_tensors(path, {"a": torch.tensor([math.nan]), "b": torch.tensor(math.inf), "c": torch.ones(1)}, {})
    assert not path.parent.exists()
    save_tensors(path, {"a": torch.ones(2)}, {})
    with pytest.raises(FileExistsError):
        save_tensors(path, {"a": torch.zeros(2)}, {})
    assert load_file(path)["a"].tolist() == [1, 1]
    save_tensors(path, {"a": torch.zeros(2)}, {}, overwrite=True)
    assert load_file(path)["a"].tolist() == [0, 0]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# --- textual inversion ------------------------------------------------------------------------------------------------


@torch.enable_grad()
def test_lookup_and_gradient_are_those_of_one_table():
    torch.manual_seed(0)
    table, rows = nn.Embedding(10, 6).requires_grad_(False), torch.randn(3, 6)
    learned, together = TrainableEmbedding(table, rows), nn.Parameter(torch.cat([table.weight, rows]))
    ids, weights = torch.tensor([[0, 10, 9, 12, 12], [1, 2, 3, 10, 9]]), torch.randn(2, 5, 6)
    ours, theirs = learned(ids), F.embedding(ids, together)
    assert torch.equal(ours, theirs)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert relative_error(learned.rows.grad, together.grad[10:]) < 1e-6
    assert table.weight.grad is None


def test_only_the_rows_learn(sd):
    sd.unet.requires_grad_(False)
    before = snapshot(sd)
    learned = start_inversion(sd.text, "<toy>", 3, "toy", seeded())
    first = learned.rows.detach().clone()
    losses = train(sd)
    assert losses[-1] < losses[0] - 1e-3
    assert [name for name, p in sd.text.named_parameters() if p.requires_grad] == [
        "transformer.embeddings.token_embedding.rows"
    ]
    assert all(parameter.grad is None for parameter, _ in before.values())
    assert (learned.rows != first).any(dim=1).all()
    end_inversion(sd.text)
    assert_restored(sd, before)
    assert not sd.text.triggers


def test_the_first_rows(sd):
    table = sd.text.transformer.embeddings.token_embedding.weight
    [ids] = sd.text.tokenizer.encode(["a toy"])
    assert len(ids) == 2
    learned = start_inversion(sd.text, "<toy>", 5, "a toy", seeded())
    assert (learned.rows.shape, learned.rows.dtype) == ((5, 24), torch.float32)
    assert torch.equal(learned.rows, table[[*ids, *ids, ids[0]]])
    end_inversion(sd.text)
    table[:, 0] += 5  # a table whose columns differ
    table[:, 1] *= 30
    one, same, other = (_drawn(sd.text, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    normal = (torch.cat([one, other]) - table.mean(dim=0)) / table.std(dim=0)
    assert normal.mean().abs() < 0.1
    assert normal.std() == pytest.approx(1, abs=0.1)
    assert normal.std(dim=0) == pytest.approx(torch.ones(24), abs=0.4)


def _drawn(text: TextEncoder, seed: int) -> Tensor:
    rows = start_inversion(text, "<toy>", LENGTH - 2, None, seeded(seed)).rows.detach()
    end_inversion(text)
    return rows


@pytest.mark.parametrize("layout", ["diffusers", "automatic1111"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_embedding_files(sd, pipeline, tmp_path, layout, vectors):
    """What was trained, what its file makes of this package's text encoder, and of diffusers'."""
    untrained = sd.text.encode(PROMPTS[3])
    learned = start_inversion(sd.text, "<toy>", vectors, "toy", seeded())
    sd.unet.requires_grad_(False)
    train(sd, 6, lr=0.2)
    ids, trained = sd.text.tokenize(PROMPTS[3]), sd.text.encode(PROMPTS[3])
    path = tmp_path / "<toy>.safetensors"
    save_embedding(path, "<toy>", learned.rows, layout)
    end_inversion(sd.text)
    assert relative_error(trained, untrained) > 0.05
    with sd.load_embedding(path) as handle:
        assert handle.name == "<toy>"
        assert torch.equal(sd.text.encode(PROMPTS[3]), trained)
    pipeline.load_textual_inversion(path, token=None if layout == "diffusers" else "<toy>")
    prompt = pipeline.maybe_convert_prompt(PROMPTS[3], pipeline.tokenizer)
    theirs = pipeline.tokenizer(prompt, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    assert torch.equal(ids, theirs)
    states = pipeline.text_encoder(theirs).last_hidden_state
    assert_parity(f"text states, embedding of {vectors} ({layout}), diffusers", states, trained, 1e-5)


def test_a_word_beside_an_embedding_of_a_file(sd, tmp_path):
    save_embedding(tmp_path / "old.safetensors", "<old>", torch.randn(2, 24), "diffusers")
    with sd.load_embedding(tmp_path / "old.safetensors"):
        expected = sd.text.encode("an <old> toy")
        learned = start_inversion(sd.text, "<new>", 2, "<old>", seeded())
        assert torch.equal(sd.text.encode("an <old> toy"), expected)
        assert torch.equal(sd.text.encode("an <NEW> toy"), expected)
        learned.rows.add_(1)
        assert not torch.equal(sd.text.encode("an <new> toy"), expected)
        end_inversion(sd.text)
        assert torch.equal(sd.text.encode("an <old> toy"), expected)
        assert list(sd.text.triggers) == ["old", "<old>"]


@torch.enable_grad()
def test_rows_of_a_bfloat16_model_are_float32(folder):
    text = StableDiffusion.load(folder, device="cpu", dtype="bfloat16").text
    learned = start_inversion(text, "<toy>", 2, None, seeded())
    states = text(text.tokenize("a <toy>"))
    states.float().square().mean().backward()
    assert (states.dtype, learned.rows.dtype, learned.rows.grad.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    assert learned.rows.grad.any(dim=1).all()


def test_what_is_wrong_with_a_word(sd, tmp_path):
    for arguments, message in [
        (("", 1, None), "without blanks"),
        (("a toy", 1, None), "without blanks"),
        (("t", 1, None), "'t', is known already: use another, such as <t>"),
        (("T", 1, None), "'T', is known already: use another, such as <T>"),
        (("<toy>", 0, None), f"a word of 0 vectors: use 1 to {LENGTH - 2}"),
        (("<toy>", LENGTH - 1, None), f"a word of {LENGTH - 1} vectors"),
        (("<toy>", 1, "a toy"), "'a toy', are 2 tokens: use 1 to 1, or more vectors"),
        (("<toy>", 1, ""), "'', are 0 tokens"),
    ]:
        with pytest.raises(RequestError, match=message):
            start_inversion(sd.text, *arguments, seeded())
    assert not sd.text.triggers
    start_inversion(sd.text, "<toy>", 1, "toy", seeded())
    with pytest.raises(RequestError, match="is learning already"):
        start_inversion(sd.text, "<boy>", 1, "toy", seeded())
    with pytest.raises(RequestError, match="layout is 'x': use one of diffusers, automatic1111"):
        save_embedding(tmp_path / "x", "<toy>", torch.ones(1, 24), "x")
