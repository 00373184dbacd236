"""The text encoder: CLIP's text transformer (Radford et al. 2021, arXiv:2103.00020, section 2.4) with its tokenizer.

Its own and not transformers', whose import alone takes 4 to 5 s; modules have the same names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import TextConfig
from ldm.models.layers import attention, split_heads
from ldm.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    """Token ids (b, n) → what they and their places mean (b, n, width)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.token_embedding(token_ids) + self.position_embedding.weight[: token_ids.shape[1]]


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, causal=True))


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.activation = FUNCTIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = CausalSelfAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, skipped: int) -> Tensor:
        for layer in islice(self.layers, len(self.layers) - skipped):
            x = layer(x)
        return x


class CLIPText(nn.Module):
    """Token ids (b, n) → hidden states (b, n, width), normed: those after all layers but the last `skipped`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)
        self._start(config)

    def forward(self, token_ids: Tensor, skipped: int = 0) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(token_ids), skipped))

    def _start(self, config: TextConfig) -> None:
        """Deviations to begin a training with, as in OpenAI's clip/model.py."""
        residual = config.width**-0.5 * (2 * config.layers) ** -0.5
        deviations = {
            "token_embedding": 0.02, "position_embedding": 0.02,
            "q_proj": residual, "k_proj": residual, "v_proj": residual, "fc2": residual,
            "out_proj": config.width**-0.5, "fc1": (2 * config.width) ** -0.5,
        }  # fmt: skip
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviations[name.rpartition(".")[2]])
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


class TextEncoder(nn.Module):
    """Prompts → the hidden states the U-Net attends to, after the final layer norm."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.triggers: dict[str, list[int]] = {}  # words with embeddings of their own, and the ids of these
        self.transformer = CLIPText(config)

    def tokenize(self, prompts: str | Sequence[str]) -> Tensor:
        """Token ids (b, max_length), padded with the end token; a longer prompt is cut, and a warning says where."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [[self.tokenizer.start, *chain(*units), self.tokenizer.end] for units in self.units(prompts)]
        room = self.config.max_length
        for prompt_ids in ids:
            if len(prompt_ids) > room:
                known = [i for i in prompt_ids[room - 1 : -1][:75] if i < self.config.vocab_size]
                dropped = self.tokenizer.decode(known)
                log.warning(
                    "prompt cut: %d tokens, the limit is %d; dropped: %.300r", len(prompt_ids) - 2, room - 2, dropped
                )
                prompt_ids[room - 1 :] = [self.tokenizer.end]
        padded = [prompt_ids + [self.tokenizer.end] * (room - len(prompt_ids)) for prompt_ids in ids]
        return torch.tensor(padded, dtype=torch.long)

    def units(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """The ids of each text, without ends, in units: those of a trigger stay together, others are alone.

        Triggers count in any case, as whole words, the longest first.
        """
        triggers = sorted(self.triggers, key=len, reverse=True)
        pattern = re.compile("|".join(f"({_whole(trigger)})" for trigger in triggers) or r"(?!)", re.IGNORECASE)
        plain: list[str] = []  # what is between triggers, all texts', so that the tokenizer is called once
        found: list[list[str]] = []
        for text in texts:
            matches = list(pattern.finditer(text))
            starts, ends = [0, *(match.end() for match in matches)], [*(match.start() for match in matches), len(text)]
            plain += [text[start:end] for start, end in zip(starts, ends, strict=True)]
            found.append([triggers[(match.lastindex or 1) - 1] for match in matches])
        tokens = iter(self.tokenizer.encode(plain))
        return [
            [*_alone(next(tokens)), *(unit for name in names for unit in (self.triggers[name], *_alone(next(tokens))))]
            for names in found
        ]

    def forward(self, token_ids: Tensor, clip_skip: int = 1) -> Tensor:
        """Token ids (b, n) → hidden states (b, n, width), normed, of the layer that is `clip_skip`-th from the end."""
        return self.transformer(token_ids, skipped=clip_skip - 1)

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts → hidden states (b, max_length, width). An empty prompt is the unconditional one."""
        return self(self.tokenize(prompts).to(next(self.parameters()).device))


def _alone(ids: list[int]) -> list[list[int]]:
    return [[i] for i in ids]


def _whole(word: str) -> str:
    """A pattern of a word that is no part of a longer one; at an end that is a sign, anything may follow."""
    before, after = (r"(?<!\w)" if re.match(r"\w", word) else ""), (r"(?!\w)" if re.match(r"\w", word[-1]) else "")
    return before + re.escape(word) + after
