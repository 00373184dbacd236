"""The text encoder: transformers' CLIP text model (Radford et al. 2021, arXiv:2103.00020) with its tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
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
        """The ids of a prompt, ends included. Triggers count in any case, as whole words, the longest first."""
        triggers = sorted(self.triggers, key=len, reverse=True)
        pattern = "|".join(f"({_whole(trigger)})" for trigger in triggers)
        ids, start = [self.tokenizer.bos_token_id], 0
        for match in re.finditer(pattern, prompt, re.IGNORECASE):
            ids += self._ids(prompt[start : match.start()]) + self.triggers[triggers[(match.lastindex or 1) - 1]]
            start = match.end()
        return [*ids, *self._ids(prompt[start:]), self.tokenizer.eos_token_id]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids (b, n) → hidden states (b, n, width)."""
        return self.transformer(input_ids=token_ids).last_hidden_state

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts → hidden states (b, max_length, width). An empty prompt is the unconditional one."""
        return self(self.tokenize(prompts).to(next(self.parameters()).device))


def _whole(word: str) -> str:
    """A pattern of a word that is no part of a longer one; at an end that is a sign, anything may follow."""
    before, after = (r"(?<!\w)" if re.match(r"\w", word) else ""), (r"(?!\w)" if re.match(r"\w", word[-1]) else "")
    return before + re.escape(word) + after
