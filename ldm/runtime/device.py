"""Where networks run, and in what precision."""

from __future__ import annotations

import torch

from ldm.errors import RequestError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def pick_device(name: str) -> torch.device:
    """`auto` is the first there is of cuda, mps and cpu. Raises RequestError for one that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not available.get(device.type):
        here = ", ".join(device for device, there in available.items() if there)
        raise RequestError(f"device is {name!r}: this machine has {here}")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float16 on GPUs, bfloat16 on CPUs that compute it natively, float32 elsewhere."""
    if name not in DTYPES:
        raise RequestError(f"dtype is {name!r}: use one of {', '.join(DTYPES)}")
    if (dtype := DTYPES[name]) is not None:
        return dtype
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if cpu_computes_bfloat16() else torch.float32


def cpu_computes_bfloat16() -> bool:
    """Whether there are instructions for it (AVX512-BF16 or AMX), not just a slow emulation."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
