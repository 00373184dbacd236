"""LoRA (Hu et al. 2021, arXiv:2106.09685) that learns: small factors beside frozen layers, and the files of them.

Before training, after it, and when the network is wanted as it was:

    layers = add_lora(unet, "attention", rank=8, alpha=8, generator=generator)
    save_lora(path, layers, {}, unet.config, text.config, "kohya")
    remove_lora(unet)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from tqdm import tqdm

from ldm.adapters.keys import KOHYA_PREFIXES, TEXT, UNET
from ldm.adapters.kinds import MAX_RANK
from ldm.adapters.lora import MAX_ALPHA
from ldm.checkpoint.files import store
from ldm.checkpoint.layouts import TEXT_LEVEL, describe
from ldm.checkpoint.names import disk_dims, text_names, unet_names
from ldm.checkpoint.writing import Output, write_tensors
from ldm.config import TextConfig, UNetConfig
from ldm.errors import NumericalError, RequestError
from ldm.files import made_folder, staged_file

# Which layers learn, by their names. "attention": every linear layer of the U-Net's spatial transformers and of the
# text encoder, kohya's default (Transformer2DModel, CLIPAttention and CLIPMLP in its networks/lora.py); diffusers'
# training scripts take to_q, to_k, to_v and to_out.0 alone. "attention+conv": the 3×3 convolutions of ResBlocks, down-
# and upsamplers too (LoCon); kohya's conv_dim adds their 1×1 skips and time projections, at the rank of linear layers.
TARGETS = {
    "attention": re.compile(r"\btransformer\."),
    "attention+conv": re.compile(r"\btransformer\.|\.conv[12]?$"),
}


class LoRALayer(nn.Module):
    """base(x) + alpha / rank · up(down(x)), of a linear layer or a convolution, whose kernel and stride `down` has.

    The factors are float32 whatever the base is; what they add is cast to what the base answers with. `up` begins at
    zero and `down` at what torch gives to layers, so that nothing changes until something is learned.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.rank, self.alpha, self.scale = base, rank, alpha, alpha / rank
        plain = {"bias": False, "dtype": torch.float32}
        if isinstance(base, nn.Conv2d):
            place = {"stride": base.stride, "padding": base.padding}
            self.down = skip_init(nn.Conv2d, base.in_channels, rank, base.kernel_size, **place, **plain)
            self.up = skip_init(nn.Conv2d, rank, base.out_channels, 1, **plain)
        else:
            self.down = skip_init(nn.Linear, base.in_features, rank, **plain)
            self.up = skip_init(nn.Linear, rank, base.out_features, **plain)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)  # on the CPU, as all seeds are
        nn.init.zeros_(self.up.weight)
        self.to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        change = self.up(self.down(x.to(self.down.weight.dtype)))
        return y + (self.scale * change).to(y.dtype)


def add_lora(
    network: nn.Module, which: str, rank: int, alpha: float, generator: torch.Generator
) -> dict[str, LoRALayer]:
    """Put LoRA layers into a U-Net or text encoder and freeze all else; answers with them, by the names of their bases.

    which: a key of TARGETS. generator: of the CPU, for the first values. Raises RequestError.
    """
    if which not in TARGETS:
        raise RequestError(f"LoRA is for {which!r:.50}: use one of {', '.join(TARGETS)}")
    if not 1 <= rank <= MAX_RANK:
        raise RequestError(f"the rank is {rank}: use 1 to {MAX_RANK}")
    if not 0 < alpha <= MAX_ALPHA:
        raise RequestError(f"alpha is {alpha}: use a number above 0 and up to {MAX_ALPHA:g}, such as the rank")
    if any(isinstance(module, LoRALayer) for module in network.modules()):
        raise RequestError("this network has LoRA layers already: use remove_lora first")
    network.requires_grad_(False)
    layers = {
        name: LoRALayer(module, rank, alpha, generator)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and TARGETS[which].search(name)
    }
    for name, layer in layers.items():
        network.set_submodule(name, layer)
    return layers


