"""Words with embeddings of their own: files in every layout, where a prompt has them, and their removal."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from conftest import SHIPPED, SHIPPED_TEXT, SMALL, assert_parity, load_small
from lora_files import assert_restored, rand, saved, snapshot
from PIL import Image
from test_pipeline import PROMPT
from torch import Tensor, nn

from ldm.cli import main
from ldm.errors import CheckpointError, RequestError

WIDTH, VOCABULARY, ROOM = SHIPPED_TEXT.width, SHIPPED_TEXT.vocab_size, SHIPPED_TEXT.max_length - 2
START, END = VOCABULARY - 2, VOCABULARY - 1
A = 320  # the token of that word


pytestmark = pytest.mark.usefixtures("nothing_is_left")


def pickled(folder, content, name: str):
    torch.save(content, folder / name)
    return folder / name


LAYOUTS = {  # what a tool writes, the words that stand for it
    "emb_params": (lambda f, v: saved(f, {"emb_params": v}, "my-cat.safetensors"), ["my-cat"]),
    "emb_params, pickled": (lambda f, v: pickled(f, {"emb_params": v}, "my-cat.pt"), ["my-cat"]),
    "AUTOMATIC1111": (
        lambda f, v: pickled(
            f, {"string_to_token": {"*": 265}, "string_to_param": {"*": v}, "name": "x", "step": 9}, "my-cat.pt"
        ),
        ["my-cat"],
    ),
    "AUTOMATIC1111, a parameter": (
        lambda f, v: pickled(f, {"string_to_param": {"*": nn.Parameter(v)}}, "my-cat.pt"),
        ["my-cat"],
    ),
    "the first repository": (
        lambda f, v: pickled(
            f, {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": v})}, "my-cat.pt"
        ),
        ["my-cat"],
    ),
    "diffusers": (lambda f, v: pickled(f, {"<cat-toy>": v}, "learned_embeds.bin"), ["<cat-toy>"]),
    "diffusers, safetensors": (lambda f, v: saved(f, {"<cat-toy>": v}, "e.safetensors"), ["e", "<cat-toy>"]),
    "SDXL": (
        lambda f, v: saved(f, {"clip_g": rand(2, 1280), "clip_l": v}, "my-cat.safetensors"),
        ["my-cat"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(sd, tmp_path, layout, caplog):
    save, triggers = LAYOUTS[layout]
    vectors = rand(2, WIDTH)
    with sd.load_embedding(save(tmp_path, vectors)) as handle:
        assert handle.name == triggers[0]
        assert list(sd.text.triggers) == triggers
        for trigger in triggers:
            assert sd.text.tokenize(f"a {trigger}")[0, :6].tolist() == [START, A, VOCABULARY, VOCABULARY + 1, END, END]
        assert torch.equal(table(sd)[VOCABULARY:], vectors)
    assert ("clip_g" in caplog.text) == (layout == "SDXL")


def table(sd) -> Tensor:
    return sd.text.transformer.embeddings.token_embedding.weight


def test_a_single_vector_may_have_one_axis(sd, tmp_path):
    with sd.load_embedding(pickled(tmp_path, {"<a>": rand(WIDTH).half()}, "x.bin")):
        assert table(sd).shape == (VOCABULARY + 1, WIDTH)


def test_two_of_diffusers_own_name(sd, tmp_path):
    """Each of them is called learned_embeds.bin, so that only their tokens tell them apart."""
    for name in "ab":
        (tmp_path / name).mkdir()
        pickled(tmp_path / name, {f"<{name}>": rand(WIDTH)}, "learned_embeds.bin")
    with (
        sd.load_embedding(tmp_path / "a" / "learned_embeds.bin"),
        sd.load_embedding(tmp_path / "b" / "learned_embeds.bin"),
    ):
        assert list(sd.text.triggers) == ["<a>", "<b>"]


def test_a_token_of_ones_own(sd, tmp_path):
    path = pickled(tmp_path, {"<a>": rand(WIDTH)}, "x.bin")
    with sd.load_embedding(path, "Quux"):
        assert list(sd.text.triggers) == ["quux"]
        with pytest.raises(RequestError, match="there is an embedding called 'quux' already"):
            sd.load_embedding(path, "QUUX")
    with pytest.raises(RequestError, match="not empty"):
        sd.load_embedding(path, "")


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("bad-hands", 1),
        ("Bad-Hands, BAD-HANDS", 2),
        ("(bad-hands)", 1),
        ("bad-handsome", 0),
        ("abad-hands", 0),
        ("bad hands", 0),
        ("a<toy>b", 1),
        ("<toy><toy>", 2),
        ("bad-hands-5", 5),  # the longest, not the other and "-5"
    ],
)
def test_where_triggers_are(sd, tmp_path, prompt, count):
    one, five = ({"emb_params": rand(n, WIDTH)} for n in (1, 5))
    with (
        sd.load_embedding(saved(tmp_path, one, "bad-hands.safetensors")),
        sd.load_embedding(saved(tmp_path, five, "Bad-Hands-5.safetensors")),
        sd.load_embedding(saved(tmp_path, one, "t.safetensors"), "<toy>"),
    ):
        ids = sd.text.tokenize(prompt)
        assert int((ids >= VOCABULARY).sum()) == count


def test_letters_that_equal_others_in_some_case(sd, tmp_path):
    path = saved(tmp_path, {"emb_params": rand(1, WIDTH)}, "sky.safetensors")
    with sd.load_embedding(path):
        assert sd.text.tokenize("\N{LATIN SMALL LETTER LONG S}\N{KELVIN SIGN}y")[0, 1] == VOCABULARY


def test_other_prompts_stay_as_they_were(sd, tmp_path):
    prompts = [PROMPT, "", "it's 2024!  A\tlarge\nSTAR, (((x)))", "a " * 100]
    before = sd.text.tokenize(prompts)
    with sd.load_embedding(saved(tmp_path, {"emb_params": rand(3, WIDTH)}, "x-y.safetensors")):
        assert torch.equal(sd.text.tokenize(prompts), before)
        assert torch.equal(sd.text.tokenize("a x-y large")[:, [0, 1, 5]], sd.text.tokenize("a large")[:, [0, 1, 2]])


def test_a_cut_prompt_names_the_words_it_lost(sd, tmp_path, caplog):
    with sd.load_embedding(saved(tmp_path, {"emb_params": rand(3, WIDTH)}, "x-y.safetensors")):
        ids = sd.text.tokenize("a " * (ROOM - 1) + "x-y star")
        assert ids[0, ROOM - 1 :].tolist() == [A, VOCABULARY, END]
        assert "'star'" in caplog.text


def test_several_come_and_go_in_any_order(sd, tmp_path):
    vectors = {name: rand(n, WIDTH) for n, name in enumerate("abc", 1)}
    handles = {
        name: sd.load_embedding(saved(tmp_path, {"emb_params": v}, f"{name}-x.safetensors"))
        for name, v in vectors.items()
    }
    expected = sd.text.encode("c-x a-x")
    handles["b"].remove()
    handles["b"].remove()
    assert torch.equal(sd.text.encode("c-x a-x"), expected)
    assert torch.equal(table(sd)[VOCABULARY:], torch.cat([vectors["a"], vectors["c"]]))
    handles["a"].remove()
    handles["c"].remove()


def test_states_equal_diffusers(sd, tmp_path):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        SHIPPED, torch_dtype=torch.float32, local_files_only=True
    )
    # transformers before 5.6 does not find the text encoder's weights under the names that later ones gave them.
    theirs = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    theirs.load_state_dict(sd.text.transformer.state_dict())
    path = saved(tmp_path, {"<blob>": rand(3, WIDTH)}, "x.safetensors")
    pipeline.load_textual_inversion(path)
    prompt = "a large <blob> on a blue background"
    prompts = pipeline.maybe_convert_prompt([prompt], pipeline.tokenizer)
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=ROOM + 2, return_tensors="pt").input_ids
    with sd.load_embedding(path):
        assert torch.equal(sd.text.tokenize(prompt), ids)
        states = pipeline.text_encoder(ids).last_hidden_state
        assert_parity("text states with an embedding, diffusers", sd.text.encode(prompt), states, 1e-6)


def test_with_a_bfloat16_model(tmp_path):
    sd = load_small("bfloat16")
    before = snapshot(sd)
    with sd.load_embedding(saved(tmp_path, {"emb_params": rand(2, WIDTH)}, "x-y.safetensors")):
        assert table(sd).dtype == torch.bfloat16
        sd.txt2img(f"{PROMPT} x-y", seed=1, steps=1)
    assert_restored(sd, before)


def touched(path):
    path.touch()
    return path


FAULTY = {
    "width": (lambda f: saved(f, {"emb_params": rand(2, 768)}), f"its vectors have 768 numbers, this model's {WIDTH}"),
    "many": (
        lambda f: saved(f, {"emb_params": rand(ROOM + 1, WIDTH)}),
        f"{ROOM + 1} vectors; a prompt has room for {ROOM}",
    ),
    "LoRA": (lambda f: saved(f, {"lora_unet_x.lora_up.weight": rand(2, WIDTH), "b": rand(1)}), "this is a LoRA"),
    "NaN": (lambda f: saved(f, {"emb_params": rand(2, WIDTH) * math.nan}), "emb_params holds NaN"),
    "none": (lambda f: saved(f, {"emb_params": rand(0, WIDTH)}), rf"F32\[0, {WIDTH}\]"),
    "integers": (lambda f: saved(f, {"emb_params": rand(2, WIDTH).long()}), rf"I64\[2, {WIDTH}\]"),
    "axes": (lambda f: saved(f, {"emb_params": rand(1, 2, WIDTH)}), rf"F32\[1, 2, {WIDTH}\]"),
    "a model": (lambda f: saved(f, {"a": rand(WIDTH), "b": rand(WIDTH)}), r"holds 2 tensors \(a, b\)"),
    "no dictionary": (lambda f: pickled(f, [rand(WIDTH)], "x.pt"), "holds no embedding"),
    "no tensors": (lambda f: pickled(f, {"a": 1}, "x.pt"), r"holds none; an embedding has one"),
    "two": (lambda f: pickled(f, {"string_to_param": {"a": rand(1), "b": rand(1)}}, "x.pt"), "no single embedding"),
    "odd": (lambda f: pickled(f, {"string_to_param": 1}, "x.pt"), "no single embedding"),
    "code": (lambda f: pickled(f, {"string_to_param": {"*": print}}, "x.pt"), "damaged or holds more than tensors"),
    "absent": (lambda f: f / "x.pt", "no such file"),
    "empty": (lambda f: touched(f / "x.pt"), "not a readable"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_faulty_files(sd, tmp_path, fault):
    save, message = FAULTY[fault]
    with pytest.raises(CheckpointError, match=message) as caught:
        sd.load_embedding(save(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_nan_on_request(sd, tmp_path):
    with sd.load_embedding(saved(tmp_path, {"emb_params": rand(1, WIDTH) * math.nan}, "e"), allow_nonfinite=True):
        assert table(sd)[-1].isnan().all()


def test_command_line(sd, tmp_path, capsys):
    path = saved(tmp_path, {"emb_params": rand(2, WIDTH)}, "my-style.safetensors")
    flags = ["-s", "3", "--seed", "1", "--dtype", "float32", "--device", "cpu", *SMALL, "--outdir", str(tmp_path / "o")]
    assert main(["txt2img", "-p", f"{PROMPT}, my-style", "--embedding", str(path), *flags]) == 0
    assert main(["txt2img", "-p", f"{PROMPT}, my-style", *flags]) == 0
    drawn, plain = (Image.open(file).tobytes() for file in capsys.readouterr().out.splitlines())
    assert drawn != plain
    with sd.load_embedding(path):
        assert sd.txt2img(f"{PROMPT}, my-style", seed=1, steps=3)[0].tobytes() == drawn
    assert sd.txt2img(f"{PROMPT}, my-style", seed=1, steps=3)[0].tobytes() == plain


def test_a_header_whose_length_begins_like_a_pickle(sd, tmp_path):
    for padding in range(0, 400, 8):
        path = saved(tmp_path, {"emb_params": torch.ones(1, WIDTH)}, "cat.safetensors", x="x" * padding)
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    with sd.load_embedding(path):
        assert VOCABULARY in sd.text.tokenize("cat")
