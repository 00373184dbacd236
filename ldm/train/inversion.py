"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): a new word learns, and nothing else of the model does.

Before training, after it, and when the text encoder is wanted as it was:

    learned = start_inversion(text, "<toy>", vectors=2, initial="circle", generator=generator)
    save_embedding(path, "<toy>", learned.rows, "diffusers")
    end_inversion(text)
"""

from __future__ import annotations

import re
from itertools import chain, cycle, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import RequestError
from ldm.models.text import TextEncoder
from ldm.train.lora import save_tensors


class TrainableEmbedding(nn.Module):
    """Stands in for a table of tokens (m, width): ids from m on are `rows` (n, width) in float32, which learn.

    The table is looked up on its own, so that there is neither a gradient nor a copy of it.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor):
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(rows.to(table.weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, n) → vectors (b, n, width) in the table's dtype."""
        row = ids - len(self.table.weight)
        known = self.table(ids.masked_fill(row >= 0, 0))
        return torch.where((row >= 0)[..., None], F.embedding(row.clamp_min(0), self.rows).to(known.dtype), known)


def start_inversion(
    text: TextEncoder, token: str, vectors: int, initial: str | None, generator: torch.Generator
) -> TrainableEmbedding:
    """Teach a text encoder a word, `token`, whose `vectors` rows learn; all else of it is frozen.

    initial: the words whose tokens the rows begin as, in turn where there are fewer; None for draws from a normal
    distribution of the table's mean and deviation, by a `generator` of the CPU. Embeddings of files are to be loaded
    before or after the training, not meanwhile. Raises RequestError.
    """
    embeddings = text.transformer.embeddings
    if isinstance(embeddings.token_embedding, TrainableEmbedding):
        raise RequestError("a word of this text encoder is learning already: use end_inversion first")
    if not re.fullmatch(r"\S+", token):
        raise RequestError(f"the word to learn is {token!r:.100}: use one without blanks, such as <toy>")
    if token.lower() in text.triggers or len(list(chain(*text.units([token])[0]))) == 1:
        raise RequestError(f"the word to learn, {token!r:.100}, is known already: use another, such as <{token:.50}>")
    room = text.config.max_length - 2
    if not 1 <= vectors <= room:
        raise RequestError(f"a word of {vectors} vectors: use 1 to {room}, which a prompt has room for")
    table = embeddings.token_embedding
    rows = _normal(table.weight, vectors, generator) if initial is None else _rows_of(text, initial, vectors)
    text.requires_grad_(False)
    embeddings.token_embedding = learned = TrainableEmbedding(table, rows)  # type: ignore[assignment]
    first = len(table.weight)
    text.triggers = text.triggers | {token.lower(): list(range(first, first + vectors))}
    return learned


@torch.no_grad()
def _normal(table: Tensor, vectors: int, generator: torch.Generator) -> Tensor:
    """Rows (vectors, width) in float32 as they might be in the table, each of their numbers on its own."""
    deviation, mean = torch.std_mean(table.float().cpu(), dim=0)
    return mean + deviation * torch.randn(vectors, len(mean), generator=generator)


@torch.no_grad()
def _rows_of(text: TextEncoder, words: str, vectors: int) -> Tensor:
    """The rows (vectors, width) in float32 of the tokens of some words, in turn. Raises RequestError."""
    ids = list(chain(*text.units([words])[0]))
    if not 1 <= len(ids) <= vectors:
        raise RequestError(
            f"the initial words, {words!r:.100}, are {len(ids)} tokens: use 1 to {vectors}, or more vectors"
        )
    return text.transformer.embeddings.token_embedding.weight[list(islice(cycle(ids), vectors))].float()


def end_inversion(text: TextEncoder) -> None:
    """Put the table back that was there before `start_inversion`, the same object, and forget the word."""
    embeddings = text.transformer.embeddings
    if isinstance(embeddings.token_embedding, TrainableEmbedding):
        embeddings.token_embedding = table = embeddings.token_embedding.table
        text.triggers = {word: ids for word, ids in text.triggers.items() if ids[0] < len(table.weight)}


KEYS = {"diffusers": None, "automatic1111": "emb_params"}  # of the one tensor in a file; None is the word itself


def save_embedding(path: Path, token: str, vectors: Tensor, layout: str, *, overwrite: bool = False) -> None:
    """Write vectors (n, width) to a .safetensors file, which appears whole or not at all.

    layout: "diffusers", whose file tells the token; or "automatic1111", where the file's name is the word. Raises
    RequestError, FileExistsError unless `overwrite`, NumericalError for NaN or infinity.
    """
    if layout not in KEYS:
        raise RequestError(f"an embedding's layout is {layout!r:.50}: use one of {', '.join(KEYS)}")
    tensor = vectors.detach().to("cpu", torch.float32).contiguous()
    save_tensors(path, {KEYS[layout] or token: tensor}, {}, overwrite=overwrite)
