"""The kernels of `kernels/`: compiled once for this CPU where there is a C++ compiler; elsewhere torch's operators do.

They compute what `ldm.models.layers` has and stand in for it in networks that `use_in` is told of, wherever no gradient
is asked for.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from ldm.files import staged_folder
from ldm.models import layers
from ldm.models.layers import GroupNorm
from ldm.models.unet import GEGLU, CrossAttention, SelfAttention

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")  # of which kernels.cpp has the rest in it
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
LIBRARY, TRUSTED = "kernels.so", "trusted.txt"
SWITCH = "LDM_NATIVE"  # an environment variable; 0 leaves the kernels out, and packed weights
PATIENCE = 60  # seconds, for the compiler and for the check
CRASHES = (signal.SIGILL, signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP)
MOST_HEAD = 256  # numbers in a head of attention, as in attention.h
PADDING = 32  # of keys and heads of attention, at most
CHANNELS = 16  # that kernels take at once, at most

CONVOLUTIONS = ("convolution", "enlarged_convolution")
KERNELS = ("row_statistics", "scale_and_shift", "gated_gelu", "attention", *CONVOLUTIONS)
LOADED: dict[str, Callable[..., int]] = {}  # the kernels there are, by name and type


def _named(kernel: str, dtype: torch.dtype) -> str:
    return f"{kernel}_{str(dtype)[6:]}"


EVERY = [_named(kernel, dtype) for kernel in KERNELS for dtype in (torch.float32, torch.bfloat16)]


def use_in(network: nn.Module) -> None:
    """Let a network on the CPU run by these kernels, where there are any."""
    load()
    for layer in network.modules() if LOADED else ():
        if isinstance(layer, SelfAttention | CrossAttention):
            layer.attend = attention
        elif isinstance(layer, GEGLU):
            layer.gate = gated_gelu
        elif isinstance(layer, GroupNorm) and layer.num_channels % CHANNELS == 0:
            layer.row_statistics, layer.scale_and_shift = row_statistics, scale_and_shift


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `ldm.models.layers.attention`."""
    batch, heads, queries, size = q.shape
    kernel = _kernel("attention", q, k, v)
    alike = k.shape == v.shape == (batch, heads, k.shape[2], size)
    alike = alike and all(t.dtype == q.dtype and t.stride(3) == 1 for t in (q, k, v))
    if kernel is None or size > MOST_HEAD or not alike:
        return layers.attention(q, k, v)
    out = q.new_empty(batch, queries, heads * size)
    space = q.new_empty(2, batch, heads, _padded(k.shape[2]), _padded(size))  # for copies of keys and values
    if not q.is_meta:  # where it only counts what is taken
        strides = [stride for t in (q, k, v) for stride in t.stride()[:3]]
        shape = _numbers(batch, heads, queries, k.shape[2], size)
        kernel(*_at(q, k, v, out, space), shape, _numbers(*strides), torch.get_num_threads())
    return out


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `ldm.models.layers.row_statistics`, in float64."""
    kernel = _kernel("row_statistics", x)
    if kernel is None or not _is_flat(x):
        return layers.row_statistics(x)
    batch, channels, height, width = x.shape
    mean, variance = torch.empty(2, batch, height, 1, channels, dtype=torch.float64, device=x.device)
    if not x.is_meta:
        kernel(*_at(x, mean, variance), _numbers(batch * height, width, channels), torch.get_num_threads())
    return mean, variance


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    """As `ldm.models.layers.scale_and_shift`."""
    kernel = _kernel("scale_and_shift", x, scale, shift)
    alike = scale.shape == shift.shape == (*x.shape[:2], 1, 1) and scale.dtype == shift.dtype == torch.float32
    if kernel is None or not _is_flat(x) or not alike:
        return layers.scale_and_shift(x, scale, shift, silu)
    out = torch.empty_like(x)
    if not x.is_meta:
        batch, channels, height, width = x.shape
        scale, shift = scale.contiguous(), shift.contiguous()
        kernel(
            *_at(x, scale, shift, out), _numbers(batch, height * width, channels), int(silu), torch.get_num_threads()
        )
    return out


def gated_gelu(x: Tensor) -> Tensor:
    """As `ldm.models.layers.gated_gelu`."""
    kernel, size = _kernel("gated_gelu", x), x.shape[-1] // 2
    if kernel is None or size % CHANNELS or not x.is_contiguous():
        return layers.gated_gelu(x)
    out = x.new_empty(*x.shape[:-1], size)
    if not x.is_meta:
        kernel(*_at(x, out), _numbers(out.numel() // size, size), torch.get_num_threads())
    return out


def convolves(x: Tensor, weight: Tensor, enlarged: bool) -> bool:
    """Whether there is a kernel for `convolution`."""
    outputs, *rest = weight.shape
    alike = rest == [x.shape[1], 3, 3] and weight.dtype == x.dtype
    whole = outputs % CHANNELS == 0 and x.shape[1] % CHANNELS == 0
    return alike and whole and _kernel(CONVOLUTIONS[enlarged], x, weight) is not None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], enlarged: bool) -> Tensor:
    """3×3, of x (b, c, h, w), or of x `enlarged` to twice its size by nearest neighbour, where `convolves` says so.

    `padding` is how many rows and columns of zeros are around x as it is given.
    """
    if has_torch_function_unary(x):  # `seamless` has another padding
        return handle_torch_function(convolution, (x,), x, weight, bias, padding, enlarged)
    if not x.is_meta and not weight.device == x.device == (x if bias is None else bias).device:
        raise RuntimeError(f"a map on {x.device} is to be convolved with weights on {weight.device}: move one of them")
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    batch, channels, *sides = x.shape
    outputs, scale = len(weight), 2 if enlarged else 1
    size = (batch, outputs, *(scale * (side + 2 * zeros - 2) for side, zeros in zip(sides, padding, strict=True)))
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    bias = x.new_zeros(outputs) if bias is None else bias.to(x.dtype)
    kernel = LOADED[_named(CONVOLUTIONS[enlarged], x.dtype)]
    rest = _numbers(batch, *sides, channels, outputs, *padding), torch.get_num_threads()
    space = x.new_empty(kernel(*5 * [None], *rest))
    if not x.is_meta:
        kernel(*_at(x, weight, bias, out, space), *rest)
    return out


def _kernel(name: str, *tensors: Tensor) -> Callable[..., int] | None:
    """That for tensors like the first, where there is one, and nothing is to be learned through any of them."""
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if learning or tensors[0].device.type not in ("cpu", "meta"):
        return None
    return LOADED.get(_named(name, tensors[0].dtype))


def _is_flat(x: Tensor) -> bool:
    """Whether the pixels of (b, c, h, w) follow each other without gaps."""
    return x.is_contiguous(memory_format=torch.channels_last)


def _at(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def _numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _padded(size: int) -> int:
    return -(-size // PADDING) * PADDING


@cache
def load() -> None:
    """Load the kernels that agree with torch, after compiling them where this CPU has none yet."""
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if sys.platform != "linux" or not capable or os.environ.get(SWITCH) == "0":
        return
    try:
        folder = _cache() / f"kernels-{_fingerprint()}"
        if not folder.is_dir():
            compiler, *options = shlex.split(os.environ.get("CXX", "")) or ["c++"]
            if shutil.which(compiler) is None:
                log.info("there is no C++ compiler (%s), so torch's kernels are used, which are slower", compiler)
                return
            make(folder, compiler, *options)
        _refuse_others(folder.parent, folder, folder / LIBRARY)
        every, trusted = open_library(folder / LIBRARY, EVERY), (folder / TRUSTED).read_text().split()
        if wrong := every.keys() - trusted:
            log.warning("these kernels crash or are wrong here, torch's are slower: %s", ", ".join(sorted(wrong)))
        LOADED.update({name: kernel for name, kernel in every.items() if name not in wrong})
    except subprocess.CalledProcessError as error:
        told = error.stderr.decode(errors="replace").strip()[-200:]
        log.warning("kernels cannot be compiled, torch's are slower (%s=0 tries none): %s", SWITCH, told or error)
    except (OSError, RuntimeError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        log.warning("kernels cannot be made or loaded, torch's are slower (%s=0 tries none): %s", SWITCH, error)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "ldm"


def _fingerprint() -> str:
    """Of all that the library depends on."""
    cpu = re.findall(r"^(?:model name|flags)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[:2]
    parts = (
        *(path.read_text() for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])),
        *FLAGS,
        *cpu,
        os.environ.get("CXX", ""),
        torch.__version__,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _refuse_others(*paths: Path) -> None:
    """Raises OSError where a library there, which can do anything, may be somebody else's."""
    for path in paths:
        if path.stat().st_uid != os.geteuid() or path.stat().st_mode & 0o022:
            raise OSError(f"{path} is another user's, or others may write to it: remove it")


