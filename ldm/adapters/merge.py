"""LoRAs merged into a model's weights, so that sampling costs nothing more, and taken out of them without a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock

import torch
from torch import Tensor, nn

from ldm.adapters.handle import Handle
from ldm.adapters.keys import TEXT, UNET
from ldm.adapters.lora import Lora, Parameter
from ldm.checkpoint.writing import is_finite
from ldm.errors import RequestError
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.runtime.device import send
from ldm.runtime.streaming import Streamed

CHANGING = RLock()  # of all models, none of which then has what cannot be copied


@dataclass(frozen=True, eq=False)
class Dose:
    """A LoRA and how much of it: its strength in the U-Net and in the text encoder."""

    lora: Lora
    unet: float = 1.0
    text: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.unet) and math.isfinite(self.text)):
            raise RequestError(f"the strength of {self.lora.name} is {self.unet} and {self.text}: use finite numbers")

    def strength(self, parameter: Parameter) -> float:
        """How much of the LoRA's change a parameter gets: 0 where it has none."""
        return {UNET: self.unet, TEXT: self.text}[parameter[0]] if parameter in self.lora.changes else 0.0


class Adapters:
    """All that is merged into a U-Net and a text encoder.

    A changed weight is its original plus every LoRA's change of the original, in the order of loading, added in
    float32 and rounded once. Originals are kept: on CPUs the parameters themselves, which may be views of a file, and
    for a GPU's weights copies on the CPU. So no rounding outlasts a LoRA, whatever the order in which they go.
    """

    def __init__(self, unet: UNet, text: TextEncoder):
        self._networks: dict[str, nn.Module] = {UNET: unet, TEXT: text}
        self._originals: dict[Parameter, nn.Parameter] = {}
        self._loaded: list[Dose] = []
        self._prompted: list[Dose] = []  # those of the prompt that is being drawn
        self.active: tuple[Dose, ...] = ()  # in the weights now

    def add(self, dose: Dose) -> Handle:
        """Merge a LoRA until the handle removes it. Where this fails, the weights are as they were."""
        with CHANGING:
            self._set([*self._loaded, dose], self._prompted)
        return Handle(dose.lora.name, lambda: self._remove(dose))

    def _remove(self, dose: Dose) -> None:
        with CHANGING:
            self._set([each for each in self._loaded if each is not dose], self._prompted)

    @property
    def loaded(self) -> dict[str, Lora]:
        """The LoRAs that stay until they are removed, by name; of several with the same, the last."""
        return {dose.lora.name: dose.lora for dose in self._loaded}

    @contextmanager
    def prompted(self, doses: Sequence[Dose]) -> Iterator[None]:
        """With a prompt's own LoRAs, which stand in for loaded ones of the same name.

        Raises RequestError while another prompt's are in the weights: each would draw with those of both.
        """
        with CHANGING:
            if self._prompted:
                names = ", ".join(sorted({dose.lora.name for dose in self._prompted}))
                raise RequestError(
                    f"another picture is being made with LoRAs of its prompt ({names}): finish or close it first"
                )
            if doses:
                self._set(self._loaded, list(doses))
        try:
            yield
        finally:
            if doses:
                with CHANGING:
                    self._set(self._loaded, [])

    @torch.no_grad()
    def _set(self, loaded: list[Dose], prompted: list[Dose]) -> None:
        names = {dose.lora.name for dose in prompted}
        active = (*(dose for dose in loaded if dose.lora.name not in names), *prompted)
        every = {parameter: None for dose in (*self.active, *active) for parameter in dose.lora.changes}
        staged = {p: self._merge(p, active) for p in every if _doses(p, active) != _doses(p, self.active)}
        for (part, name), (value, original) in staged.items():  # nothing fails from here on
            module, _, leaf = name.rpartition(".")
            setattr(self._networks[part].get_submodule(module), leaf, value)
            self._originals.pop((part, name), None)
            if original is not None:
                self._originals[part, name] = original
        self._loaded, self._prompted, self.active = loaded, prompted, active

    def _merge(self, parameter: Parameter, active: Sequence[Dose]) -> tuple[nn.Parameter, nn.Parameter | None]:
        """What a parameter becomes, and the original to keep: None where the original is what it becomes."""
        now = self._now(parameter)
        kept = self._originals.get(parameter)
        if isinstance(now, Streamed):
            original = kept = _streamed(now if kept is None else kept, now)
        elif kept is not None:
            moved = kept.to(now.device, now.dtype)  # itself, on a CPU
            original = kept if moved is kept else _like(kept, moved)
        else:
            original = now
            kept = now if now.device.type == "cpu" else _like(now, now.cpu())
        doses = _doses(parameter, active)
        if not doses:
            return original, None
        if isinstance(original, Streamed):
            return original.changed(lambda weight: _merged(weight, parameter, doses)), original
        return _like(original, _merged(original, parameter, doses)), kept

    def _now(self, parameter: Parameter) -> nn.Parameter:
        return self._networks[parameter[0]].get_parameter(parameter[1])


def _merged(original: Tensor, parameter: Parameter, doses: Sequence[Dose]) -> Tensor:
    """A weight plus the changes of doses, all of which change it. Raises RequestError where it overflows."""
    exact = original.float()
    total = exact.clone()
    for dose in doses:
        total += dose.strength(parameter) * dose.lora.changes[parameter].delta(exact)
    merged = total.to(original.dtype)
    if is_finite(total) and not is_finite(merged):
        names = ", ".join(dose.lora.name for dose in doses)
        raise RequestError(
            f"{names}: {'.'.join(parameter)} overflows {str(merged.dtype)[6:]}; use less strength, or float32"
        )
    return merged


def _streamed(kept: nn.Parameter, now: Streamed) -> nn.Parameter:
    """The original of a weight that is streamed now, and may have been in memory when it was changed."""
    if isinstance(kept, Streamed):
        return kept
    return Streamed(now, partial(send, kept.detach().to(now.dtype), now.read().device))


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _doses(parameter: Parameter, active: Sequence[Dose]) -> list[Dose]:
    """Those that change a parameter."""
    return [dose for dose in active if dose.strength(parameter)]
