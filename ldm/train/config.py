"""One TOML file a run: what is trained, from what, on what, how. Unknown keys, wrong types and wrong values are errors.

    task = "diffusion"
    folder = "runs/cats"
    model = "v1-5.safetensors"
    [data]
    source = "pictures"

`--set section.key=value` changes a value from the command line. docs/training.md tells what they are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from ldm.config import ModelConfig, UNetConfig, check_choice, check_least
from ldm.diffusion.prediction import PREDICTION_TYPES
from ldm.request import Request
from ldm.train.shapes import LAYOUTS
from ldm.train.toml import build, read_toml, set_key, to_table

TASKS = ("vae", "diffusion")
METHODS = ("full", "lora", "textual_inversion")
STATE, CONFIG, ABOUT, LATENTS, PRIOR = "state.pt", "config.toml", "run.json", "latents.safetensors", "prior"
METRICS, CURVES, SAMPLES, TENSORBOARD = "metrics.jsonl", "curves.png", "samples", "tensorboard"
OF_A_RUN = (STATE, CONFIG, ABOUT, LATENTS, PRIOR, METRICS, CURVES, SAMPLES, TENSORBOARD)  # in its folder
MAX_SEED = 2**63 - 1
MAX_OUTPUT_BYTES = 200  # of the 255 of a file's name: a kept result has its step in it, a temporary file yet more
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Data:
    """Where pictures and captions come from, and what is cut out of them."""

    source: str  # "shapes", a folder of pictures, or WebDataset shards: "data/{000..009}.tar"
    count: int | None = None  # scenes of an epoch, where the source is "shapes"
    seed: int = 0  # of the world, where the source is "shapes"
    kinds: tuple[str, ...] = ()  # of scenes, in turn, where the source is "shapes"; where not given, as often as usual
    caption: str | None = None  # of pictures that have none
    side: int = 512  # pixels; with buckets, the square root of their area
    crop: int | None = None  # side of a random part to cut out of each picture, for the VAE
    random_crop: bool = False  # of what sticks out, not evenly on both sides
    flip: bool = False  # mirror half of the pictures
    buckets: bool = False  # several aspect ratios; else squares cut from the middle
    workers: int = 2  # threads that read pictures ahead; 0 for none

    def __post_init__(self) -> None:
        check_least(1, count=self.count, side=self.side, crop=self.crop)
        check_least(0, workers=self.workers)
        for kind in self.kinds:
            check_choice("kinds", kind, tuple(LAYOUTS))


@dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv:1711.05101), with a warm-up, then constant or along half a cosine to zero."""

    learning_rate: float = 1e-4
    decay: str = "constant"  # of the learning rate; or "cosine"
    warmup: int = 0  # steps
    betas: tuple[float, ...] = (0.9, 0.999)  # two
    weight_decay: float = 0.01
    clip: float = 1.0  # the largest norm of all gradients together; 0 for any

    def __post_init__(self) -> None:
        check_choice("decay", self.decay, ("constant", "cosine"))
        check_least(0, learning_rate=self.learning_rate, warmup=self.warmup, weight_decay=self.weight_decay)
        check_least(0, clip=self.clip)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}: use two numbers from 0 to below 1")


@dataclass(frozen=True)
class Loop:
    """How long, in what portions, and how often to save and to look."""

    steps: int
    batch_size: int = 4  # of a step, over all processes
    micro_batch: int | None = None  # what one process takes at once; gradients of the rest are added up
    precision: str = "float32"  # that networks compute in; what is trained is float32
    ema_decay: float | None = None  # of the exponential moving average of the weights; none where not given
    gradient_checkpointing: bool = False  # compute activations twice rather than keep them
    save_every: int = 1000  # steps
    keep: bool = False  # what is saved before the last step too, each under its step
    sample_every: int = 1000  # steps
    log_every: int = 10  # steps

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_least(1, steps=self.steps, batch_size=self.batch_size, micro_batch=self.micro_batch)
        check_least(1, save_every=self.save_every, sample_every=self.sample_every, log_every=self.log_every)
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: use 0 to below 1")