def make(folder: Path, compiler: str, *options: str) -> None:
    """Compile, and let another process, lest this one crashes, tell which kernels agree with torch."""
    log.info("compiling kernels for this CPU, once")
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_others(folder.parent)
    with suppress(FileExistsError), staged_folder(folder, mode=0o700) as temporary:  # another may have made it by now
        library = temporary / LIBRARY
        compile_to(library, compiler, *options)
        (temporary / TRUSTED).write_text(_check(library))
        library.chmod(0o700)


def _check(library: Path) -> str:
    """What `agreeing` tells in a process of its own, until it crashes if it does."""
    command = [sys.executable, "-m", "ldm.runtime.native", str(library)]
    here = Path(__file__).parents[2]  # whose modules are the ones it imports, whatever lies in the user's folder
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=here)
    if run.returncode and -run.returncode not in CRASHES:
        raise OSError(f"they cannot be checked: {run.stderr.strip()[-200:]}")
    return run.stdout


def compile_to(library: Path, compiler: str, *options: str) -> None:
    command = [compiler, *FLAGS, *options, str(SOURCES / "kernels.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)


def open_library(library: Path, names: Iterable[str]) -> dict[str, Callable[..., int]]:
    opened = ctypes.CDLL(str(library))
    refused = () if opened.allow_tiles() else (_named("attention", torch.bfloat16),)
    kernels = {name: getattr(opened, name) for name in names if hasattr(opened, name) and name not in refused}
    for kernel in kernels.values():
        kernel.restype = ctypes.c_int64  # of those that answer
    return kernels


def agreeing() -> Iterator[str]:
    """The names of those kernels that are loaded whose results are torch's but for rounding."""
    for dtype, tolerance in {torch.float32: 1e-5, torch.bfloat16: 1e-2}.items():
        x = torch.randn(2, 48, 9, 11).to(dtype, memory_format=torch.channels_last)
        scale, shift = torch.randn(2, 2, 48, 1, 1)
        heads = [layers.split_heads(torch.randn(2, tokens, 80).to(dtype), 2) for tokens in (99, 300, 300)]
        weight, bias = torch.randn(80, 48, 3, 3).to(dtype), torch.randn(80).to(dtype)
        tried: list[tuple[Any, ...]] = [
            ("row_statistics", row_statistics, layers.row_statistics, x),
            ("scale_and_shift", scale_and_shift, layers.scale_and_shift, x, scale, shift, True),
            ("gated_gelu", gated_gelu, layers.gated_gelu, torch.randn(2, 9, 96).to(dtype)),
            ("attention", attention, layers.attention, *heads),
            (CONVOLUTIONS[False], convolution, _torchs_convolution, x, weight, bias, (1, 1), False),
            (CONVOLUTIONS[True], convolution, _torchs_convolution, x, weight, bias, (1, 1), True),
        ]
        for name, ours, plain, *args in tried:
            if _named(name, dtype) in LOADED:
                result, expected = (torch.cat([t.double().flatten() for t in run(*args)]) for run in (ours, plain))
                if torch.dist(result, expected) <= tolerance * expected.norm():
                    yield _named(name, dtype)


def _torchs_convolution(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int], enlarged: bool) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0) if enlarged else x, weight, bias, 1, padding)


if __name__ == "__main__":
    LOADED.update(open_library(Path(sys.argv[1]), EVERY))
    for name in agreeing():
        print(name, flush=True)
