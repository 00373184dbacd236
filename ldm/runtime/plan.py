"""How a model fits into memory, told before any of it is read: arithmetic over networks without data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import nn

from ldm.config import LABELS, ModelConfig
from ldm.errors import RequestError
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.runtime import strips
from ldm.runtime.footprint import footprint
from ldm.runtime.memory import available, taken, trim
from ldm.runtime.streaming import streamable

log = logging.getLogger(__name__)

MIB = 1 << 20
PLENTY = 2  # times the weights, free
LATER = 160 * MIB  # of libraries that are loaded, and buffers that they take, when networks first run on the CPU
LEFT = 1.05  # of what is counted, for what is not: pieces of memory too small to be given back
KEPT = 1.25  # of a stage on the CPU, where what it frees is kept, some of it in pieces that fit nothing


@dataclass(frozen=True)
class Job:
    """What is to be made at once, and in how much memory; None leaves it to the model, and to what is free."""

    memory: int | None = None  # bytes: of the process, or of its part on a GPU
    width: int | None = None  # in pixels
    height: int | None = None
    batch_size: int = 1
    scale: float = 1.0  # by which a second pass enlarges the picture
    int8: bool = False  # whether the weights of the U-Net's layers are in eight bits

    def __post_init__(self) -> None:
        for name in ("memory", "width", "height", "batch_size"):
            if (value := getattr(self, name)) is not None and not (type(value) is int and value >= 1):
                raise RequestError(f"{name} is {value!r:.50}: use a whole number, 1 or more")


@dataclass(frozen=True)
class Plan:
    """What of a model stays in memory, and how much more its stages take, one after the other: in bytes."""

    memory: int  # there is
    program: int  # taken before weights are read
    weights: Mapping[str, int]  # by network
    work: Mapping[str, int]  # by stage
    away: Mapping[str, Mapping[str, int]]  # weights that are streamed, by network and name
    apart: bool = False  # whether guidance takes an evaluation for each prompt
    kept: float = KEPT  # times what a stage takes, where what it frees is kept

    @property
    def streamed(self) -> dict[str, int]:
        """How much of each network is read whenever it runs."""
        return {name: sum(away.values()) for name, away in self.away.items()}

    @property
    def peak(self) -> int:
        return self._peak(self.kept if self.keeps else 1)

    @property
    def keeps(self) -> bool:
        """Whether the process keeps memory that it frees, which is faster, and takes more."""
        return not self.tight and self._peak(self.kept) <= self.memory

    @property
    def margin(self) -> int:
        """What the peak has beside the program, the weights that stay and the larger of the stages."""
        return self.peak - self._stays - max(self.work.values())

    def _peak(self, kept: float) -> int:
        return int(LEFT * (self._stays + kept * max(self.work.values())))

    @property
    def _stays(self) -> int:
        return self.program + sum(self.weights.values()) - sum(self.streamed.values())

    @property
    def tight(self) -> bool:
        """Whether anything is given up for memory."""
        return self.apart or any(self.streamed.values())

    @property
    def excess(self) -> int:
        return max(0, self.peak - self.memory)

    def report(self) -> None:
        """Log what is given up."""
        told = [f"{size // MIB} MiB of the {LABELS[name]}" for name, size in self.streamed.items() if size]
        if told:
            log.info("to save memory, these are read anew whenever they are used: %s", ", ".join(told))
        if self.excess:
            log.warning("%s; trying all the same", self.shortage)

    @property
    def shortage(self) -> str:
        """What is needed and is not there, and what to do."""
        least, memory = -(-self.peak // MIB), self.memory // MIB
        return f"{least} MiB of memory are needed, not {memory}: use a smaller size or batch, or allow more"


def make_plan(
    networks: Mapping[str, nn.Module], config: ModelConfig, job: Job, device: torch.device, dtype: torch.dtype
) -> Plan | None:
    """The fastest plan for networks that are on `meta` yet; none where nobody asks and there is plenty of memory."""
    trim()  # or what earlier models left would count as the program's
    memory = available(device) if job.memory is None else job.memory
    plenty = PLENTY * sum(_weights(networks, dtype, job.int8).values())
    if memory is None or (job.memory is None and memory > plenty):
        return None
    width, height = (round((side or config.image_size) * job.scale) for side in (job.width, job.height))
    program = taken(device) + (LATER if device.type == "cpu" else 0)
    kept = KEPT if device.type == "cpu" else 1.0
    return fit(networks, replace(job, memory=memory, width=width, height=height), program, dtype, kept)


def fit(networks: Mapping[str, nn.Module], job: Job, program: int, dtype: torch.dtype, kept: float = KEPT) -> Plan:
    """The fastest plan within the memory of a job that leaves nothing open, or the smallest there is.

    Given up first is what costs the least time: the text encoder, which runs once a prompt, is streamed; then prompts
    are evaluated one by one; then the U-Net is streamed, the largest of its weights first, as few of them as will do.
    """
    assert job.memory is not None
    candidates = {
        name: {weight: _bytes(name, dtype, job.int8) * size for weight, size in streamable(network).items()}
        for name, network in networks.items()
    }
    away: dict[str, dict[str, int]] = {name: {} for name in networks}
    plan = Plan(job.memory, program, _weights(networks, dtype, job.int8), _work(networks, job, dtype), away, kept=kept)
    if plan.excess:
        plan = replace(plan, away=away | {"text": candidates["text"]})
    if plan.excess:
        apart = replace(plan, apart=True, work=_work(networks, job, dtype, apart=True))
        plan = min(plan, apart, key=lambda each: each.peak)  # where decoding takes the most, nothing is gained
    if plan.excess:
        plan = replace(plan, away={**plan.away, "unet": _first(candidates["unet"], plan.excess / LEFT)})
    return plan


def _first(sizes: Mapping[str, int], least: float) -> dict[str, int]:
    """As few of the first as have `least` bytes together, or all."""
    before = [0, *accumulate(sizes.values())]
    return {name: size for (name, size), so_far in zip(sizes.items(), before, strict=False) if so_far < least}


def _bytes(name: str, dtype: torch.dtype, int8: bool) -> int:
    """Of each number of the weights that a network's layers have in memory."""
    return 1 if int8 and name == "unet" else dtype.itemsize


