"""Writing networks that are in memory: what has been trained, in the layouts that everyone reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ldm.checkpoint import configs
from ldm.checkpoint.convert import Conversion, write_checkpoint
from ldm.checkpoint.files import store
from ldm.checkpoint.folders import FOLDERS
from ldm.checkpoint.layouts import Contents, Part
from ldm.checkpoint.sources import Checkpoint
from ldm.config import ModelConfig
from ldm.models.text import TextEncoder

MEMORY = Path("networks in memory")  # for messages
SPELLING = "diffusers"  # of the parts in memory; what is written has the spelling of its layout


def save_networks(
    target: Path, networks: Mapping[str, nn.Module], config: ModelConfig, conversion: Conversion = Conversion()
) -> None:
    """Write some of "unet", "vae" and "text" to a .safetensors file, or all to a diffusers folder under another name.

    Raises CheckpointError and RequestError, and then has written nothing.
    """
    table = configs.parts_to_json({name: getattr(config, name) for name in networks}, config)
    parts = {}
    for name, network in networks.items():
        bare = Part(name, str(MEMORY), "", SPELLING, {}, table[FOLDERS[name]])
        state = network.state_dict()
        names = bare.expected(getattr(config, name)).items()
        tensors = {theirs: store(MEMORY, theirs, state[ours].detach().cpu()) for theirs, ours in names}
        parts[name] = Part(name, str(MEMORY), "", SPELLING, tensors, table[FOLDERS[name]])
    text = networks.get("text")
    tokenizer = json.loads(text.tokenizer.backend.to_str()) if isinstance(text, TextEncoder) else None
    contents = {str(MEMORY): Contents(parts, {}, {})}
    write_checkpoint(
        Checkpoint(MEMORY, parts, config.schedule, tokenizer=tokenizer, contents=contents), target, conversion
    )
