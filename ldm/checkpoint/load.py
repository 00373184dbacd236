"""Fill networks from checkpoints: built on `meta`, then given the file's own tensors, without a second copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoint.detect import cfg_scale_from_json
from ldm.checkpoint.files import StoredTensor
from ldm.checkpoint.header import FLOATS
from ldm.checkpoint.layouts import NAMES, Part, describe
from ldm.checkpoint.sources import Checkpoint, Choices, open_checkpoint
from ldm.checkpoint.vocabulary import load_tokenizer
from ldm.checkpoint.writing import is_finite, release
from ldm.config import LABELS, SD_V1, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.errors import CheckpointError
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.runtime import convolving, native
from ldm.runtime.memory import keep_freed
from ldm.runtime.packing import can_pack, pack
from ldm.runtime.plan import Job, Plan, make_plan
from ldm.runtime.quantization import quantize, rounded
from ldm.runtime.streaming import Streamed, stream, streamable

Device = torch.device | str
Hold = Callable[[nn.Module, Tensor], Streamed]

PACKED = (torch.bfloat16,)  # what is faster with packed weights: in float32 they gain a hundredth


@dataclass(frozen=True)
class Model:
    """The three networks of a checkpoint, the config that describes them, and the plan they are held in memory by."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    config: ModelConfig
    plan: Plan | None = None


def load_model(
    path: str | Path,
    config: ModelConfig | None = None,
    choices: Choices = Choices(),
    *,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_nonfinite: bool = False,
    job: Job | None = None,
) -> Model:
    """A whole model from a single file or a diffusers folder; `config` overrides what the file tells.

    job: what it is for, and in how much memory: weights that there is no room for stay in the file, to be read when
    they are used, and others may be packed; without one all are in memory, as they are. Raises CheckpointError, naming
    every missing, unexpected or misshapen tensor of the first network that has any, and those that hold NaN or infinity
    unless `allow_nonfinite`.
    """
    checkpoint, config, networks = _open_model(path, config, choices, device)
    checkpoint.report()
    plan = make_plan(networks, config, job, torch.device(device), dtype) if job else None
    if plan:
        plan.report()
    hold = {"unet": _holder(job, torch.device(device), dtype)}
    with _keeping_freed(job, plan):
        for name, network in networks.items():
            part, away = checkpoint.part(name), plan.away[name] if plan else ()
            fill(network, part, getattr(config, name), device, dtype, allow_nonfinite, away, hold.get(name))
    return Model(**networks, config=config, plan=plan)


@contextmanager
def _keeping_freed(job: Job | None, plan: Plan | None) -> Iterator[None]:
    """Gives back what weights were on their way, where there is no room for it; from then on as planned."""
    if job is None:
        yield
        return
    kept = "all" if plan is None or plan.keeps else "some"
    keep_freed("all" if kept == "all" and not job.int8 else "none")
    try:
        yield
    finally:
        keep_freed(kept)


def _holder(job: Job | None, device: torch.device, dtype: torch.dtype) -> Hold | None:
    """How the U-Net's layers have weights that they are done with changing; None for as they are."""
    if job is None:
        return None
    if job.int8:
        return quantize
    return pack if device.type == "cpu" and dtype in PACKED and can_pack(dtype) else None


def plan_model(
    path: str | Path, job: Job, choices: Choices = Choices(), *, device: Device = "cpu", dtype: torch.dtype
) -> Plan | None:
    """How `load_model` would hold a model in memory, of which only headers are read. Raises CheckpointError."""
    _, config, networks = _open_model(path, None, choices, device)
    return make_plan(networks, config, job, torch.device(device), dtype)


def _open_model(
    path: str | Path, config: ModelConfig | None, choices: Choices, device: Device
) -> tuple[Checkpoint, ModelConfig, dict[str, Any]]:
    """What is at a path, and its networks without weights, as they will run."""
    checkpoint = open_checkpoint(Path(path), choices)
    config = config or read_config(checkpoint)
    for name in NAMES:
        checkpoint.part(name)  # or what is missing is told
    networks = {name: build(checkpoint, name, getattr(config, name)) for name in NAMES}
    for network in networks.values():
        network.to(memory_format=torch.channels_last)  # as weights are read, for plans to count no copies
        if torch.device(device).type == "cpu":
            native.use_in(network)
            convolving.use_in(network)
    return checkpoint, config, networks


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """What the parts of a checkpoint are, taken together. Raises CheckpointError where they do not fit each other."""
    configs = {name: checkpoint.part(name).read_config() for name in NAMES}
    try:
        return ModelConfig(**configs, schedule=checkpoint.schedule, **read_habits(checkpoint))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: its parts do not make a model: {error}") from error


