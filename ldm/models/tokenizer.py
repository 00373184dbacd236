"""The CLIP tokenizer, built offline: from the table shipped in this package, or from a model folder's own files."""

from __future__ import annotations

import gzip
import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Merge = tuple[str, str]

END_OF_WORD = "</w>"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
SHIPPED_MERGES = 49_152 - 256 - 2  # the file holds more; CLIP was trained with a vocabulary of 49,152 + 256


def byte_characters() -> list[str]:
    """A printable character for each of the 256 bytes, in vocabulary order: Latin-1's own, then those from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def shipped_vocabulary() -> tuple[dict[str, int], list[Merge]]:
    """OpenAI CLIP's 49,408 tokens and 48,894 merges, from the table in package data."""
    table = resources.files("ldm.models").joinpath("clip_bpe/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(table).decode("utf-8").split("\n")[1 : 1 + SHIPPED_MERGES]
    merges = [(first, second) for first, second in map(str.split, lines)]
    characters = byte_characters()
    tokens = [
        *characters,
        *(character + END_OF_WORD for character in characters),
        *(first + second for first, second in merges),
        *SPECIAL_TOKENS,
    ]
    return {token: i for i, token in enumerate(tokens)}, merges


def build_tokenizer(vocabulary: dict[str, int], merges: list[Merge], max_length: int) -> CLIPTokenizer:
    """transformers' CLIP tokenizer over the given tables; `max_length` counts the two special tokens."""
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:  # transformers 4 takes the tables as files only
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        fast = transformers.CLIPTokenizerFast  # type: ignore[attr-defined]
        return fast(str(vocab_file), str(merges_file), model_max_length=max_length)
