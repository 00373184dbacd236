"""The text encoder: transformers' CLIP text model (Radford et al. 2021, arXiv:2103.00020) with its tokenizer."""

from __future__ import annotations

import logging
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
        ids = self.tokenizer(prompts, padding=False, truncation=False, verbose=False)["input_ids"]
        room = self.config.max_length
        for prompt_ids in ids:
            if len(prompt_ids) > room:
                dropped = self.tokenizer.decode(prompt_ids[room - 1 : -1][:75])
                log.warning(
                    "prompt cut: %d tokens, the limit is %d; dropped: %.300r", len(prompt_ids) - 2, room - 2, dropped
                )
                prompt_ids[room - 1 :] = [self.tokenizer.eos_token_id]
        padded = [prompt_ids + [self.tokenizer.pad_token_id] * (room - len(prompt_ids)) for prompt_ids in ids]
        return torch.tensor(padded, dtype=torch.long)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids (b, n) → hidden states (b, n, width)."""
        return self.transformer(input_ids=token_ids).last_hidden_state

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts → hidden states (b, max_length, width). An empty prompt is the unconditional one."""
        return self(self.tokenize(prompts).to(next(self.parameters()).device))
