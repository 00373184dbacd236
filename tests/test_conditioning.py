"""Contexts against those that the formulas of AUTOMATIC1111 give, on the states of transformers' own model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from conftest import SHIPPED, relative_error

from ldm import TextConfig
from ldm.cli import main
from ldm.conditioning import encode_prompt
from ldm.errors import RequestError
from ldm.models.text import TextEncoder
from ldm.models.tokenizer import Tokenizer, shipped_vocabulary

CONFIG = TextConfig(width=32, layers=12, heads=2, mlp_width=64)
BOS, EOS, TRIGGER = 49406, 49407, [1000, 2000, 3000]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG, Tokenizer(*shipped_vocabulary(), max_length=77)).eval()
    for parameter in encoder.parameters():  # as made, the layers hardly change what goes through them
        parameter.data += 0.1 * torch.randn_like(parameter)
    encoder.transformer.final_layer_norm.bias.data += 0.5  # means are divided by, and so must not vanish
    encoder.triggers = {"my-cat": TRIGGER}
    return encoder


@pytest.fixture(scope="module")
def reference(encoder):
    """transformers' text model with the same weights."""
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=49408,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=12,
            num_attention_heads=2,
            hidden_act="quick_gelu",
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    getattr(model, "text_model", model).load_state_dict(encoder.transformer.state_dict())
    return model.eval()


def row(encoder, chunk):
    """77 ids and weights of a chunk that is written as (words or ids, weight)."""
    ids, weights = [BOS], [1.0]
    for words, weight in chunk:
        tokens = encoder.tokenizer.encode([words])[0] if isinstance(words, str) else words
        ids += tokens
        weights += [weight] * len(tokens)
    return ids + [EOS] * (77 - len(ids)), weights + [1.0] * (77 - len(weights))


def states(reference, rows, clip_skip=1):
    """In float64, by AUTOMATIC1111's numbering: 1 is the last layer, 2 the one before; all through the final norm."""
    made = reference(input_ids=torch.tensor(rows), output_hidden_states=True)
    if clip_skip == 1:
        return made.last_hidden_state.double()
    return getattr(reference, "text_model", reference).final_layer_norm(made.hidden_states[-clip_skip]).double()


def expected(encoder, reference, chunks, clip_skip=1, emphasis="original"):
    """The context of one text: of each chunk z · w · mean(z) / mean(z · w)."""
    contexts = []
    for chunk in chunks:
        ids, weights = row(encoder, chunk)
        z = states(reference, [ids], clip_skip)
        weighted = z * torch.tensor(weights, dtype=torch.float64)[None, :, None]
        if emphasis == "original":
            weighted = weighted * (z.mean() / weighted.mean())
        contexts.append(z if emphasis == "ignore" else weighted)
    return torch.cat(contexts, dim=1)


PROMPTS = {
    "a cat on a mat": [[("a cat on a mat", 1)]],
    "": [[]],
    "a (red:1.3) cat": [[("a", 1), ("red", 1.3), ("cat", 1)]],
    "((a)) [cat], (very ((large))) dog": [
        [("a", 1.21), ("cat", 1 / 1.1), (",", 1), ("very", 1.1), ("large", 1.331), ("dog", 1)]
    ],
    "(a:0) (cat:-1)": [[("a", 0), ("cat", -1)]],
    r"a \(red\) (cat": [[("a (red)", 1), ("cat", 1.1)]],
    "a cat BREAK a (dog:1.5)": [[("a cat", 1)], [("a", 1), ("dog", 1.5)]],
    "BREAK (cat)": [[], [("cat", 1.1)]],
    "a cat\nBREAK": [[("a cat", 1)]],
    "a " * 80: [[("a " * 75, 1)], [("a " * 5, 1)]],
    "(" + "a " * 80 + ":1.2) b": [[("a " * 75, 1.2)], [("a " * 5, 1.2), ("b", 1)]],
    "a " * 70 + ", " + "(b:1.5) " * 10: [[("a " * 70 + ",", 1)], [("b " * 10, 1.5)]],
    "a " * 55 + ", " + "b " * 20: [[("a " * 55 + ",", 1)], [("b " * 20, 1)]],
    "a " * 54 + ", " + "b " * 21: [[("a " * 54 + "," + "b " * 20, 1)], [("b", 1)]],
    "a " * 75 + ", b": [[("a " * 75, 1)], [(", b", 1)]],
    "a (My-Cat:1.5) on a mat": [[("a", 1), (TRIGGER, 1.5), ("on a mat", 1)]],
    "a " * 73 + "my-cat b": [[("a " * 73, 1)], [(TRIGGER, 1), ("b", 1)]],
    "a " * 72 + "my-cat b": [[("a " * 72, 1), (TRIGGER, 1)], [("b", 1)]],
    "a " * 60 + ", my-cat " + "b " * 15: [[("a " * 60 + ",", 1)], [(TRIGGER, 1), ("b " * 15, 1)]],
}


