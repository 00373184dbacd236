"""Tokenizer and text encoder against transformers' own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache
from importlib import resources

import pytest
import torch
import transformers
from conftest import SHIPPED, SHIPPED_TEXT, relative_error, their_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm import TextConfig
from ldm.checkpoint.load import load_tokenizer
from ldm.models.text import TextEncoder
from ldm.models.tokenizer import Tokenizer, shipped_vocabulary

SMALL = TextConfig(width=32, layers=2, heads=2, mlp_width=64)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(*shipped_vocabulary(), max_length=77)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    torch.manual_seed(0)
    return TextEncoder(SMALL, tokenizer).eval()


def test_shipped_table_is_openais():
    table = resources.files("ldm.models").joinpath("clip_bpe/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(table).hexdigest() == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert "Copyright (c) 2021 OpenAI" in resources.files("ldm.models").joinpath("clip_bpe/LICENSE").read_text()


def test_vocabulary(tokenizer):
    vocabulary, merges = shipped_vocabulary()
    assert vocabulary == tokenizer.vocabulary and len(vocabulary) == 49408
    assert len(merges) == 48894
    assert vocabulary["!"] == 0  # as in CLIP's vocab.json, whose ends and seams these are
    assert vocabulary["ÿ"] == 187
    assert vocabulary["Ń"] == 255
    assert vocabulary["!</w>"] == 256
    assert vocabulary["in"] == 512
    assert (tokenizer.start, tokenizer.end) == (49406, 49407)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photograph of an astronaut riding a horse", [320, 8853, 539, 550, 18376, 6765, 320, 4558]),
        ("A  Photograph\tof\nAN astronaut riding a horse", [320, 8853, 539, 550, 18376, 6765, 320, 4558]),
        ("", []),
        ("it's 2024!", [585, 568, 273, 271, 273, 275, 256]),
    ],
)
def test_token_ids(tokenizer, text, ids):
    assert tokenizer.encode([text]) == [ids]


def test_ids_are_padded_with_the_end_token(encoder):
    ids = encoder.tokenize(["a horse", ""])
    assert ids.shape == (2, 77)
    assert ids[0].tolist() == [49406, 320, 4558] + [49407] * 74
    assert ids[1].tolist() == [49406] + [49407] * 76
    assert torch.equal(encoder.tokenize("a horse"), ids[:1])


def test_longer_prompts_are_cut_and_the_rest_is_named(encoder, caplog):
    ids = encoder.tokenize(["a " * 75 + "horse in a hat"])
    assert ids.shape == (1, 77)
    assert ids[0, -2:].tolist() == [320, 49407]
    assert "'horse in a hat'" in caplog.text
    assert "79 tokens" in caplog.text
    caplog.clear()
    encoder.tokenize(["a " * 10_000])
    assert len(caplog.text) < 500
    caplog.clear()
    encoder.tokenize(["a " * 75])
    assert not caplog.text


def test_states_equal_transformers(encoder):
    """Whichever version of transformers is installed, our keys are the same and lead to its own result."""
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, hidden_act="quick_gelu"
        )
    ).eval()
    getattr(model, "text_model", model).load_state_dict(encoder.transformer.state_dict())
    ids = encoder.tokenize(["a horse", "a photograph of an astronaut"])
    states = encoder.encode(["a horse", "a photograph of an astronaut"])
    assert states.shape == (2, 77, 32)
    assert relative_error(states, model(input_ids=ids).last_hidden_state) == 0
    assert "transformer.embeddings.token_embedding.weight" in encoder.state_dict()


def test_tokenizer_of_a_folder(tmp_path):
    """A model's own tokenizer is used, from vocab.json and merges.txt or from tokenizer.json alike."""
    theirs = transformers.CLIPTokenizerFast.from_pretrained(SHIPPED / "tokenizer", local_files_only=True)
    theirs.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):  # which transformers before 5 writes too
        (tmp_path / name).unlink(missing_ok=True)
    both, single = (load_tokenizer(folder, SHIPPED_TEXT, folder) for folder in (SHIPPED / "tokenizer", tmp_path))
    for text, count in {"a large red circle on a blue background": 8, "Zebra!": 6, "it's 2024": 7, "": 0}.items():
        [ids] = both.encode([text])
        assert len(ids) == count  # words that it knows are one token, others are spelled
        assert [ids] == single.encode([text])
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]


def test_folder_tokenizer_faults(tmp_path):
    from ldm.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"knows 600 tokens, the tokenizer 49408"):
        load_tokenizer(None, TextConfig(vocab_size=600), tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ["a"], "merges": []}}))
    with pytest.raises(CheckpointError, match="not a CLIP tokenizer"):
        load_tokenizer(tmp_path, TextConfig(), tmp_path)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20), st.sampled_from(["<|endoftext|>", "<|startoftext|>", "it's", " ", "\n", "É", "ﬁ"])
        ),
        max_size=6,
    )
)
def test_any_text_is_read_as_transformers_does(parts):
    text = "".join(parts)
    ours, theirs = both_tokenizers()
    [ids] = ours.encode([text])
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids)
    for i in ids:
        assert ours.ends_word(i) == theirs.convert_ids_to_tokens(i).endswith("</w>")


@cache
def both_tokenizers():
    tables = shipped_vocabulary()
    return Tokenizer(*tables, max_length=77), their_tokenizer(*tables, 77)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_layers_equal_transformers(activation, clip_skip, tokenizer):
    torch.manual_seed(0)
    encoder = TextEncoder(replace(SMALL, activation=activation), tokenizer).eval()
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, hidden_act=activation
        )
    ).eval()
    model = getattr(model, "text_model", model)
    model.load_state_dict(encoder.transformer.state_dict())
    ids = encoder.tokenize(["a horse", "a photograph of an astronaut"])
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert relative_error(encoder(ids, clip_skip), model.final_layer_norm(states[-clip_skip])) < 1e-6


def test_training_begins_with_clips_deviations(tokenizer):
    """OpenAI's, which transformers has too."""
    torch.manual_seed(0)
    config = TextConfig(vocab_size=49408, width=256, layers=2, heads=4, mlp_width=512)
    ours = TextEncoder(config, tokenizer).transformer.state_dict()
    theirs = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=49408
        )
    )
    theirs = getattr(theirs, "text_model", theirs).state_dict()
    for name, weight in ours.items():
        assert weight.std().item() == pytest.approx(theirs[name].std().item(), rel=0.05), name
        assert weight.mean().item() == pytest.approx(theirs[name].mean().item(), abs=1e-2), name
