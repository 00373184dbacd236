"""CLIP's tokenizer, built offline: from the table shipped in this package, or from a model folder's own files."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import cached_property
from importlib import resources

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


class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) of lower-cased text, as CLIP has it.

    The tokenizers library does it, set up as transformers' CLIPTokenizer, whose import takes a hundred times longer.
    """

    # Words, contractions' ends, single digits and runs of signs: of OpenAI's clip/simple_tokenizer.py.
    PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

    def __init__(self, vocabulary: dict[str, int], merges: list[Merge], max_length: int):
        """max_length: of a prompt, with the two special tokens. Raises Exception for tables that do not fit."""
        from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        start, end = SPECIAL_TOKENS
        self.max_length = max_length
        self.start, self.end = vocabulary[start], vocabulary[end]  # the end pads, too
        self.backend = Backend(models.BPE(vocabulary, merges, end_of_word_suffix=END_OF_WORD, unk_token=end))
        self.backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self.backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.PATTERN), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self.backend.decoder = decoders.ByteLevel()
        self.backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return self.backend.get_vocab()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without start and end."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The words of ids, special tokens among them."""
        return self.backend.decode(list(ids), skip_special_tokens=False).replace(END_OF_WORD, " ").strip()

    def ends_word(self, token: int) -> bool:
        """Whether nothing of the same word can follow a token."""
        return str(self.backend.id_to_token(token)).endswith(END_OF_WORD)
