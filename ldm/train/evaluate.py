"""How good a model is: what its pictures show of their captions, how exact its VAE is, and FID and CLIP score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.files import first_line
from ldm.diffusion import Level, Prediction, samplers
from ldm.diffusion.guidance import guide
from ldm.diffusion.prediction import denoiser
from ldm.errors import CheckpointError, ImageError, RequestError, is_out_of_memory
from ldm.images import grid, to_tensor
from ldm.pipeline import StableDiffusion
from ldm.request import Request
from ldm.runtime.noise import seeded_noise
from ldm.train.data import Examples
from ldm.train.judge import Verdict, judge
from ldm.train.shapes import KINDS, NEW_SHAPES, Scene, draw_scene
from ldm.train.sheets import captioned

UNSEEN = "unseen"  # the kind of scenes with one thing, whose pair of colour and shape is never in training
ALL_KINDS = (*KINDS, UNSEEN)
SHOWN = 100  # pictures on a contact sheet at most


@dataclass(frozen=True)
class Setting:
    """How pictures are made."""

    sampler: str
    steps: int
    cfg_scale: float | None  # none given: the model's


@dataclass(frozen=True, eq=False)
class Judged:
    """A picture made of the caption of a held-out scene, and what it shows of it."""

    setting: Setting  # complete
    kind: str
    caption: str
    seed: int
    verdict: Verdict
    picture: Image.Image

    def to_dict(self) -> dict[str, Any]:
        """All but the picture, for JSON."""
        told = {"kind": self.kind, "caption": self.caption, "seed": self.seed}
        return {**asdict(self.setting), **told, **asdict(self.verdict), "right": self.verdict.right}


def held_out(seed: int, number: int, kind: str) -> Scene:
    """Scene `number` of those that training never shows, of one of ALL_KINDS, or of one thing of a new shape."""
    if kind in NEW_SHAPES:
        return draw_scene(seed, number, "test", "one").with_shape(kind)
    return draw_scene(seed, number, UNSEEN, "one") if kind == UNSEEN else draw_scene(seed, number, "test", kind)


def evaluate(
    sd: StableDiffusion, settings: Sequence[Setting], kinds: Sequence[str], count: int, seed: int, batch_size: int
) -> list[Judged]:
    """Make `count` pictures of each kind with each setting, from the same captions and noises, and judge them.

    Raises RequestError for what the model cannot do and for want of scipy, before anything slow, and NumericalError.
    """
    if find_spec("scipy") is None:
        raise RequestError("judging pictures needs scipy: pip install -e '.[evaluate]'")
    chosen = [(kind, number) for kind in kinds for number in range(count)]
    if sd.config.unet.in_channels != sd.config.vae.latent_channels:
        raise RequestError("a model that edits pictures draws none of its own: give one for text to image")
    settings = [
        replace(setting, cfg_scale=sd.resolve(Request("", seed=seed, **asdict(setting))).cfg_scale)
        for setting in settings
    ]
    batches = [(setting, chosen[i : i + batch_size]) for setting in settings for i in range(0, len(chosen), batch_size)]
    judged = []
    with tqdm(total=len(settings) * len(chosen), unit="picture") as bar:
        for setting, batch in batches:
            scenes = [held_out(seed, number, kind) for kind, number in batch]
            captions = [scene.caption(Random(number)) for scene, (_, number) in zip(scenes, batch, strict=True)]
            requests = [
                Request(caption, seed=seed + number, **asdict(setting))
                for caption, (_, number) in zip(captions, batch, strict=True)
            ]
            pictures = render(sd, requests)
            judged += [
                Judged(setting, kind, request.prompt, seed + number, judge(picture, scene), picture)
                for (kind, number), request, scene, picture in zip(batch, requests, scenes, pictures, strict=True)
            ]
            bar.update(len(batch))
    return judged


@torch.no_grad()
def render(sd: StableDiffusion, requests: Sequence[Request]) -> list[Image.Image]:
    """A picture for each of requests that have seeds and differ in them and their prompts alone, in one batch.

    They are those that `sd.generate` makes of each alone, of prompts without weights or other syntax, at the model's
    size. Raises NumericalError.
    """
    first = sd.resolve(requests[0])
    scale = first.cfg_scale
    assert scale is not None
    contexts = sd.text.encode([request.prompt for request in requests])
    if scale != 1:
        contexts = torch.cat([sd.text.encode("").expand_as(contexts), contexts])
    keys_values = sd.unet.embed_context(contexts)

    def network(x: Tensor, level: Level) -> Tensor:
        shifts = sd.unet.embed_time(torch.tensor([level.t], device=sd.device))
        return sd.unet.predict(x.to(sd.dtype), shifts, keys_values).float()

    predict = denoiser(network, sd.config.schedule.prediction_type)

    def denoise(x: Tensor, level: Level) -> Prediction:
        if scale == 1:
            return predict(x, level)
        both = predict(torch.cat([x, x]), level)
        uncond, cond = (Prediction(*halves) for halves in zip(*(form.chunk(2) for form in both), strict=True))
        return guide(uncond, [cond], (1.0,), scale)

    side = sd.config.image_size // sd.config.vae.downsampling
    seeds = [request.seeds()[0] for request in requests]
    noise = seeded_noise(seeds, (sd.config.vae.latent_channels, side, side), sd.device)
    *_, last = samplers.sample(
        first.sampler, denoise, noise(), sd.schedule, steps=first.steps, noise=noise, eta=first.eta, grid=first.schedule
    )
    return sd.decode(last.x)


# --------------------------------------------------------------------------------------------------------- reporting


def table(judged: Sequence[Judged]) -> str:
    """In Markdown: for each setting and kind, the percentages of pictures that show all that is told, and each part."""
    parts = [f.name for f in fields(Verdict)]
    lines = ["| kind | sampler | steps | guidance | n | all right | " + " | ".join(parts) + " |"]
    lines.append("| --- " * 2 + "| ---: " * (4 + len(parts)) + "|")
    for setting, kind in dict.fromkeys((each.setting, each.kind) for each in judged):
        verdicts = [each.verdict for each in judged if (each.setting, each.kind) == (setting, kind)]
        shares = " | ".join(_share(flags) for flags in zip(*((v.right, *astuple(v)) for v in verdicts), strict=True))
        lines.append(
            f"| {kind} | {setting.sampler} | {setting.steps} | {setting.cfg_scale:g} | {len(verdicts)} | {shares} |"
        )
    return "\n".join(lines) + "\n"


def _share(flags: Sequence[bool | None]) -> str:
    told = [flag for flag in flags if flag is not None]
    return f"{100 * sum(told) / len(told):.1f}" if told else "–"


def sheet(judged: Sequence[Judged]) -> Image.Image:
    """SHOWN of the pictures at most, evenly chosen: framed green where all is right, red elsewhere, with captions."""
    shown = judged[:: -(-len(judged) // SHOWN)]
    return grid([captioned(each.picture, each.caption, "green" if each.verdict.right else "red") for each in shown])


# ---------------------------------------------------------------------------------------------------------- measures


def vae_fidelity(sd: StableDiffusion, count: int, seed: int) -> dict[str, float]:
    """The mean PSNR in dB and SSIM of held-out pictures at the model's size after encoding and decoding.

    SSIM: Wang et al. 2004, doi:10.1109/TIP.2003.819861; an 11×11 Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03.
    Raises RequestError where torchmetrics is missing.
    """
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        raise RequestError(f"PSNR and SSIM need torchmetrics: pip install -e '.[evaluate]' ({error})") from error
    psnrs, ssims = [], []
    for number in tqdm(range(count), unit="picture"):
        picture = draw_scene(seed, number, "test").draw(sd.config.image_size)
        [decoded] = sd.decode(sd.encode(picture))
        pair = (to_tensor(decoded).double() + 1) / 2, (to_tensor(picture).double() + 1) / 2  # black is 0 in SSIM
        psnrs.append(peak_signal_noise_ratio(*pair, data_range=1.0).item())
        _, map_ = structural_similarity_index_measure(
            *pair, sigma=1.5, data_range=1.0, k1=0.01, k2=0.03, return_full_image=True
        )
        ssims.append(map_[..., 5:-5, 5:-5].mean().item())  # of windows within the picture, as in the paper
    return {"PSNR": sum(psnrs) / count, "SSIM": sum(ssims) / count}


def frechet_distance(
    pictures: Examples, reference: Examples, weights: Path, device: torch.device
) -> tuple[float, int, int]:
    """FID (Heusel et al. 2017, arXiv:1706.08500) between two sets of pictures, of 2048 features; how many are in each.

    weights: torch-fidelity's file of the Inception network, pt_inception-2015-12-05-6726825d.pth. Raises RequestError
    where a package is missing or pictures are, CheckpointError where the file is, or is damaged.
    """
    if min(len(pictures), len(reference)) < 2:
        raise _too_few(pictures, reference)
    if not weights.is_file():
        raise CheckpointError(f"{weights}: no such file; FID needs pt_inception-2015-12-05-6726825d.pth")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature_extractor_weights_path=str(weights)).to(device)
    except ImportError as error:
        raise RequestError("FID needs two packages: pip install -e '.[evaluate]' torch-fidelity") from error
    except Exception as error:  # torch raises anything for a damaged file
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{weights}: not the weights of Inception ({first_line(error)})") from error
    for examples, real in ((pictures, False), (reference, True)):
        for image, _ in _loaded(examples):
            metric.update(image.to(device), real=real)
    counts = int(metric.fake_features_num_samples), int(metric.real_features_num_samples)
    if min(counts) < 2:  # some turned out to be broken
        raise _too_few(pictures, reference)
    return metric.compute().item(), *counts


def _too_few(*sides: Examples) -> RequestError:
    told = "; ".join(examples.summary() for examples in sides)
    return RequestError(f"FID needs two whole pictures or more on either side: got {told}")


@torch.no_grad()
def clip_score(pictures: Examples, model: Path, device: torch.device) -> tuple[float, int]:
    """The mean of 100 · max(cos(picture, caption), 0) in a CLIP model (Hessel et al. 2021, arXiv:2104.08718); of how
    many pictures.

    model: a folder with a CLIPModel of transformers, in safetensors, and its processor. Captions are cut at the model's
    length. Raises CheckpointError where it is none, RequestError where all pictures are broken.
    """
    clip, processor = _load_clip(model)
    clip.to(device)
    scores = []
    for image, caption in _loaded(pictures):
        inputs = processor(text=[caption], images=image, return_tensors="pt", truncation=True).to(device)
        outputs = clip(**inputs)
        scores.append(100 * F.cosine_similarity(outputs.image_embeds, outputs.text_embeds).clamp(min=0).item())
    if not scores:
        raise RequestError(pictures.summary())
    return sum(scores) / len(scores), len(scores)


def _load_clip(folder: Path) -> tuple[torch.nn.Module, Any]:
    """A CLIP model and its processor, after a trial. Raises CheckpointError, RequestError for want of transformers."""
    try:
        from transformers import CLIPModel, CLIPProcessor, logging
    except ImportError as error:
        raise RequestError(f"the CLIP score needs transformers: pip install -e '.[evaluate]' ({error})") from error

    logging.set_verbosity_error()  # it warns at length of what is an error here
    logging.disable_progress_bar()
    try:
        answer: Any = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        clip, loaded = answer
        made_up = sorted([*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])])
        if made_up:
            raise CheckpointError(f"{len(made_up)} tensors are missing or of another shape, such as {made_up[0]}")
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        clip(**processor(text=["a"], images=Image.new("RGB", (8, 8)), return_tensors="pt"))
    except Exception as error:  # transformers raises anything for a damaged folder
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{folder}: not a folder of a CLIP model and its processor ({first_line(error)})"
        ) from error
    return clip, processor


def _loaded(examples: Examples) -> Iterator[tuple[Tensor, str]]:
    """Pictures (1, 3, h, w), of 0 to 255, and their captions."""
    for index in tqdm(range(len(examples)), unit="picture"):
        try:
            example = examples[index]
        except ImageError:
            continue  # it has been logged
        pixels = ((to_tensor(example.image) + 1) * 127.5).round().to(torch.uint8)
        yield pixels, example.caption
