"""The text encoder: transformers' CLIP text model (Radford et al. 2021, arXiv:2103.00020) with its tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.config import TextConfig

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger(__name__)


class TextEncoder(nn.Module):
    """Prompts → the hidden states the U-Net attends to, after the final layer norm."""

    def __init__(self, config: TextConfig, tokenizer: CLIPTokenizer):
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        self.config = config
        self.tokenizer = tokenizer
        self.triggers: dict[str, list[int]] = {}  # words with embeddings of their own, and the ids of these
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.max_length,
                hidden_act=config.activation,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        self.transformer = getattr(model, "text_model", model)  # transformers has no text_model level since 5.6

    def tokenize(self, prompts: str | Sequence[str]) -> Tensor:
        """Token ids (b, max_length), padded with the end token; a longer prompt is cut, and a warning says where."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.triggers:
            ids = [self._ids_with_triggers(prompt) for prompt in prompts]
        else:
            ids = self.tokenizer(prompts, padding=False, truncation=False, verbose=False)["input_ids"]
        room = self.config.max_length
        for prompt_ids in ids:
            if len(prompt_ids) > room:
                known = [i for i in prompt_ids[room - 1 : -1][:75] if i < self.config.vocab_size]
                dropped = self.tokenizer.decode(known)
                log.warning(
                    "prompt cut: %d tokens, the limit is %d; dropped: %.300r", len(prompt_ids) - 2, room - 2, dropped
                )
                prompt_ids[room - 1 :] = [self.tokenizer.eos_token_id]
        padded = [prompt_ids + [self.tokenizer.pad_token_id] * (room - len(prompt_ids)) for prompt_ids in ids]
        return torch.tensor(padded, dtype=torch.long)

    def _ids_with_triggers(self, prompt: str) -> list[int]:
        """The ids of a prompt, ends included."""
        return [self.tokenizer.bos_token_id, *chain(*self.units([prompt])[0]), self.tokenizer.eos_token_id]

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
        tokens = iter(self.tokenizer(plain, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
        return [
            [*_alone(next(tokens)), *(unit for name in names for unit in (self.triggers[name], *_alone(next(tokens))))]
            for names in found
        ]

    def forward(self, token_ids: Tensor, clip_skip: int = 1) -> Tensor:
        """Token ids (b, n) → hidden states (b, n, width), normed, of the layer that is `clip_skip`-th from the end."""
        if clip_skip == 1:
            return self.transformer(input_ids=token_ids).last_hidden_state
        states = self.transformer(input_ids=token_ids, output_hidden_states=True).hidden_states
        return self.transformer.final_layer_norm(states[-clip_skip])

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
