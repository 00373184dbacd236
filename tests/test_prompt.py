"""Prompts, as AUTOMATIC1111's documentation and the doctests of its modules/prompt_parser.py tell them."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.errors import RequestError
from ldm.prompt import LoraTag, clean, parse_attention, read_prompt, schedule, split_and, split_chunks, split_loras
from ldm.prompt.schedule import index_at


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:a>", LoraTag("a", 1, 1)),
        ("<lora:a:0.8>", LoraTag("a", 0.8, 0.8)),
        ("<lyco:a:0.8>", LoraTag("a", 0.8, 0.8)),
        ("<lora:a:0.8:0.5>", LoraTag("a", 0.8, 0.5)),
        ("<lora:a:te=0.5>", LoraTag("a", 0.5, 0.5)),
        ("<lora:a:unet=0.5>", LoraTag("a", 1, 0.5)),
        ("<lora:a:unet=0.5:te=0>", LoraTag("a", 0, 0.5)),
        ("<lora:a:0.2:unet=0.5>", LoraTag("a", 0.2, 0.5)),
        ("<lora:a b.c-d_1:-1>", LoraTag("a b.c-d_1", -1, -1)),
    ],
)
def test_tags_read_as_automatic1111_reads_them(tag, expected):
    assert split_loras(f"a cat, {tag} on a mat") == ("a cat,  on a mat", [expected])


@pytest.mark.parametrize(
    "prompt", ["", "a < b > c", "<lora>", "<lora:", "<lora:>", "<hypernet:a:1>", "<cat-toy>", "lora:a"]
)
def test_other_text_stays(prompt):
    assert split_loras(prompt) == (prompt, [])


def test_several_tags():
    text, tags = split_loras("<lora:a:1>x<lora:b><lora:a:2>y")
    assert text == "xy"
    assert [(tag.name, tag.unet) for tag in tags] == [("a", 1), ("b", 1), ("a", 2)]


@pytest.mark.parametrize(
    "tag", ["<lora:a:x>", "<lora:a:nan>", "<lora:a:1:2:3>", "<lora:a:dyn=4>", "<lora: :1>", "<lora:a:>", "<lora:a:te=>"]
)
def test_faulty_tags(tag):
    with pytest.raises(RequestError) as caught:
        split_loras(tag)
    assert tag in str(caught.value)


@pytest.mark.parametrize("text", ["<lora:", "<lora:a", "<lora:a:1", "<" * 6 + ":", "<lora:a:1>"])
def test_reading_takes_linear_time(text):
    start = time.perf_counter()
    split_loras(text * 20_000)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("normal text", [("normal text", 1)]),
        ("", [("", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("a [small] word", [("a ", 1), ("small", 1 / 1.1), (" word", 1)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:2.)", [("a", 2)]),
        ("(a:+2)", [("a", 2)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:0)b", [("a", 0), ("b", 1)]),
        ("(a:1.0)b", [("ab", 1)]),
        ("((a))", [("a", 1.21)]),
        ("[[a]]", [("a", 0.826446281)]),
        ("((a:1.5) b)", [("a", 1.65), (" b", 1.1)]),
        ("([a])", [("a", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [b", [("a ", 1), ("b", 1 / 1.1)]),
        ("((a) b", [("a", 1.21), (" b", 1.1)]),
        ("a) b", [("a) b", 1)]),
        ("a] (b", [("a] ", 1), ("b", 1.1)]),
        ("a:1.3)", [("a:1.3)", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        ("[a:1.5]", [("a:1.5", 1 / 1.1)]),
        ("()", [("", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"(\(a\):1.5)", [("(a)", 1.5)]),
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
        (r"a\b", [("ab", 1)]),
        ("a\\", [("a", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a BREAK b", [("a", 1), ("BREAK", -1), ("b", 1)]),
        ("BREAK", [("", 1), ("BREAK", -1), ("", 1)]),
        ("a BREAK BREAK b", [("a", 1), ("BREAK", -1), ("", 1), ("BREAK", -1), ("b", 1)]),
        ("(a) BREAK [b]", [("a", 1.1), ("", 1), ("BREAK", -1), ("", 1), ("b", 1 / 1.1)]),
        ("break BREAKS abBREAK", [("break BREAKS abBREAK", 1)]),
        ("(a BREAK b:2)", [("a", 2), ("BREAK", -2), ("b", 2)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
                ("sky", 1.4641), (".", 1.1),
            ],
        ),
    ],
)  # fmt: skip
def test_words_have_the_weights_that_automatic1111_gives_them(text, pieces):
    parsed = parse_attention(text)
    assert [piece for piece, _ in parsed] == [piece for piece, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces], rel=1e-9)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("test", [(10, "test")]),
        ("", [(10, "")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [b:3 ]", [(3, "a "), (10, "a b")]),
        ("a [b::3]", [(3, "a b"), (10, "a ")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("[a:b:0.25]", [(2, "a"), (10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:1]", [(1, "a"), (10, "b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:0.05]", [(10, "b")]),
        ("[a:b:-2]", [(10, "b")]),
        ("[a:b:+4]", [(4, "a"), (10, "b")]),
        ("[a:b:99]", [(10, "a")]),
        ("[a:b:2.5]", [(10, "a")]),
        ("[a:b:5e0]", [(5, "a"), (10, "b")]),
        ("[a:b:1e999]", [(10, "a")]),
        ("[a:b:]", [(10, "[a:b:]")]),
        ("[a:b]", [(10, "[a:b]")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("(a:b:3)", [(10, "(a:b:3)")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a:(b:1.2):3] [c]", [(3, "a [c]"), (10, "(b:1.2) [c]")]),
        (r"[a\:b:c:3]", [(3, r"a\:b"), (10, "c")]),
        (r"\[a:b:3]", [(10, r"\[a:b:3]")]),
        ("[a|b] c", [(i, f"{'ba'[i % 2]} c") for i in range(1, 11)]),
        ("[a|b|c]", [(i, "cab"[i % 3]) for i in range(1, 11)]),
        ("[fe|]male", [(i, ("male", "female")[i % 2]) for i in range(1, 11)]),
        ("[fe|||]male", [(i, "female" if i % 4 == 1 else "male") for i in range(1, 11)]),
        ("[a|(b:1.1)]", [(i, ("(b:1.1)", "a")[i % 2]) for i in range(1, 11)]),
        ("[[a:x:4]|b]", [(i, "b" if i % 2 == 0 else "a" if i <= 4 else "x") for i in range(1, 11)]),
        ("[[a|b]:c:2]", [(1, "a"), (2, "b"), *((i, "c") for i in range(3, 11))]),
        ("a|b", [(10, "a|b")]),
        ("a|b [c:3]", [(10, "a|b [c:3]")]),
        ("(a|b) [c:3]", [(10, "(a|b) [c:3]")]),
        ("[c:3] \\", [(10, "[c:3] \\")]),
        (
            "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
            "[ in foreground::0.6][ in background:0.25] [shoddy:masterful:0.5]",
            [
                (2, "fantasy landscape with a mountain and an oak in foreground shoddy"),
                (5, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
                (6, "fantasy landscape with a lake and an oak in foreground in background masterful"),
                (7, "fantasy landscape with a lake and an oak in background masterful"),
                (10, "fantasy landscape with a lake and a christmas tree in background masterful"),
            ],
        ),
    ],
)
def test_texts_change_over_ten_steps_as_automatic1111_tells(prompt, texts):
    assert schedule(prompt, 10) == texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a [b:.5] c", [(10, "a b c")]),
        ("a [b:1.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [b:9] c", [(10, "a b c")]),
        ("a [b:12] c", [(2, "a  c"), (10, "a b c")]),
    ],
)
def test_a_second_pass_counts_on(prompt, texts):
    assert schedule(prompt, 10, done=10) == texts


def test_the_first_text_holds_for_a_step_more_as_in_automatic1111():
    assert [index_at([3, 10], step) for step in range(12)] == [0, 0, 0, 0, *[1] * 8]
    assert [index_at([1, 2, 3], step) for step in range(4)] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("a AND b", [("a", 1), (" b", 1)]),
        ("a :1.2 AND b:0.5", [("a", 1.2), (" b", 0.5)]),
        ("a AND b : -1 AND c", [("a", 1), (" b", -1), (" c", 1)]),
        ("a: 2. AND b:.5", [("a", 2), (" b", 0.5)]),
        ("a and b SAND c", [("a and b SAND c", 1)]),
        ("a:b AND c:1.2x", [("a:b", 1), (" c:1.2x", 1)]),
        ("a AND", [("a", 1), ("", 1)]),
        ("AND", [("", 1), ("", 1)]),
        ("a:2", [("a", 2)]),
        ("(a:1.2) AND [b:c:3]", [("(a:1.2)", 1), (" [b:c:3]", 1)]),
        ("a:1:2", [("a:1", 2)]),
        (":2", [("", 2)]),
    ],
)
def test_and_joins_parts_with_weights(prompt, parts):
    assert split_and(prompt) == parts


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("plain, text; ünicode 猫 😀", "plain, text; ünicode 猫 😀"),
        ("a\nb\r\nc\td", "a b  c d"),
        ("a\u200bb\u200d\ufeffc\x00\x1b\u00ad", "abc"),
        ("a\u00a0b\u2028c\u3000d", "a b c d"),
        ("a\ud800b", "ab"),
    ],
)
def test_what_shows_nothing_is_cleaned(prompt, cleaned):
    assert clean(prompt) == cleaned


@pytest.mark.parametrize(
    ("prompt", "named"),
    [("a <hypernet:x:1> b <LORA:ink:1>", "<hypernet:x:1>, <LORA:ink:1>"), ("a <b> c:d", ""), ("<a:b", "")],
)
def test_tags_that_nothing_reads_are_named_once(prompt, named, caplog):
    [part] = read_prompt(prompt, 5)
    assert part.texts == ((5, prompt),)
    assert len(caplog.records) == bool(named)
    assert named in caplog.text


def test_a_negative_prompt_has_no_parts():
    assert read_prompt("a AND b:2", 5, negative=True) == [(1, ((5, "a AND b:2"),))]


def test_a_weight_at_the_end_of_a_lone_prompt_is_told(caplog):
    assert read_prompt("at 12:30", 5) == [(30, ((5, "at 12"),))]
    assert "weight in guidance: 30" in caplog.text


def test_brackets_that_a_bar_disables_are_told(caplog):
    schedule("a|b [c:d:3]", 5)
    assert "none of its brackets change the prompt" in caplog.text


def letters(texts):
    """Each character is a token; what is between braces stays together."""
    return [[[ord(c) for c in part] if i % 2 else [ord(part)] for i, part in split(text)] for text in texts]


def split(text):
    for i, part in enumerate(text.replace("}", "{").split("{")):
        yield from [(i, part)] if i % 2 else [(0, c) for c in part]


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("", [""]),
        ("abc", ["abc"]),
        ("a" * 30, ["a" * 30]),
        ("a" * 31, ["a" * 30, "a"]),
        ("a" * 61, ["a" * 30, "a" * 30, "a"]),
        ("a" * 20 + "," + "b" * 12, ["a" * 20 + ",", "b" * 12]),
        ("a" * 10 + "," + "b" * 25, ["a" * 10 + ",", "b" * 25]),
        ("a" * 9 + "," + "b" * 25, ["a" * 9 + "," + "b" * 20, "b" * 5]),
        ("a" * 30 + ",b", ["a" * 30, ",b"]),
        ("a" * 29 + ",b", ["a" * 29 + ",", "b"]),
        ("a" * 15 + "," + "b" * 15 + "," + "c" * 15, ["a" * 15 + ",", "b" * 15 + ",", "c" * 15]),
        ("a BREAK b", ["a", "b"]),
        ("BREAK b", ["", "b"]),
        ("a BREAK", ["a"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("a" * 29 + "{xyz}", ["a" * 29, "xyz"]),
        ("a" * 27 + "{xyz}", ["a" * 27 + "xyz"]),
        ("a" * 20 + ",{xyz}" + "b" * 12, ["a" * 20 + ",", "xyz" + "b" * 12]),
    ],
)
def test_tokens_go_into_chunks_as_in_automatic1111(text, chunks):
    made = split_chunks(parse_attention(text), letters, 30, ord(","))
    assert ["".join(map(chr, chunk.ids)) for chunk in made] == chunks


def test_weights_go_with_their_tokens():
    [first, second] = split_chunks([("a" * 20, 1), (",", 1), ("b" * 12, 2)], letters, 30, ord(","))
    assert first.weights == [1] * 21
    assert second.weights == [2] * 12


SOUP = st.text(st.sampled_from(list("()[]:|\\ab.5 -\n<>,")), max_size=60) | st.text(max_size=60)


@given(SOUP | st.lists(st.sampled_from(["BREAK", "AND", "[a:b:3]", "[a|b]", "(c:1.2)", ":2]", "["])).map(" ".join))
def test_every_string_is_a_prompt(text):
    for part in read_prompt(text, 7):
        ends = [end for end, _ in part.texts]
        assert ends == sorted(set(ends))
        assert ends[-1] == 7
        for _, words in part.texts:
            assert split_chunks(parse_attention(words), letters_of_any, 30, ord(","))


def letters_of_any(texts):
    return [[[ord(c)] for c in text] for text in texts]


@given(st.text(st.characters(exclude_characters="()[]:|\\"), max_size=40), st.integers(1, 50))
def test_plain_text_is_read_as_it_is(text, steps):
    assert schedule(text, steps) == [(steps, text)]
    if "BREAK" not in text:
        assert parse_attention(text) == [(text, 1)]


@given(st.integers(0, 300), st.integers(0, 300))
def test_nested_brackets_multiply(rounds, squares):
    [(_, weight)] = parse_attention("(" * rounds + "[" * squares + "a" + "]" * squares + ")" * rounds)
    assert math.isclose(weight, 1.1 ** (rounds - squares), rel_tol=1e-9)


@pytest.mark.parametrize(
    "before, repeated, middle, closing",
    [
        ("", "a" * 20, "", ""), ("", "word, ", "", ""), ("", " " * 20, "", ""), ("", "9" * 20, "", ""),
        ("", "a\x00", "", ""), ("", "(", "", ""), ("", "[", "", ""), ("", ")", "", ""), ("", "(", "a", ")"),
        ("", "[a:", "b", ":3]"), ("", "[a|", "b", "]"), ("", "[a|b]", "", ""), ("", "[a:b:3]", "", ""),
        ("", "(a:1.1)", "", ""), ("", "(a", "", ""), ("", "[a:", "", ""), ("", ":", "", ""), ("", "\\", "", ""),
        ("(a:", "9" * 20, "", ""), ("[a:", "9" * 20, "", ""), ("(a:", " " * 20, "", ""), ("", "BREAK ", "", ""),
        ("", " BREAK", "", ""), ("", "a AND ", "", ""), ("", "<a:", "", ""), ("a:", " " * 20, "b", ""),
        ("", "([)]", "", ""),
    ],
)  # fmt: skip
def test_every_part_of_reading_takes_linear_time(before, repeated, middle, closing):
    def seconds(read, times):
        text = before + repeated * times + middle + closing * times
        gc.disable()  # a collection walks all that other tests have imported, however short the text
        start = time.process_time()
        read(text)
        taken = time.process_time() - start
        gc.enable()
        return taken

    for read in (clean, split_and, parse_attention, lambda text: schedule(text, 20)):
        # Against itself, not a clock: what is not linear takes 100 times as long for 10 times the text.
        few = min(seconds(read, 5_000) for _ in range(3))
        assert any(seconds(read, 50_000) < 30 * few + 0.05 for _ in range(3))


def test_prompts_are_read_without_torch():
    code = "import ldm.prompt, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "transformers"} & set(modules)
