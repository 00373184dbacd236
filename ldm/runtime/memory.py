"""How much memory there is and is taken, and what to do when it runs out."""

from __future__ import annotations

import ctypes
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch

from ldm.errors import RequestError, is_out_of_memory

log = logging.getLogger(__name__)

UNITS = {"M": 1 << 20, "G": 1 << 30}

Result = TypeVar("Result")


def first_that_fits(plans: Mapping[str, Callable[..., Result]]) -> Callable[..., Result]:
    """Run the first plan; when it runs out of memory, warn once and use the next, from then on.

    Plans are functions that compute the same, by name, the fastest first. The last one's error is raised.
    """
    names, lock, first = list(plans), Lock(), 0

    def run(*args: object) -> Result:
        nonlocal first
        while True:
            tried = first
            try:
                return plans[names[tried]](*args)
            except (RuntimeError, MemoryError) as error:
                if names[tried] == names[-1] or not is_out_of_memory(error):
                    raise
            torch.cuda.empty_cache()
            with lock:
                if tried == first:  # unless another thread has found out
                    first += 1
                    log.warning("out of memory: %s does not fit, going on with %s", names[tried], names[first])

    return run


def parse_memory(text: str) -> int:
    """Bytes of a size such as 4G or 1500M, in binary units. Raises RequestError."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([MG])(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise RequestError(f"memory is {text!r:.50}: use a size such as 4G or 1500M")
    return int(float(match[1]) * UNITS[match[2].upper()])


def taken(device: torch.device) -> int:
    """Bytes this process has of a device's memory; 0 where a system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _kilobytes("/proc/self/status", "VmRSS") or 0


def available(device: torch.device) -> int | None:
    """Bytes this process may have of a device's memory, what it has included; None where a system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    return None if free is None else int(min(free + taken(device), control_group_limit()))


# Of Linux's control groups, by the controller of a hierarchy: where it is, and the file that has a group's limit.
HIERARCHIES = {"": (".", "memory.max"), "memory": ("memory", "memory.limit_in_bytes")}


def control_group_limit(own: Path = Path("/proc/self/cgroup"), every: Path = Path("/sys/fs/cgroup")) -> float:
    """The bytes that the control groups allow which this process is in, such as a container's; infinite without any."""
    try:
        lines = own.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return math.inf
    return min((_limit(file) for line in lines for file in _limit_files(line, every)), default=math.inf)


def _limit_files(line: str, every: Path) -> Iterator[Path]:
    """Where the limits are of a group, which a line of /proc/self/cgroup tells, and of those that it is in."""
    _, controllers, path = line.split(":", 2)
    for controller in HIERARCHIES.keys() & controllers.split(","):
        place, name = HIERARCHIES[controller]
        root = every / place
        group = root / path.lstrip("/")
        yield group / name
        yield from (folder / name for folder in group.parents if folder.is_relative_to(root))


def _limit(file: Path) -> float:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # there is none, or it says "max"
        return math.inf


def _kilobytes(path: str, field: str) -> int | None:
    """A field of one of Linux's tables, in bytes."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found and int(found[1]) * 1024


# Settings of glibc's malloc, by their numbers in malloc.h: how much of what is freed stays with the process.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
KEEPING = {
    "all": {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: (1 << 31) - 1},
    "some": {M_MMAP_MAX: 1 << 16, M_MMAP_THRESHOLD: 1 << 23, M_TRIM_THRESHOLD: 1 << 26},
    "none": {M_MMAP_MAX: 1 << 16, M_MMAP_THRESHOLD: 1 << 20, M_TRIM_THRESHOLD: 1 << 24},
}


def keep_freed(which: str) -> None:
    """How much memory that is freed stays with the process, a key of KEEPING, where the C library is glibc.

    Its own way is to give each tensor over 32 MB back to the system, whose pages are then cleared anew for the next: a
    quarter of the time of a U-Net's step. What is given back, on the other hand, is not in pieces that fit nothing;
    tensors below 8 MB are many, and would save little.
    """
    if set_option := _libc("mallopt"):
        for option, value in KEEPING[which].items():
            set_option(option, value)


def trim() -> None:
    """Give memory that is free back to the system, however it is kept."""
    if give_back := _libc("malloc_trim"):
        give_back(0)


def _libc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
