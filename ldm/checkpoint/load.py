"""Fill networks from checkpoints: built on `meta`, then given the file's own tensors, without a second copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.files import first_line, read_json, read_text
from ldm.checkpoint.layouts import Checkpoint, Part, describe, open_checkpoint
from ldm.checkpoint.names import Row, text_names, unet_names, vae_names
from ldm.config import SD_V1, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.diffusion import NoiseSchedule
from ldm.errors import CheckpointError
from ldm.models.text import TextEncoder
from ldm.models.tokenizer import SPECIAL_TOKENS, Merge, build_tokenizer, shipped_vocabulary
from ldm.models.unet import UNet
from ldm.models.vae import VAE

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Device = torch.device | str


@dataclass(frozen=True)
class Model:
    """The three networks of a checkpoint and the config that describes them."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    config: ModelConfig


def load_model(
    path: str | Path,
    config: ModelConfig | None = None,
    *,
    vae: str | Path | None = None,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A whole model from a single file or a diffusers folder; `config` overrides what the file tells.

    `vae` is a file or folder whose autoencoder is used instead of the model's own.

    Raises CheckpointError, naming every missing, unexpected or misshapen tensor of the first network that has any.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path)
    if vae is not None:
        other = open_checkpoint(Path(vae)).part("vae", Path(vae))
        checkpoint = replace(checkpoint, parts={**checkpoint.parts, "vae": other})
    config = config or _read_config(checkpoint, path)
    return Model(
        unet=_load(checkpoint, path, "unet", config.unet, device, dtype),
        vae=_load(checkpoint, path, "vae", config.vae, device, dtype),
        text=_load(checkpoint, path, "text", config.text, device, dtype),
        config=config,
    )


def _read_config(checkpoint: Checkpoint, path: Path) -> ModelConfig:
    configs = {name: checkpoint.part(name, path).read_config() for name in NAMES}
    sample_size = (checkpoint.parts["unet"].json or {}).get("sample_size")  # a side in latents
    if type(sample_size) is int and 1 <= sample_size <= 1024:
        image_size = sample_size * configs["vae"].downsampling
    else:
        image_size = SD_V1.image_size
    try:
        NoiseSchedule(checkpoint.schedule)
        return ModelConfig(**configs, schedule=checkpoint.schedule, image_size=image_size)
    except ValueError as error:
        raise CheckpointError(f"{path}: its parts do not make a model: {error}") from error


