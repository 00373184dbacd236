"""The language of prompts, as AUTOMATIC1111's stable-diffusion-webui reads it. Nothing here needs torch.

`read_prompt` goes the way of modules/prompt_parser.py there: parts joined by AND, each a list of texts with the steps
they hold for; `parse_attention` gives each text's words their weights, and `split_chunks` their places.
"""

from ldm.prompt.attention import BREAK, parse_attention
from ldm.prompt.chunks import Chunk, split_chunks
from ldm.prompt.loras import LoraTag, split_loras
from ldm.prompt.parts import Part, clean, read_prompt, split_and
from ldm.prompt.schedule import index_at, schedule

__all__ = [
    "BREAK", "Chunk", "LoraTag", "Part", "clean", "index_at", "parse_attention", "read_prompt", "schedule", "split_and",
    "split_chunks", "split_loras",
]  # fmt: skip