@dataclass(frozen=True)
class VAELoss:
    """The weights of the autoencoder's terms; those of pictures are means over pixels in [-1, 1]."""

    l1: float = 1.0
    l2: float = 0.0
    kl: float = 1e-6  # of the mean over latents, in nats; CompVis' loss has sums: 1e-6 there is about 2e-8 here
    perceptual: float = 0.0
    adversarial: float = 0.0  # times the adaptive weight of arXiv:2012.09841, equation 7
    adversarial_start: int = 0  # step
    decoder_only: bool = False  # leaves latents what they are, for U-Nets that know them

    def __post_init__(self) -> None:
        check_least(0, **{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Diffusion:
    """What the U-Net learns."""

    method: str = "full"  # "lora" and "textual_inversion" leave the model's own weights as they are
    train_text: bool = False  # the text encoder too
    clip_skip: int = 1  # which of the text encoder's layers is taken, counted from the last
    caption_dropout: float = 0.1  # how often the caption is left out, for classifier-free guidance
    min_snr: float | None = None  # gamma of arXiv:2303.09556; 5 is usual
    offset_noise: float = 0.0  # deviation of noise that is equal over a channel; 0.1 is usual
    inpaint: bool = False  # with a mask and the picture around it beside the latents: 9 channels
    cache: bool = False  # encode pictures, and captions where they can be, once before the first step
    prediction_type: str | None = None  # which a full run changes the model to; else what a file that tells none has
    zero_terminal_snr: bool | None = None  # likewise
    vae: str | None = None  # a file or folder whose VAE to use, where there is no model

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if self.prediction_type is not None:
            check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_least(0, offset_noise=self.offset_noise)
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"min_snr is {self.min_snr}: use more than 0, or leave it out (--set diffusion.min_snr=)")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is {self.caption_dropout}: use 0 to 1")


@dataclass(frozen=True)
class Lora:
    rank: int = 8
    alpha: float = 8.0
    layers: str = "attention"  # or "attention+conv"
    layout: str = "kohya"  # of the file; or "peft"

    def __post_init__(self) -> None:
        check_least(1, rank=self.rank)
        check_choice("layers", self.layers, ("attention", "attention+conv"))
        check_choice("layout", self.layout, ("kohya", "peft"))


@dataclass(frozen=True)
class Inversion:
    token: str = ""  # the new word
    initial: str | None = None  # words whose embeddings it starts from
    vectors: int = 1
    layout: str = "diffusers"  # of the file; or "automatic1111"

    def __post_init__(self) -> None:
        check_least(1, vectors=self.vectors)
        check_choice("layout", self.layout, ("diffusers", "automatic1111"))


@dataclass(frozen=True)
class Prior:
    """DreamBooth's prior preservation (arXiv:2208.12242): pictures of the class, made by the model before it learns."""

    # ("a photo of a dog",); several are taken in turn; no prior where there is none
    prompts: tuple[str, ...] = field(default=(), metadata={"needed": True})
    count: int = 100
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("one of prompts is empty: say what the class is, such as 'a photo of a dog'")
        check_least(1, count=self.count)
        check_least(0, weight=self.weight)


@dataclass(frozen=True)
class Samples:
    """Pictures that are drawn while training: the same prompts and seeds each time."""

    prompts: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 25
    cfg_scale: float | None = None  # none given: the model's


@dataclass(frozen=True)
class TrainConfig:
    """A run. Raises RequestError for what does not go together."""

    task: str
    folder: str  # where everything goes
    data: Data
    loop: Loop
    seed: int = 0
    model: str | None = None  # a file or folder to start from; without it, `networks` are built anew
    output: str = "model.safetensors"  # of the result, in `folder`; a diffusers folder under a name without suffix
    output_dtype: str = "float32"
    networks: ModelConfig = field(default_factory=ModelConfig)
    optimizer: Optimizer = field(default_factory=Optimizer)
    vae: VAELoss = field(default_factory=VAELoss)
    diffusion: Diffusion = field(default_factory=Diffusion)
    lora: Lora = field(default_factory=Lora)
    inversion: Inversion = field(default_factory=Inversion)
    prior: Prior = field(default_factory=Prior)
    samples: Samples = field(default_factory=Samples)

    def request(self, prompt: str, seed: int) -> Request:
        """What is asked of the model for a picture to look at."""
        side, samples = self.data.side, self.samples
        return Request(
            prompt, seed=seed, steps=samples.steps, cfg_scale=samples.cfg_scale, width=side, height=side,
            clip_skip=self.diffusion.clip_skip,
        )  # fmt: skip

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}: use 0 to {MAX_SEED}")
        output = Path(self.output)
        folder = self.task == "diffusion" and self.diffusion.method == "full"  # may be one, of diffusers
        if (
            output.name != self.output
            or not output.stem.strip(".")
            or output.suffix not in ((".safetensors", "") if folder else (".safetensors",))
        ):
            told = ", or without a suffix for a diffusers folder" if folder else ""
            raise ValueError(f"output is {self.output!r:.100}: use a name that ends in .safetensors{told}")
        if len(self.output.encode()) > MAX_OUTPUT_BYTES:
            raise ValueError(f"output is {self.output!r:.50}…: use a name of at most {MAX_OUTPUT_BYTES} bytes")
        if self.output in OF_A_RUN:
            raise ValueError(f"output is {self.output!r}, as something else in a run's folder: use another name")
        check_choice("output_dtype", self.output_dtype, PRECISIONS)
        self._check_used()
        self._check_networks()
        method = self.diffusion.method
        if method != "full" and self.model is None:
            raise ValueError(f"diffusion.method is {method!r}, which changes a model: give one with model")
        if self.vae.decoder_only and self.model is None:
            raise ValueError("vae.decoder_only needs an encoder: give a model with model")
        if method == "textual_inversion" and not self.inversion.token:
            raise ValueError("diffusion.method is 'textual_inversion': give its new word with inversion.token")
        changed = self.diffusion.prediction_type or self.diffusion.zero_terminal_snr is not None
        if method == "full" and self.prior.prompts and changed:
            raise ValueError(
                "prior.prompts are drawn by the model as it is, which is to predict something else: leave them out, or "
                "diffusion.prediction_type and diffusion.zero_terminal_snr"
            )
        for name in ("flip", "random_crop"):
            if self.diffusion.cache and getattr(self.data, name):
                raise ValueError(f"diffusion.cache and data.{name} do not go together: a picture has one encoding")
        if self.task == "diffusion":
            sides = () if self.data.buckets else ("",)  # it is the size of pictures without them
            for prompt in (*sides, *self.samples.prompts, *self.prior.prompts):
                self.request(prompt, self.samples.seed)

    def _check_networks(self) -> None:
        """Raises ValueError for new networks that this run cannot train."""
        networks, settings = self.networks, self.diffusion
        check_choice("networks.schedule.prediction_type", networks.schedule.prediction_type, PREDICTION_TYPES)
        if networks.vae.in_channels != 3:
            raise ValueError(f"networks.vae.in_channels is {networks.vae.in_channels}: use 3, as pictures have")
        if self.task != "diffusion" or self.model is not None:
            return
        latents = networks.unet.out_channels
        fitting = (latents, 2 * latents + 1) if settings.inpaint else (latents,)
        if networks.unet.in_channels not in fitting:
            raise ValueError(
                f"networks.unet.in_channels is {networks.unet.in_channels}: use {' or '.join(map(str, fitting))} "
                f"{'with' if settings.inpaint else 'without'} diffusion.inpaint"
            )
        if networks.image_size != self.data.side:
            raise ValueError(
                f"networks.image_size is {networks.image_size} and data.side {self.data.side}: use the same, "
                "the size of pictures that the model will draw"
            )

    def _check_used(self) -> None:
        """Raises ValueError for what is set although this run has no use for it."""
        diffusion = self.task == "diffusion"
        method = self.diffusion.method if diffusion else None
        shapes, draws, has_prior = self.data.source == "shapes", bool(self.samples.prompts), bool(self.prior.prompts)
        unet = [f"unet.{f.name}" for f in fields(UNetConfig) if f.name != "out_channels"]  # the channels of latents
        uses = {  # setting → what it is for, and whether this run is that
            "networks": ("new networks, not for a model", self.model is None),
            "vae": ("task 'vae'", not diffusion),
            "data.crop": ("task 'vae'", not diffusion),
            "networks.vae": ("task 'vae'; diffusion.vae has its own", not diffusion),
            **{
                f"networks.{name}": ("task 'diffusion'", diffusion)
                for name in ("text", "schedule", "image_size", "cfg_scale", *unet)
            },
            "data.buckets": ("task 'diffusion'", diffusion),
            "data.caption": ("task 'diffusion' with pictures from disk", diffusion and not shapes),
            "data.seed": ("data.source 'shapes'", shapes),
            "data.kinds": ("data.source 'shapes'", shapes),
            "diffusion": ("task 'diffusion'", diffusion),
            "prior": ("a model, which draws it", diffusion and self.model is not None),
            "prior.count": ("prior.prompts, and there are none", has_prior),
            "prior.weight": ("prior.prompts, and there are none", has_prior),
            "samples": ("task 'diffusion'", diffusion),
            "samples.seed": ("samples.prompts, and there are none", draws),
            "samples.steps": ("samples.prompts or prior.prompts, and there are none", draws or has_prior),
            "samples.cfg_scale": ("samples.prompts or prior.prompts, and there are none", draws or has_prior),
            "vae.adversarial_start": ("vae.adversarial, which is 0", bool(self.vae.adversarial)),
            "lora": ("diffusion.method 'lora'", method == "lora"),
            "inversion": ("diffusion.method 'textual_inversion'", method == "textual_inversion"),
            "diffusion.train_text": ("the other methods", method != "textual_inversion"),
            "diffusion.vae": ("new networks, not for a model", self.model is None),
            "diffusion.prediction_type": ("a model; new networks have networks.schedule", self.model is not None),
            "diffusion.zero_terminal_snr": ("a model; new networks have networks.schedule", self.model is not None),
            "output_dtype": ("the other methods", method != "textual_inversion"),
        }
        for name, (use, is_used) in uses.items():
            if not is_used and not _is_default(self, name):
                raise ValueError(f"{name} is for {use}: leave it out")


def _is_default(config: Any, name: str) -> bool:
    *sections, name = name.split(".")
    for section in sections:
        config = getattr(config, section)
    [field] = [field for field in fields(config) if field.name == name]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return getattr(config, name) == default


def read_train_config(path: Path, changes: Sequence[str] = ()) -> TrainConfig:
    """The config in a TOML file, with `changes` of the form "section.key=value". Raises RequestError."""
    table = read_toml(path)
    for change in changes:
        set_key(table, change)
    return build(TrainConfig, table, str(path))


def to_toml(config: TrainConfig) -> str:
    """What `read_train_config` reads as the same config, defaults included."""
    import tomli_w

    return tomli_w.dumps(to_table(config))