def read_habits(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `image_size` and `cfg_scale` that a U-Net's config tells; none without one. Raises CheckpointError."""
    unet = checkpoint.parts.get("unet")
    if unet is None:
        return {}
    told = unet.json or {}
    habits: dict[str, Any] = {"cfg_scale": cfg_scale_from_json(told, unet.where)}
    sample_size = told.get("sample_size")  # a side in latents
    if type(sample_size) is int and 1 <= sample_size <= 1024:
        vae = checkpoint.parts.get("vae")
        habits["image_size"] = sample_size * (vae.read_config() if vae else SD_V1.vae).downsampling
    return habits


def load_unet(
    path: str | Path, config: UNetConfig | None = None, *, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> UNet:
    """The U-Net of a full checkpoint, or of a file or folder of its own. Raises CheckpointError."""
    return _load(open_checkpoint(Path(path)), "unet", config, device, dtype)


def load_vae(
    path: str | Path, config: VAEConfig | None = None, *, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> VAE:
    """The autoencoder of a full checkpoint, or of a file or folder of its own. Raises CheckpointError."""
    return _load(open_checkpoint(Path(path)), "vae", config, device, dtype)


def load_text(
    path: str | Path, config: TextConfig | None = None, *, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The text encoder, with its tokenizer, of a full checkpoint or its own file or folder. Raises CheckpointError."""
    return _load(open_checkpoint(Path(path)), "text", config, device, dtype)


def build(checkpoint: Checkpoint, name: str, config: Any) -> Any:
    """Network `name` of this config, on `meta`, in eval mode: all of it but the weights."""
    extra = [load_tokenizer(checkpoint.tokenizer, config, checkpoint.path)] if name == "text" else []
    with torch.device("meta"), _NotBegun():
        return {"unet": UNet, "vae": VAE, "text": TextEncoder}[name](config, *extra).eval()


class _NotBegun(TorchFunctionMode):
    """Leaves out what weights begin training with; on `meta` that would do nothing, and import half of torch for it."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def _load(checkpoint: Checkpoint, name: str, config: Any, device: Device, dtype: torch.dtype) -> Any:
    part = checkpoint.part(name)
    config = config or part.read_config()
    network = build(checkpoint, name, config)
    fill(network, part, config, device, dtype)
    return network


def fill(
    network: nn.Module,
    part: Part,
    config: Any,
    device: Device,
    dtype: torch.dtype,
    allow_nonfinite: bool = False,
    away: Collection[str] = (),
    hold: Hold | None = None,
) -> None:
    """Give a network built on `meta` the tensors of `part`; where dtype and layout agree they stay views of the file.

    Those of the weights `away` stay in the file alone until their layer runs; `hold` makes what those of
    other layers become. Raises CheckpointError as `check` does, and for weights that are not finite in `dtype`.
    """
    shapes = check(network, part, config)
    state, nonfinite = {}, []
    layers = streamable(network) if hold else {}
    for name, ours in part.expected(config).items():
        read = partial(_read, part.tensors[name], shapes[ours], device, dtype)
        tensor = read()
        if not allow_nonfinite and not is_finite(tensor):
            nonfinite.append(name)
        if ours in away:
            again = partial(read, copy=True)
            tensor = Streamed(tensor, partial(rounded, again) if hold is quantize else again)
            stream(network.get_submodule(ours.removesuffix(".weight")))
            release(part.tensors[name])
        elif hold and ours in layers:
            tensor = hold(network.get_submodule(ours.removesuffix(".weight")), tensor)
            release(part.tensors[name])
        state[ours] = tensor
    refuse_nonfinite(nonfinite, part, dtype)
    network.load_state_dict(state, assign=True)


def check(network: nn.Module, part: Part, config: Any) -> dict[str, torch.Size]:
    """The shapes of a network, by our names, once it is sure that `part` has a tensor for each.

    Raises CheckpointError with the names of every missing, unexpected or misshapen tensor.
    """
    shapes = {ours: parameter.shape for ours, parameter in network.state_dict().items()}
    expected = part.expected(config)
    problems = {
        "missing": [name for name in expected if name not in part.tensors],
        "unexpected": [name for name in part.tensors if name not in expected],
        "of the wrong shape or type": [
            f"{name} is {tensor.dtype}{list(tensor.shape)}, not {list(shapes[expected[name]])}"
            for name, tensor in part.tensors.items()
            if name in expected and not _fits(tensor, shapes[expected[name]])
        ],
    }
    if any(problems.values()):
        summary = "; ".join(f"{describe(names)} {kind}" for kind, names in problems.items() if names)
        raise CheckpointError(
            f"{part.where}: does not fill the {LABELS[part.name]}: {summary}; download it again or use another",
            details=[f"{kind}: {part.prefix}{name}" for kind, names in problems.items() for name in names],
        )
    return shapes


def refuse_nonfinite(names: list[str], part: Part, dtype: torch.dtype) -> None:
    if names:
        raise CheckpointError(
            f"{part.where}: {describe([part.prefix + name for name in names])} of the {LABELS[part.name]} hold NaN or "
            f"infinity in {str(dtype)[6:]}; use another dtype or file, or --allow-nonfinite",
            details=[part.prefix + name for name in names],
        )


def _fits(tensor: StoredTensor, shape: torch.Size) -> bool:
    """Equal but for trailing ones: a 1×1 convolution is a linear layer."""
    return tensor.dtype in FLOATS and _core(tensor.shape) == _core(shape)


def _core(shape: Sequence[int]) -> list[int]:
    dims = list(shape)
    while dims and dims[-1] == 1:
        dims.pop()
    return dims


def _read(stored: StoredTensor, shape: torch.Size, device: Device, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
    """A tensor as a network has it. Of the file no more stays in memory than it is a view of."""
    tensor = stored.load().reshape(shape)
    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    placed = tensor.to(device, dtype, memory_format=layout, copy=copy)
    if placed.data_ptr() != tensor.data_ptr():
        release(stored)
    return placed
