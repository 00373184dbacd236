"""From a config to a run: what it trains, on what, from what."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ldm.checkpoint import Model
from ldm.errors import RequestError
from ldm.files import remove_unfinished
from ldm.train.cache import open_cache
from ldm.train.config import LATENTS, OF_A_RUN, PRIOR, SAMPLES, TrainConfig
from ldm.train.data import Batches, Examples, assign, bucket_sizes, open_examples
from ldm.train.diffusion import DiffusionTask
from ldm.train.loop import check_folder, make_accelerator, train
from ldm.train.networks import new_model, start_model, widen_for_inpainting
from ldm.train.prior import Joined, draw_prior
from ldm.train.task import Task
from ldm.train.vae import VAETask


def run(config: TrainConfig, resume: bool = False) -> Path:
    """Train as the config says, and answer with the path of the result. Raises LdmError."""
    accelerator = make_accelerator(config)
    micro_batch = config.loop.micro_batch or 1
    if config.loop.batch_size % (accelerator.num_processes * micro_batch):
        raise RequestError(
            f"loop.batch_size is {config.loop.batch_size}: use a multiple of {accelerator.num_processes} processes "
            f"times loop.micro_batch, {micro_batch}"
        )
    folder, data = Path(config.folder), config.data
    check_folder(folder, config, resume)
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        output = glob.escape(Path(config.output).stem)
        for names in (*OF_A_RUN, f"{output}*"):  # results that are kept have the step behind the stem
            remove_unfinished(folder, names)
        for below in (SAMPLES, PRIOR):
            remove_unfinished(folder / below, "*")
    caption = data.caption if config.task == "diffusion" else ""  # an autoencoder reads none
    examples = open_examples(
        data.source, seed=data.seed, kinds=data.kinds, count=data.count, side=data.side, caption=caption
    )
    task, batches = TASKS[config.task](config, examples, accelerator)
    return train(config, task, batches, accelerator, resume)


def _vae(config: TrainConfig, examples: Examples, accelerator: Accelerator) -> tuple[Task, Any]:
    return VAETask(config, examples), Batches(len(examples), config.loop.batch_size, config.seed)


def _diffusion(config: TrainConfig, examples: Examples, accelerator: Accelerator) -> tuple[Task, Any]:
    data, folder, device = config.data, Path(config.folder), accelerator.device
    model = _model(config, examples)
    own = len(examples)
    if config.prior.prompts:
        with accelerator.main_process_first():
            prior = draw_prior(folder / PRIOR, model, config, accelerator)
        examples = Joined(examples, open_examples(str(prior)))
        own = examples.half
    sizes, buckets = [(data.side, data.side)], None
    if data.buckets:
        multiple = model.config.vae.downsampling * 2 ** (len(model.config.unet.channel_mult) - 1)
        sizes = bucket_sizes(data.side, multiple)
        buckets = assign([examples.size(number) for number in range(len(examples))], sizes)
    cut = [sizes[bucket] for bucket in buckets or [0] * len(examples)]
    cache = None
    if config.diffusion.cache:
        model.vae.to(device)
        with accelerator.main_process_first():
            cache = open_cache(folder / LATENTS, model.vae, examples, cut, device)
    task = DiffusionTask(config, model, examples, cut, device, cache, own)
    at_once = config.loop.micro_batch or config.loop.batch_size // accelerator.num_processes
    return task, Batches(len(examples), config.loop.batch_size, config.seed, buckets, at_once)


def _model(config: TrainConfig, examples: Examples) -> Model:
    """What learns: an old model or a new one, wide enough. Raises RequestError where it does not fit the run."""
    settings = config.diffusion
    if config.model is not None:
        model = start_model(Path(config.model), settings.prediction_type, settings.zero_terminal_snr)
    elif settings.vae is None:
        raise RequestError("give a model to start from with model, or the VAE of a new one with diffusion.vae")
    else:
        captions = (examples.caption(number) for number in range(len(examples)))
        model = new_model(config.networks, Path(settings.vae), captions, config.seed)
    if settings.inpaint and settings.method == "full":
        model = widen_for_inpainting(model)
    wanted = model.config.vae.latent_channels * (2 if settings.inpaint else 1) + settings.inpaint
    if (channels := model.config.unet.in_channels) != wanted:
        raise RequestError(
            f"the U-Net of {config.model or 'networks.unet'} has {channels} input channels, and learning "
            f"{'with' if settings.inpaint else 'without'} diffusion.inpaint by {settings.method!r} needs {wanted}"
        )
    return model


TASKS = {"vae": _vae, "diffusion": _diffusion}