@pytest.mark.parametrize("emphasis", ["original", "no norm", "ignore"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt[-30:])
def test_a_context_is_the_formulas(encoder, reference, prompt, emphasis):
    [(weight, context)] = encode_prompt(encoder, prompt, 10, emphasis=emphasis).at(0)
    assert weight == 1
    assert context.dtype == torch.float32
    assert relative_error(context, expected(encoder, reference, PROMPTS[prompt], emphasis=emphasis)) < 1e-5


@pytest.mark.parametrize("clip_skip", [1, 2, 3, 11, 12])
def test_clip_skip_counts_layers_from_the_end(encoder, reference, clip_skip):
    [(_, context)] = encode_prompt(encoder, "a (red:1.3) cat", 10, clip_skip=clip_skip).at(0)
    wanted = expected(encoder, reference, PROMPTS["a (red:1.3) cat"], clip_skip)
    assert relative_error(context, wanted) < 1e-5
    if clip_skip > 1:
        assert relative_error(context, expected(encoder, reference, PROMPTS["a (red:1.3) cat"])) > 1e-2


@pytest.mark.parametrize("clip_skip", [0, 13])
def test_a_layer_there_is_not_is_told(encoder, clip_skip):
    with pytest.raises(RequestError, match=f"clip_skip is {clip_skip}.* 12 layers"):
        encode_prompt(encoder, "a", 10, clip_skip=clip_skip)


def test_prompts_without_any_of_it_are_encoded_as_before(encoder):
    for prompt in ("", "a photograph of an astronaut riding a horse", "my-cat, ünicode 😀"):
        [(_, context)] = encode_prompt(encoder, prompt, 10).at(0)
        assert torch.equal(context, encoder.encode(prompt))


def test_texts_of_a_part_share_the_mean_that_is_restored(encoder, reference):
    """AUTOMATIC1111 encodes `a` and `(b:3)` in one tensor, in which `a` is twice of three steps."""
    conditioning = encode_prompt(encoder, "[a|(b:3)]", 3)
    rows, weights = zip(*(row(encoder, [chunk]) for chunk in (("a", 1), ("b", 3), ("a", 1))), strict=True)
    z = states(reference, rows)
    weighted = z * torch.tensor(weights, dtype=torch.float64)[..., None]
    a, b, _ = weighted * (z.mean() / weighted.mean())
    assert relative_error(conditioning.at(0)[0][1], a[None]) < 1e-5
    assert relative_error(conditioning.at(2)[0][1], b[None]) < 1e-5


def test_shorter_texts_of_a_part_get_empty_chunks(encoder, reference):
    conditioning = encode_prompt(encoder, "a [b:c BREAK d:5]", 10)
    assert relative_error(conditioning.at(0)[0][1], expected(encoder, reference, [[("a b", 1)], []])) < 1e-5
    long = expected(encoder, reference, [[("a c", 1)], [("d", 1)]])
    assert relative_error(conditioning.at(9)[0][1], long) < 1e-5


def test_shorter_parts_get_their_last_vector_again(encoder, reference):
    (_, short), (_, long) = encode_prompt(encoder, "a AND b BREAK c", 10).at(0)
    assert short.shape == long.shape == (1, 154, 32)
    once = expected(encoder, reference, [[("a", 1)]])
    assert relative_error(short, torch.cat([once, once[:, -1:].expand(-1, 77, -1)], dim=1)) < 1e-5


def test_parts_have_weights_and_change_over_the_steps(encoder):
    conditioning = encode_prompt(encoder, "a [cat:dog:0.3] AND [x|y]:0.5 AND z : -2", 10)
    alone = {text: encoder.encode(text) for text in ("a cat", "a dog", "x", "y", "z")}
    for step in range(10):
        (w1, first), (w2, second), (w3, third) = conditioning.at(step)
        assert (w1, w2, w3) == (1, 0.5, -2)
        assert relative_error(first, alone["a cat" if step <= 3 else "a dog"]) < 1e-5
        assert relative_error(second, alone["x" if step == 0 or step % 2 else "y"]) < 1e-5
        assert relative_error(third, alone["z"]) < 1e-5


def test_equal_texts_are_one_object_and_encoded_once(encoder, monkeypatch):
    encoded = []
    forward = TextEncoder.forward
    monkeypatch.setattr(TextEncoder, "forward", lambda self, ids, skip: encoded.append(ids) or forward(self, ids, skip))
    conditioning = encode_prompt(encoder, "[a|b|c] AND d AND d:2", 50)
    assert sum(len(ids) for ids in encoded) == 4
    contexts = [conditioning.at(step) for step in range(50)]
    assert len({id(parts[0][1]) for parts in contexts}) == 3
    assert len({id(context) for parts in contexts for _, context in parts[1:]}) == 1


def test_and_is_a_word_of_negative_prompts(encoder):
    [(weight, context)] = encode_prompt(encoder, "a AND b:2", 10, negative=True).at(0)
    assert weight == 1
    assert torch.equal(context, encoder.encode("a and b:2"))


def test_a_second_pass_counts_on(encoder):
    conditioning = encode_prompt(encoder, "[a:b:12]", 10, done=10)
    assert torch.equal(conditioning.at(0)[0][1], conditioning.at(2)[0][1])
    assert not torch.equal(conditioning.at(2)[0][1], conditioning.at(3)[0][1])


def test_half_precision_is_weighted_in_float32(encoder):
    try:
        context = encode_prompt(encoder.bfloat16(), "a (red:1.3) cat", 10).at(0)[0][1]
        states = encoder.encode("a red cat").float()
        weights = torch.ones(77)
        weights[2] = 1.3
        weighted = states * weights[None, :, None]
        assert torch.equal(context, (weighted * (states.mean() / weighted.mean())).bfloat16())
    finally:
        encoder.float()


@pytest.mark.parametrize("prompt", ["(a:" + "9" * 400 + ")", "(" * 10_000 + "a", "(a:1e5)" + "(b:" + "9" * 39 + ")"])
def test_weights_that_overflow_are_told(encoder, prompt):
    with pytest.raises(RequestError, match="use smaller ones"):
        encode_prompt(encoder, prompt, 10)


def test_break_within_brackets_is_told(encoder, caplog):
    encode_prompt(encoder, "[x|y] (a BREAK b)", 10)
    assert caplog.text.count("BREAK within brackets is a word") == 1


def test_tokenize_tells_what_a_prompt_is(capsys):
    prompt = "<lora:ink:0.5> a (red:1.3) astro-nautxyz [cat:dog:0.5] BREAK 😀 AND sky:1.2"
    assert main(["tokenize", prompt, "--steps", "6"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "LoRA ink: 0.5 in the U-Net, 0.5 in the text encoder",
        "part 1 of 2, weight 1",
        "steps 1 to 4: a (red:1.3) astro-nautxyz cat BREAK 😀",
        "  chunk 1 of 2, 8 of 75 tokens",
        "    a red×1.3 astro - nau· tx· yz cat",
        "  chunk 2 of 2, 1 of 75 tokens",
        "    😀",
        "steps 5 to 6: a (red:1.3) astro-nautxyz dog BREAK 😀",
        "  chunk 1 of 2, 8 of 75 tokens",
        "    a red×1.3 astro - nau· tx· yz dog",
        "  chunk 2 of 2, 1 of 75 tokens",
        "    😀",
        "part 2 of 2, weight 1.2",
        "steps 1 to 6: sky",
        "  chunk 1 of 1, 1 of 75 tokens",
        "    sky",
    ]


def test_tokenize_takes_the_tokenizer_of_a_model(capsys):
    assert main(["tokenize", "zebra", "--model", str(SHIPPED)]) == 0
    own = capsys.readouterr().out
    assert main(["tokenize", "zebra"]) == 0
    clips = capsys.readouterr().out
    assert own.startswith("steps 1 to 25: zebra\n  chunk 1 of 1, ")
    assert own != clips == "steps 1 to 25: zebra\n  chunk 1 of 1, 1 of 75 tokens\n    zebra\n"


@pytest.mark.parametrize("arguments", [["x", "--steps", "0"], ["\ud800"], ["<lora:a:x>"]])
def test_tokenize_tells_faults_in_a_line(arguments, capsys):
    assert main(["tokenize", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_tokenize_loads_no_network():
    code = "from ldm.cli import main; main(['tokenize', 'a cat']); import sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"ldm.models.text", "ldm.checkpoint", "ldm.conditioning"} & set(modules)
