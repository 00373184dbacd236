"""The tokenizer of a model: its own files, tables in a single file's metadata, or CLIP's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.checkpoint.detect import Json
from ldm.checkpoint.files import MAX_TEXT_BYTES, first_line, read_json, read_text
from ldm.config import TextConfig
from ldm.errors import CheckpointError
from ldm.models.tokenizer import SPECIAL_TOKENS, Merge, Tokenizer, shipped_vocabulary


def load_tokenizer(source: Path | Json | None, config: TextConfig, where: Path) -> Tokenizer:
    """From a folder, from tables, or CLIP's where a model has neither. Raises CheckpointError."""
    vocabulary, merges = read_vocabulary(source, where)
    if len(vocabulary) != config.vocab_size:
        raise CheckpointError(
            f"{where}: the text encoder knows {config.vocab_size} tokens, the tokenizer {len(vocabulary)}; "
            "give the text_encoder folder that lies beside its tokenizer with --text-encoder"
        )
    try:
        return Tokenizer(vocabulary, merges, config.max_length)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(f"{_name(source, where)}: not a CLIP tokenizer ({first_line(error)})") from error


def read_vocabulary(source: Path | Json | None, where: Path) -> tuple[dict[str, int], list[Merge]]:
    """Tokens with their numbers, and the pairs to merge in order. Raises CheckpointError."""
    if source is None:
        return shipped_vocabulary()
    vocabulary, pairs = _read_files(source) if isinstance(source, Path) else _read_tables(source)
    if not _is_vocabulary(vocabulary) or not isinstance(pairs, list) or not all(map(_is_merge, pairs)):
        raise CheckpointError(
            f"{_name(source, where)}: not a CLIP tokenizer; expected tokens numbered from 0, and pairs to merge"
        )
    return vocabulary, [(first, second) for first, second in pairs]


def _name(source: Path | Json | None, where: Path) -> Path:
    return source if isinstance(source, Path) else where


def _read_files(folder: Path) -> tuple[Any, Any]:
    """Vocabulary and merges from vocab.json and merges.txt, or from tokenizer.json."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = read_text(folder / "merges.txt").split("\n")
        pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
        return read_json(folder / "vocab.json", MAX_TEXT_BYTES), pairs
    return _read_tables(read_json(folder / "tokenizer.json", MAX_TEXT_BYTES))


def _read_tables(json: Json) -> tuple[Any, Any]:
    """From the form of tokenizer.json, whose older files join a pair by a blank."""
    model = json.get("model")
    vocabulary, pairs = (model.get(key) for key in ("vocab", "merges")) if isinstance(model, dict) else (None, None)
    pairs = [pair.split() if isinstance(pair, str) else pair for pair in pairs] if isinstance(pairs, list) else None
    return vocabulary, pairs


def _is_vocabulary(value: Any) -> bool:
    """Tokens, the special ones among them, with the numbers from 0 to one less than there are."""
    return (
        isinstance(value, dict)
        and all(type(number) is int for number in value.values())
        and sorted(value.values()) == list(range(len(value)))
        and value.keys() >= set(SPECIAL_TOKENS)
    )


def _is_merge(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