def remove_lora(network: nn.Module) -> None:
    """Put the layers back that were there before `add_lora`: the same objects, with the same bits. They stay frozen."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, LoRALayer)}
    for name, layer in layers.items():
        network.set_submodule(name, layer.base)


# What a file puts before diffusers' names of modules, in which kohya has underscores for dots.
PREFIXES = {
    "kohya": {UNET: KOHYA_PREFIXES[UNET][0], TEXT: KOHYA_PREFIXES[TEXT][0] + TEXT_LEVEL},
    "peft": {UNET: "unet.", TEXT: f"text_encoder.{TEXT_LEVEL}"},
}


def lora_tensors(
    unet_layers: Mapping[str, LoRALayer],
    text_layers: Mapping[str, LoRALayer],
    unet_config: UNetConfig,
    text_config: TextConfig,
    layout: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Layers as files hold them, on the CPU; either network may have none. Raises RequestError.

    layout: "kohya", of sd-scripts, AUTOMATIC1111 and ComfyUI; or "peft", diffusers' own. The latter has no place for
    alpha that every version reads, so that alpha / rank is multiplied into its `lora_B`. Layers that are 1×1
    convolutions on disk have factors of four axes.
    """
    if layout not in PREFIXES:
        raise RequestError(f"a LoRA's layout is {layout!r:.50}: use one of {', '.join(PREFIXES)}")
    tensors: dict[str, Tensor] = {}
    for part, layers, rows in [
        (UNET, unet_layers, unet_names(unet_config)),
        (TEXT, text_layers, text_names(text_config)),
    ]:
        theirs = {row.ours: PREFIXES[layout][part] + row.diffusers for row in rows}
        for module, layer in layers.items():
            scale = 1.0 if layout == "kohya" else layer.scale
            dims = disk_dims(part, f"{module}.weight", layer.down.weight.ndim, "diffusers")
            down, up = (_on_disk(factor, dims) for factor in (layer.down.weight, layer.up.weight * scale))
            if layout == "kohya":
                name = theirs[module].replace(".", "_")
                alpha = torch.tensor(float(layer.alpha))
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
            else:
                tensors |= {
                    f"{theirs[module]}.lora_A.weight": down,
                    f"{theirs[module]}.lora_B.weight": up,
                }
    return {name: tensor if name.endswith(".alpha") else tensor.to(dtype) for name, tensor in tensors.items()}


def _on_disk(factor: Tensor, dims: int) -> Tensor:
    factor = factor.detach().to("cpu", torch.float32, copy=True)
    return factor.reshape(*factor.shape, *[1] * (dims - factor.ndim))


def save_lora(
    path: Path,
    unet_layers: Mapping[str, LoRALayer],
    text_layers: Mapping[str, LoRALayer],
    unet_config: UNetConfig,
    text_config: TextConfig,
    layout: str,
    metadata: Mapping[str, str] = {},
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write layers as `lora_tensors` has them to a .safetensors file, which appears whole or not at all.

    metadata: what else to tell of the training; kohya's ss_network_dim, ss_network_alpha and ss_network_module are
    told in its layout. Raises RequestError, FileExistsError unless `overwrite`, and NumericalError for NaN.
    """
    tensors = lora_tensors(unet_layers, text_layers, unet_config, text_config, layout, dtype)
    layers = [*unet_layers.values(), *text_layers.values()]
    told = {} if layout != "kohya" else {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common(layer.rank for layer in layers),
        "ss_network_alpha": _common(layer.alpha for layer in layers),
    }  # fmt: skip
    save_tensors(path, tensors, {**told, **metadata}, overwrite=overwrite)


def _common(values: Iterable[float]) -> str:
    """The one value that there is; kohya's word where there are several."""
    every = set(values)
    return str(every.pop()) if len(every) == 1 else "Dynamic"


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write what was learned to a .safetensors file, which appears whole or not at all.

    Raises RequestError where there is nothing, FileExistsError unless `overwrite`, NumericalError for NaN or infinity.
    """
    if not tensors:
        raise RequestError(f"{path}: there is nothing to write: no layer learns")
    sources = [store(path, name, tensor) for name, tensor in tensors.items()]
    outputs = [Output(source.name, source, source.dtype, source.shape) for source in sources]
    with made_folder(path.parent), staged_file(path, overwrite) as staged:
        if nonfinite := write_tensors(staged, outputs, {"format": "pt", **metadata}, tqdm(disable=True)):
            raise NumericalError(
                f"{path}: not written, because NaN or infinity was learned, in {describe(nonfinite)}: "
                "use a lower learning rate"
            )
