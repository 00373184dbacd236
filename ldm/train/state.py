"""All that a run needs to go on bit for bit: what is trained, its averages, the optimizers. The rest is the step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ldm.checkpoint.files import first_line
from ldm.errors import CheckpointError
from ldm.train.ema import EMA

# Whole tensors on the CPU, however they are spread over devices; the names are those on one device.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
ONTO = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)

Optimizers = Mapping[str, Any]


def save_state(module: nn.Module, optimizers: Optimizers, ema: EMA | None, accelerator: Accelerator) -> dict[str, Any]:
    """What `load_state` puts back. Every process has to ask for it."""
    return {
        "parameters": get_model_state_dict(module, options=WHOLE),
        "optimizers": {
            turn: get_optimizer_state_dict(module, optimizer.optimizer, options=WHOLE)
            for turn, optimizer in optimizers.items()
            if optimizer.state  # torch would make one that has not stepped yet take a step
        },
        "ema": None if ema is None else ema.shadow,
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
    }


def load_state(path: Path, module: nn.Module, optimizers: Optimizers, ema: EMA | None, accelerator: Accelerator) -> int:
    """Put a state back, and answer with its step. Raises CheckpointError for one of another run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        below = "module." if isinstance(module, nn.parallel.DistributedDataParallel) else ""
        shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
        saved = {below + name: tensor.shape for name, tensor in state["parameters"].items()}
        if shapes != saved:
            raise ValueError(
                f"it has {len(saved)} parameters, this run trains {len(shapes)}, "
                f"{len(shapes.items() & saved.items())} in common"
            )
        if ema is not None and state["ema"] is None:
            raise ValueError("it has no averages: leave out loop.ema_decay")
        set_model_state_dict(module, state["parameters"], options=ONTO)
        for turn, content in state["optimizers"].items():
            set_optimizer_state_dict(module, optimizers[turn].optimizer, content, options=ONTO)
        if ema is not None:
            for name, average in ema.shadow.items():
                average.copy_(state["ema"][name])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"]
    except Exception as error:  # what a damaged pickle raises may be anything
        raise CheckpointError(
            f"{path}: not the state of this run ({first_line(error)}); start anew in another folder"
        ) from error