def load_unet(
    path: str | Path, config: UNetConfig | None = None, *, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> UNet:
    """The U-Net of a full checkpoint, or of a file or folder of its own. Raises CheckpointError."""
    return _load(open_checkpoint(Path(path)), Path(path), "unet", config, device, dtype)


def load_vae(
    path: str | Path, config: VAEConfig | None = None, *, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> VAE:
    """The autoencoder of a full checkpoint, or of a file or folder of its own. Raises CheckpointError."""
    return _load(open_checkpoint(Path(path)), Path(path), "vae", config, device, dtype)


def load_text(
    path: str | Path, config: TextConfig | None = None, *, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The text encoder, with its tokenizer, of a full checkpoint or its own file or folder. Raises CheckpointError."""
    return _load(open_checkpoint(Path(path)), Path(path), "text", config, device, dtype)


NAMES: dict[str, Callable[[Any], list[Row]]] = {"unet": unet_names, "vae": vae_names, "text": text_names}


def _load(checkpoint: Checkpoint, path: Path, name: str, config: Any, device: Device, dtype: torch.dtype) -> Any:
    """Network `name` of a checkpoint, ready to run: in eval mode, convolutions in channels_last memory."""
    part = checkpoint.part(name, path)
    config = config or part.read_config()
    extra = [load_tokenizer(checkpoint.tokenizer_folder, config, path)] if name == "text" else []
    with torch.device("meta"):
        network = {"unet": UNet, "vae": VAE, "text": TextEncoder}[name](config, *extra)
    fill(network, part, NAMES[name](config), device, dtype)
    if isinstance(network, TextEncoder):  # a constant, which files store in many dtypes or not at all
        network.transformer.embeddings.position_ids = torch.arange(config.max_length, device=device)[None]
    return network.eval()


def fill(network: nn.Module, part: Part, rows: Iterable[Row], device: Device, dtype: torch.dtype) -> None:
    """Give a network built on `meta` the tensors of `part`; where dtype and layout agree they stay views of the file.

    Raises CheckpointError with the names of every missing, unexpected or misshapen tensor.
    """
    on_disk = {row.ours: getattr(row, part.spelling) for row in rows}
    expected = {}  # name on disk → our name and shape
    for key, parameter in network.state_dict().items():
        module, _, leaf = key.rpartition(".")
        expected[f"{on_disk[module]}.{leaf}"] = key, parameter.shape

    problems = {
        "missing": [name for name in expected if name not in part.tensors],
        "unexpected": [name for name in part.tensors if name not in expected],
        "of the wrong shape or type": [
            f"{name} is {str(tensor.dtype)[6:]}{list(tensor.shape)}, not {list(expected[name][1])}"
            for name, tensor in part.tensors.items()
            if name in expected and not _fits(tensor, expected[name][1])
        ],
    }
    if any(problems.values()):
        summary = "; ".join(f"{describe(names)} {kind}" for kind, names in problems.items() if names)
        raise CheckpointError(
            f"{part.where}: does not fill the {type(network).__name__}: {summary}; download it again or use another",
            details=[f"{kind}: {part.prefix}{name}" for kind, names in problems.items() for name in names],
        )
    state = {key: _place(part.tensors[name].reshape(shape), device, dtype) for name, (key, shape) in expected.items()}
    network.load_state_dict(state, assign=True)


def _fits(tensor: Tensor, shape: torch.Size) -> bool:
    """Equal but for trailing ones: a 1×1 convolution is a linear layer."""
    return tensor.is_floating_point() and _core(tensor.shape) == _core(shape)


def _core(shape: torch.Size) -> list[int]:
    dims = list(shape)
    while dims and dims[-1] == 1:
        dims.pop()
    return dims


def _place(tensor: Tensor, device: Device, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    return tensor.to(device, dtype, memory_format=layout)


def load_tokenizer(folder: Path | None, config: TextConfig, where: Path) -> CLIPTokenizer:
    """A model folder's own tokenizer, or CLIP's where it has none. Raises CheckpointError."""
    vocabulary, merges = _tables(folder) if folder else shipped_vocabulary()
    if len(vocabulary) != config.vocab_size:
        raise CheckpointError(
            f"{where}: the text encoder knows {config.vocab_size} tokens, the tokenizer {len(vocabulary)}; "
            "copy the model's tokenizer folder beside it"
        )
    try:
        return build_tokenizer(vocabulary, merges, config.max_length)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(f"{folder}: not a CLIP tokenizer ({first_line(error)})") from error


def _tables(folder: Path) -> tuple[dict[str, int], list[Merge]]:
    """Vocabulary and merges from vocab.json and merges.txt, or from tokenizer.json."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary: Any = read_json(folder / "vocab.json")
        lines = read_text(folder / "merges.txt").split("\n")
        pairs: Any = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    else:
        model = read_json(folder / "tokenizer.json").get("model")
        vocabulary, pairs = (model.get(key) for key in ("vocab", "merges")) if isinstance(model, dict) else (None, None)
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in pairs] if isinstance(pairs, list) else None
    if not _is_vocabulary(vocabulary) or not isinstance(pairs, list) or not all(map(_is_merge, pairs)):
        raise CheckpointError(f"{folder}: not a CLIP tokenizer; expected tokens numbered from 0, and pairs to merge")
    return vocabulary, [(first, second) for first, second in pairs]


def _is_vocabulary(value: Any) -> bool:
    """Tokens, the special ones among them, with the numbers from 0 to one less than there are."""
    return (
        isinstance(value, dict)
        and all(type(number) is int for number in value.values())
        and sorted(value.values()) == list(range(len(value)))
        and value.keys() >= set(SPECIAL_TOKENS)
    )


def _is_merge(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