def _weights(networks: Mapping[str, nn.Module], dtype: torch.dtype, int8: bool) -> dict[str, int]:
    sizes = {}
    for name, network in networks.items():
        layers, every = sum(streamable(network).values()), sum(p.numel() for p in network.parameters())
        sizes[name] = _bytes(name, dtype, int8) * layers + dtype.itemsize * (every - layers)
    return sizes


@torch.no_grad()
def _work(networks: Mapping[str, nn.Module], job: Job, dtype: torch.dtype, apart: bool = False) -> dict[str, int]:
    """What the stages take beside the weights that stay.

    A layer's weight may be there three times: in the file, or eight bits, on its way from there, and in the layout that
    oneDNN has for it; on its way from eight bits, to sixteen by way of float32, once more.
    """
    unet, vae = networks["unet"], networks["vae"]
    assert isinstance(unet, UNet)
    assert isinstance(vae, VAE)
    assert job.width is not None
    assert job.height is not None
    height, width = (max(side // vae.config.downsampling, 1) for side in (job.height, job.width))
    edits = unet.config.in_channels == 2 * vae.config.latent_channels  # the picture is seen, and not, and no prompt
    branches = 3 if edits else 2
    prompts = 1 if apart else branches
    copies = 3 if job.int8 else 2
    with torch.device("meta"):
        x = torch.empty(job.batch_size * (prompts if edits else 1), unet.config.in_channels, height, width)
        context = torch.empty(prompts * job.batch_size, 77, unet.config.context_dim)
        shifts, keys_values = unet.embed_time(torch.empty(1)), unet.embed_context(context)
        latent = torch.empty(1, vae.config.latent_channels, height, width)
        taken = {
            "a step": footprint(lambda: unet.predict(x, shifts, keys_values))
            + branches
            * footprint(lambda: unet.embed_context(context[: job.batch_size]))  # which stay from step to step
            + copies * _largest(unet),
            "decoding": footprint(lambda: strips.decode(vae, latent)) + 2 * _largest(vae),
        }
    return {stage: size * dtype.itemsize // 4 for stage, size in taken.items()}


def _largest(network: nn.Module) -> int:
    return max(p.nbytes for p in network.parameters())
