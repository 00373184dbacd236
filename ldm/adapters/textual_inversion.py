"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): words whose embeddings come from small files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.handle import Handle
from ldm.checkpoint import detect
from ldm.checkpoint.files import StoredTensor, is_pickle, open_tensors, read_pickle, store
from ldm.checkpoint.header import FLOATS
from ldm.checkpoint.layouts import describe
from ldm.errors import CheckpointError, RequestError, printable
from ldm.models.text import TextEncoder

log = logging.getLogger(__name__)


UNTOLD = ("learned_embeds",)  # names that tools give to every file, which are no word for what it shows


@dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors (n, width) in float32, and the words of a prompt that stand for all of them."""

    triggers: tuple[str, ...]
    vectors: Tensor


def read_embedding(
    path: str | Path, text: TextEncoder, token: str | None = None, *, allow_nonfinite: bool = False
) -> Embedding:
    """An embedding for this text encoder; `token` is its trigger, else the file's stem and the token it is saved under.

    Raises CheckpointError for a file of none, of several, of another width, or, unless `allow_nonfinite`, of NaN.
    """
    path = Path(path)
    key, stored = _find(path)
    width, room = text.config.width, text.config.max_length - 2
    if stored.dtype not in FLOATS or len(stored.shape) not in (1, 2) or stored.numel == 0:
        raise CheckpointError(f"{path}: its embedding is {stored.dtype}{list(stored.shape)}, not vectors of floats")
    if stored.shape[-1] != width:
        raise CheckpointError(
            f"{path}: its vectors have {stored.shape[-1]} numbers, this model's {width}: it is for another model"
        )
    if stored.numel > room * width:
        raise CheckpointError(f"{path}: it has {stored.numel // width} vectors; a prompt has room for {room}")
    vectors = stored.load().float().reshape(-1, width).clone()
    dtype = text.transformer.embeddings.token_embedding.weight.dtype
    if not allow_nonfinite and not vectors.to(dtype).isfinite().all():
        raise CheckpointError(f"{path}: {printable(stored.name)} holds NaN or infinity in {str(dtype)[6:]}")
    of_file = [] if key and path.stem in UNTOLD else [path.stem]
    triggers = [token] if token is not None else [*of_file, key]
    return Embedding(tuple(dict.fromkeys(trigger.lower() for trigger in triggers if trigger)), vectors)


def _find(path: Path) -> tuple[str, StoredTensor]:
    """The vectors in a file of any layout, and the token that is their key in diffusers'."""
    tensors = _read(path)
    for key in ("emb_params", "clip_l"):
        if key in tensors:
            if others := [name for name in tensors if name != key]:
                log.warning("%s: left out, because this model has one text encoder: %s", path, describe(others))
            return "", tensors[key]
    if len(tensors) != 1:
        kind = detect.not_an_addition(tensors, "a textual inversion embedding")
        found = f"this is {kind}" if kind else f"holds {describe(list(tensors))}" if tensors else "holds none"
        raise CheckpointError(f"{path}: {found}; an embedding has one tensor")
    [(key, stored)] = tensors.items()
    return "" if key == "*" else key, stored


def _read(path: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a file; of AUTOMATIC1111's and the first ones, those in `string_to_param`, whose key is `*`."""
    if not is_pickle(path):
        return open_tensors(path).tensors
    content = read_pickle(path)
    if isinstance(content, dict) and "string_to_param" in content:
        content = content["string_to_param"]
        state: Any = getattr(content, "state", None)  # of a torch.nn.ParameterDict
        content = state.get("_parameters") if isinstance(state, dict) else content
        if not isinstance(content, dict) or len(content) != 1:
            raise CheckpointError(f"{path}: its string_to_param holds no single embedding")
        content = {"*": next(iter(content.values()))}
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no embedding; expected a token mapped to vectors")
    return {
        key: store(path, key, value.detach())
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


class Embeddings:
    """The embeddings a text encoder knows: rows below its own table of vectors, which is put back when all are gone."""

    def __init__(self, text: TextEncoder):
        self._text = text
        self._original: nn.Parameter | None = None
        self._loaded: list[Embedding] = []

    def add(self, embedding: Embedding) -> Handle:
        """Know an embedding until the handle removes it. Raises RequestError where another has its trigger."""
        if taken := [trigger for trigger in embedding.triggers if trigger in self._text.triggers]:
            raise RequestError(f"there is an embedding called {taken[0]!r:.100} already: give this one another token")
        if not embedding.triggers:
            raise RequestError("an embedding needs a token that is not empty")
        self._set([*self._loaded, embedding])
        return Handle(embedding.triggers[0], lambda: self._set([e for e in self._loaded if e is not embedding]))

    @torch.no_grad()
    def _set(self, loaded: list[Embedding]) -> None:
        table = self._text.transformer.embeddings.token_embedding
        now: nn.Parameter = table.get_parameter("weight")
        original = self._original if self._original is not None else now
        if (original.device, original.dtype) != (now.device, now.dtype):  # the model has moved since
            original = nn.Parameter(original.to(now.device, now.dtype), now.requires_grad)
        first = original.shape[0]
        triggers: dict[str, list[int]] = {}
        for embedding in loaded:
            ids = list(range(first, first + len(embedding.vectors)))
            triggers |= dict.fromkeys(embedding.triggers, ids)
            first += len(ids)
        rows = [original, *(embedding.vectors.to(original) for embedding in loaded)]
        table.weight = nn.Parameter(torch.cat(rows), now.requires_grad) if loaded else original
        self._original = original if loaded else None
        self._text.triggers, self._loaded = triggers, loaded
