"""A small CLIP-format vocabulary for captions of few words: byte-pair encoding (arXiv:1508.07909) learned from them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from ldm.errors import RequestError
from ldm.models.tokenizer import END_OF_WORD, SPECIAL_TOKENS, Merge, byte_characters


def learn_vocabulary(captions: Iterable[str], size: int) -> tuple[dict[str, int], list[Merge]]:
    """Tokens with their numbers, and the merges that make them, in CLIP's order: 512 bytes, merges, start and end.

    Whatever is not in the captions is still spelled in bytes. Raises RequestError where the captions do not have
    enough different words for `size` tokens.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    characters = byte_characters()
    fixed = 2 * len(characters) + len(SPECIAL_TOKENS)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[], initial_alphabet=characters, end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(captions, trainer)
    pairs = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    merges: list[Merge] = [(first, second) for first, second in pairs][: size - fixed]
    if fixed + len(merges) != size:
        raise RequestError(
            f"networks.text.vocab_size is {size}: these captions have words for {fixed + len(merges)} tokens; use that"
        )
    tokens = [
        *characters,
        *(character + END_OF_WORD for character in characters),
        *(first + second for first, second in merges),
        *SPECIAL_TOKENS,
    ]
    return {token: number for number, token in enumerate(tokens)}, merges


PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # that CLIP cuts a text into
