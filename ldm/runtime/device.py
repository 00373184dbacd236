"""Where networks run, and in what precision."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.config import DTYPES
from ldm.errors import RequestError


def pick_device(name: str | torch.device) -> torch.device:
    """`auto` is the first there is of cuda, mps and cpu. Raises RequestError for one that is not there."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(device for device, count in counts.items() if count)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # which is never there
    if (device.index or 0) >= counts.get(device.type, 0):
        here = ", ".join(f"{kind}:{i}" if i else kind for kind, count in counts.items() for i in range(count))
        raise RequestError(f"device is {str(name)!r}: this machine has {here}")
    return device


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is float16 on GPUs, bfloat16 on CPUs that compute it natively, float32 elsewhere. Raises RequestError."""
    name = str(name).removeprefix("torch.")
    if name == "auto":
        if device.type != "cpu":
            return torch.float16
        return torch.bfloat16 if cpu_computes_bfloat16() else torch.float32
    if name not in DTYPES:
        raise RequestError(f"dtype is {name!r}: use auto or one of {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])


def cpu_computes_bfloat16() -> bool:
    """Whether there are instructions for it (AVX512-BF16 or AMX), not just a slow emulation."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on a device: for an NVIDIA GPU to get it in its turn, so that the CPU need not wait for that."""
    return tensor.to(device, non_blocking=device.type == "cuda")  # on MPS its memory could be reused too early
