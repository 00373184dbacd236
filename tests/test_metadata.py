from __future__ import annotations

import json
import logging
import re
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_request import REQUESTS

from ldm import Request, metadata
from ldm.diffusion import samplers
from ldm.errors import ImageError, RequestError
from ldm.metadata import automatic1111

IMAGE = Image.new("RGB", (2, 2), "red")
SUFFIXES = (".png", ".jpg", ".webp")
# What an infotext's settings are found by in AUTOMATIC1111 (modules/infotext_utils.py).
ITS_OWN = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def png(path, **chunks: str):
    """A PNG with text chunks of these names."""
    info = PngInfo()
    for name, text in chunks.items():
        info.add_text(name.replace("sd_", "sd-"), text)
    IMAGE.save(path, pnginfo=info)
    return path


def save(path, request, **kwargs):
    metadata.save_image(path, IMAGE, request, 8, "model", **kwargs)
    return path


# --- our own ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, deadline=None)
@given(request_=REQUESTS)
def test_any_request_comes_back_from_a_picture(tmp_path_factory, suffix, request_):
    path = save(tmp_path_factory.mktemp("i") / f"i{suffix}", request_)
    assert metadata.read_request(path) == request_
    pixel = Image.open(path).getpixel((0, 0))
    assert pixel == (255, 0, 0) if suffix != ".jpg" else pixel[0] > 240


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "prompt",
    ["😀 “quoted”, <b>", "one\ntwo\r\nNegative prompt: x\nSteps: 3", '"\\\x00\x1b', "a\\", "Steps: 1, a: b, c: d"],
)
def test_awkward_prompts(tmp_path, suffix, prompt):
    request = Request(prompt=prompt, negative_prompt=prompt)
    origin = metadata.read_origin(save(tmp_path / f"i{suffix}", request, vae="kl, f8", masked=True))
    assert origin == metadata.Origin(request, "model", "kl, f8", masked=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pictures_can_be_written_without_metadata(tmp_path, suffix):
    path = save(tmp_path / f"i{suffix}", Request("a secret"), metadata=False)
    assert b"secret" not in path.read_bytes()
    assert b"s\0e\0c" not in path.read_bytes()
    with pytest.raises(ImageError, match="carries no request"):
        metadata.read_request(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_existing_files_are_never_replaced(tmp_path, suffix):
    path = tmp_path / f"i{suffix}"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        save(path, Request(prompt="a"))
    assert path.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_suffix_decides_the_format(tmp_path):
    for suffix, kind in {".png": "PNG", ".PNG": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.items():
        assert Image.open(save(tmp_path / f"{kind}{suffix}", Request("a"))).format == kind
    with pytest.raises(RequestError, match=r"not written as '.gif': use one of .png, .jpg, .jpeg, .webp"):
        save(tmp_path / "i.gif", Request("a"))


def test_exif_is_as_automatic1111_has_it(tmp_path):
    request = Request("ein Bär 🐻", seed=1)
    exif = Image.open(save(tmp_path / "i.jpg", request)).getexif()
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == metadata.parameters(request, 8, "model")
    assert exif[0x010E].isascii()


def test_prompts_without_room_in_a_jpeg_are_told(tmp_path, caplog):
    save(tmp_path / "fits.jpg", Request("x" * 21_000))
    assert len(metadata.read_request(tmp_path / "fits.jpg").prompt) == 21_000
    request = Request("word " * 10_000)
    assert metadata.read_request(save(tmp_path / "i.webp", request)) == request
    path = save(tmp_path / "i.jpg", request)
    assert "use PNG or WebP" in caplog.text
    assert Image.open(path).size == (2, 2)


# --- as AUTOMATIC1111 writes it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"negative_prompt": "a dog", "sampler": "ddim", "steps": 7, "strength": 0.6},
            "a cat\nNegative prompt: a dog\nSteps: 8, Sampler: DDIM, CFG scale: 7.5, Seed: 42, Size: 512x768, "
            "RNG: CPU, Model: v1-5, Denoising strength: 0.6",
        ),
        (
            {"clip_skip": 2, "noise": "cuda", "sampler": "euler_a", "eta": 0.5, "emphasis": "no norm"},
            "a cat\nSteps: 8, Sampler: Euler a, Schedule type: Normal, CFG scale: 7.5, Seed: 42, Size: 512x768, "
            "Clip skip: 2, Eta: 0.5, Emphasis: No norm, Model: v1-5",
        ),
        (
            {"hires_scale": 2.0, "hires_steps": 5, "hires_upscaler": "lanczos", "tiling": "both", "noise": "cuda"},
            "a cat\nSteps: 8, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x768, "
            "Tiling: True, Model: v1-5, Denoising strength: 0.7, Hires upscale: 2.0, Hires steps: 5, "
            "Hires upscaler: Lanczos",
        ),
        (
            {
                "variation_seed": 7, "variation_strength": 0.25, "seed_width": 512, "seed_height": 512,
                "noise": "cuda", "sampler": "ddim", "schedule": "uniform", "eta": 1.0,
            },
            "a cat\nSteps: 8, Sampler: DDIM, Schedule type: DDIM, CFG scale: 7.5, Seed: 42, Size: 512x768, "
            "Variation seed: 7, Variation seed strength: 0.25, Seed resize from: 512x512, Eta DDIM: 1.0, Model: v1-5",
        ),
    ],
)  # fmt: skip
def test_parameters_have_the_form_of_automatic1111(fields, text):
    assert (
        metadata.parameters(Request("a cat", seed=42, width=512, height=768, cfg_scale=7.5, **fields), 8, "v1-5")
        == text
    )


def test_parameters_tell_of_a_mask():
    request = Request("a", strength=0.5, fill="noise", only_masked=True, sampler="ddim")
    assert metadata.parameters(request, 8, "m", vae="v", masked=True).endswith(
        "VAE: v, Denoising strength: 0.5, Mask blur: 4, Masked content: latent noise, Inpaint area: Only masked, "
        "Masked area padding: 32"
    )


@given(REQUESTS, st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1))
def test_automatic1111_reads_the_settings(request, model):
    line = metadata.parameters(request, 8, model).split("\n")[-1]
    theirs = {key: json.loads(value) if value[0] == '"' else value for key, value in ITS_OWN.findall(line) if value}
    assert {key: value.strip() for key, value in theirs.items()} == {
        key: value.strip() for key, value in automatic1111.split_settings(line).items() if value
    }
    assert theirs.get("Model", "").strip() == model.strip()


TOLD = (
    "prompt", "negative_prompt", "cfg_scale", "sampler", "seed", "width", "height", "clip_skip", "emphasis", "noise",
    "image_cfg_scale",
)  # fmt: skip


@given(REQUESTS)
def test_what_the_parameters_tell_is_read_again(request):
    values = {name: getattr(request, name) for name in TOLD}
    values["prompt"] = values["negative_prompt"] = "a, b: c"
    told = Request(**values, schedule=request.schedule)
    again = automatic1111.parse(metadata.parameters(told, request.steps, "model")).request
    if None in (request.width, request.height):
        values |= {"width": None, "height": None}
    assert {name: getattr(again, name) for name in TOLD} == values
    assert again.steps == request.steps
    method = samplers.SAMPLERS[request.sampler]
    assert again.schedule == (request.schedule or (None if method.from_unit_noise else method.grid))


# --- by AUTOMATIC1111 -------------------------------------------------------------------------------------------------

A1111 = {
    "girl with a beret, (eyeshadow:1.2)\nNegative prompt: ugly, [blurry]\nSteps: 20, Sampler: Euler a, CFG scale: 7, "
    "Seed: 965400086, Size: 512x512, Model hash: 45dee52b": Request(
        "girl with a beret, (eyeshadow:1.2)", negative_prompt="ugly, [blurry]", steps=20, sampler="euler_a",
        cfg_scale=7.0, seed=965400086, width=512, height=512, noise="cuda",
    ),
    "two\nlines\nNegative prompt: of\nboth\nSteps: 30, Sampler: DPM++ 2M Karras, CFG scale: 5.5, Seed: 1, "
    "Size: 640x960, Model: deliberate_v2, Denoising strength: 0.45, Clip skip: 2, ENSD: 31337, Hires upscale: 1.5, "
    "Hires steps: 0, Hires upscaler: Latent": Request(
        "two\nlines", negative_prompt="of\nboth", steps=30, sampler="dpmpp_2m", schedule="karras", cfg_scale=5.5,
        seed=1, width=640, height=960, hires_strength=0.45, clip_skip=2, hires_scale=1.5, noise="cuda",
    ),
    'a\nSteps: 4, Sampler: DPM++ 2M, Seed: 1, Lora hashes: "ink: 0123, b\\"c: 45", TI hashes: "x: 1"': Request(
        "a", steps=4, sampler="dpmpp_2m", schedule="normal", seed=1, noise="cuda",
    ),
    "a\nSteps: 4, Sampler: DPM++ 2M SDE, Schedule type: Automatic, Seed: 1, RNG: NV, Version: v1.10.1": Request(
        "a", steps=4, sampler="dpmpp_2m_sde", seed=1, brownian=True, noise="cuda",
    ),
    "a\nSteps: 4, Sampler: DPM++ SDE, Schedule type: SGM Uniform, Seed: 1, RNG: CPU, Tiling: True": Request(
        "a", steps=4, sampler="dpmpp_sde", schedule="sgm_uniform", seed=1, brownian=True, tiling="both",
    ),
    "a\nSteps: 4, Sampler: Euler, Schedule type: Align Your Steps, Seed: 1, Emphasis: Ignore": Request(
        "a", steps=4, sampler="euler", schedule="ays", seed=1, emphasis="ignore", noise="cuda",
    ),
    "a\nSteps: 4, Sampler: DDIM, Seed: 3, Variation seed: 9, Variation seed strength: 0.2, "
    "Seed resize from: 512x768, Eta DDIM: 0.3": Request(
        "a", steps=4, sampler="ddim", seed=3, variation_seed=9, variation_strength=0.2, seed_width=512,
        seed_height=768, eta=0.3, noise="cuda",
    ),
    "a\nSteps: 4, Sampler: DDIM, Seed: 3, Size: 512x512, Hires resize: 1024x1024, Denoising strength: 0.3": Request(
        "a", steps=4, sampler="ddim", seed=3, width=512, height=512, hires_scale=2.0, hires_strength=0.3, noise="cuda",
    ),
    "a\nSteps: 4, Sampler: PLMS, Seed: 3, Denoising strength: 0, Seed resize from: -1x-1": Request(
        "a", steps=4, sampler="plms", seed=3, noise="cuda",
    ),
    "a\nSteps: 4, Sampler: LMS, Seed: 3, Denoising strength: 0.6, Mask blur: 8, Masked content: fill, "
    "Inpaint area: Only masked, Masked area padding: 16": Request(
        "a", steps=4, sampler="lms", seed=3, strength=0.6, mask_blur=8, fill="blur", only_masked=True, mask_padding=16,
        noise="cuda",
    ),
    "Negative prompt: only\nSteps: 4, Sampler: Heun, Seed: 3": Request(
        "", negative_prompt="only", steps=4, sampler="heun", seed=3, noise="cuda"
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", A1111)
def test_pictures_of_automatic1111(tmp_path, text):
    assert metadata.read_request(png(tmp_path / "i.png", parameters=text)) == A1111[text]


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "ein 🐻\nSteps: 4, Seed: 3, Sampler: LMS".encode("utf-16-be"),
        b"UNICODE\0" + "ein 🐻\nSteps: 4, Seed: 3, Sampler: LMS".encode("utf-16-le"),
        b"ASCII\0\0\0" + "ein 🐻\nSteps: 4, Seed: 3, Sampler: LMS".encode(),
    ],
)
def test_jpegs_of_automatic1111_in_every_encoding(tmp_path, comment):
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    IMAGE.save(tmp_path / "i.jpg", exif=exif)
    expected = Request("ein 🐻", steps=4, seed=3, sampler="lms", noise="cuda")
    assert metadata.read_request(tmp_path / "i.jpg") == expected


def test_what_automatic1111_did_otherwise_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    text = (
        'a\nSteps: 4, Seed: 3, ENSD: 31337, Hires upscaler: R-ESRGAN 4x+, Version: v1.9, Hires prompt: "b, c", '
        "Mask mode: Inpaint not masked, ADetailer model: face.pt, Face restoration: CodeFormer, Hires resize: 8x9"
    )
    origin = metadata.read_origin(png(tmp_path / "i.png", parameters=f"{text}, Model: x, VAE: y.pt"))
    assert (origin.model, origin.vae) == ("x", "y")
    [warning, info] = caplog.records
    assert (warning.levelname, info.levelname) == ("WARNING", "INFO")
    for lost in ("ENSD: 31337", "Hires upscaler: R-ESRGAN 4x+", "Hires prompt: b, c", "Mask mode", "CodeFormer", "8x9"):
        assert lost in warning.message
    assert info.message == "settings without a meaning here: ADetailer model, Version"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("Steps: 4, Sampler: DPM fast, Seed: 1", "sampler is 'DPM fast': use one of"),
        ("Steps: 4, Sampler: Euler, Schedule type: Turbo", "schedule is 'Turbo': use one of"),
        ("Steps: four, Sampler: Euler, Seed: 1", "Steps is 'four': use a whole number"),
        (f"Steps: {'9' * 400}, Sampler: Euler, Seed: 1", "use a whole number"),
        ("Steps: 4, Sampler: Euler, CFG scale: nan", "cfg_scale is nan: use a number from 0 to 1000"),
        ("Steps: 4, Sampler: Euler, Size: 513x512", "width is 513"),
        ("Steps: 4, Sampler: Euler, Size: 512 by 512", "Size is '512 by 512'"),
        ("Steps: 4, Sampler: Euler, Seed: -1", "seed is -1"),
        ("a prompt, and: no settings", "hold no settings"),
        ("", "hold no settings"),
    ],
)
def test_impossible_settings_are_named(tmp_path, settings, message):
    with pytest.raises((RequestError, ImageError), match=r"^[^\n]*$") as caught:
        metadata.read_request(png(tmp_path / "i.png", parameters=f"a\n{settings}"))
    assert message in str(caught.value)
    assert str(tmp_path / "i.png") in str(caught.value)


@pytest.mark.parametrize(
    "piece",
    ['"', ":", ",", "a", " ", "\\", 'a:"', 'a: "b', '": ', ': "\\', 'a:"\\",', "\n", 'aa: "x",', "Negative prompt:\n"],
)
def test_long_texts_take_linear_time(piece):
    text = "a\n" + piece * (1_000_000 // len(piece))
    start = time.process_time()
    for ending in ("", ", Steps: 4, Seed: 3, Sampler: LMS", '", Steps: 4, Seed: 3, Sampler: LMS'):
        try:
            automatic1111.parse(text + ending)
        except (ImageError, RequestError) as error:
            assert "\n" not in str(error)
    assert time.process_time() - start < 3


# --- by ComfyUI -------------------------------------------------------------------------------------------------------


def comfy(**changes) -> dict:
    """ComfyUI's first example, with other inputs for some nodes: `n3={"seed": 1}`."""
    graph = {
        "3": {"class_type": "KSampler", "inputs": {
            "seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal",
            "denoise": 1, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        }},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd\\v1-5-pruned-emaonly.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a bottle, \"glass\"", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    }  # fmt: skip
    for name, inputs in changes.items():
        node = graph.setdefault(name[1:], {"class_type": "?", "inputs": {}})
        node["class_type"] = inputs.pop("class_type", node["class_type"])
        node["inputs"] |= inputs
    return graph


BOTTLE = {
    "prompt": 'a bottle, "glass"', "negative_prompt": "text, watermark", "steps": 20, "cfg_scale": 8,
    "sampler": "euler", "schedule": "normal", "seed": 156680208700286, "width": 512, "height": 768,
}  # fmt: skip
IMG2IMG = {"n5": {"class_type": "VAEEncode", "pixels": ["10", 0]}, "n10": {"class_type": "LoadImage", "image": "x.png"}}


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {}),
        ({"n3": {"sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "karras"}},
         {"sampler": "dpmpp_2m_sde", "schedule": "karras", "brownian": True}),
        ({"n3": {"sampler_name": "uni_pc", "scheduler": "ddim_uniform"}},
         {"sampler": "unipc", "schedule": "uniform"}),
        ({"n3": {"sampler_name": "ddim", "scheduler": "simple"}}, {"schedule": "simple"}),
        ({"n6": {"text": ["11", 0]}, "n11": {"class_type": "PrimitiveNode", "value": "linked"}}, {"prompt": "linked"}),
        ({"n5": {"width": ["11", 0]}, "n11": {"class_type": "PrimitiveNode", "value": 640}}, {"width": 640}),
        ({"n6": {"clip": ["11", 0]},
          "n11": {"class_type": "CLIPSetLastLayer", "stop_at_clip_layer": -2, "clip": ["4", 1]}}, {"clip_skip": 2}),
        ({"n3": {"class_type": "KSamplerAdvanced", "noise_seed": 5, "start_at_step": 0, "end_at_step": 10000,
                 "add_noise": "enable"}}, {"seed": 5}),
        ({**IMG2IMG, "n3": {"denoise": 0.6}}, {"width": None, "height": None, "strength": 0.6, "exact_steps": True}),
    ],
)  # fmt: skip
def test_pictures_of_comfyui(tmp_path, caplog, changes, fields):
    path = png(tmp_path / "i.png", prompt=json.dumps(comfy(**json.loads(json.dumps(changes)))))
    origin = metadata.read_origin(path)
    assert origin.request == Request(**BOTTLE | fields)
    assert (origin.model, origin.vae, origin.masked) == ("v1-5-pruned-emaonly", None, False)
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"n3": {"sampler_name": "euler_ancestral"}}, "noise of euler_a's steps"),
        ({"n3": {"denoise": 0.5}}, "denoise"),
        ({"n5": {"batch_size": 4}}, "the noise of the batch's images after the first"),
        ({"n6": {"text": "(a:1.2)"}}, "weights of words"),
        ({"n11": {"class_type": "LoraLoader", "lora_name": "x"}}, "LoraLoader"),
        ({"n3": {"class_type": "KSamplerAdvanced", "noise_seed": 5, "end_at_step": 10}}, "end_at_step"),
        ({"n11": {"class_type": "KSampler", "latent_image": ["3", 0]}}, "KSampler 11"),
    ],
)
def test_what_comfyui_did_otherwise_is_told(tmp_path, caplog, changes, lost):
    metadata.read_request(png(tmp_path / "i.png", prompt=json.dumps(comfy(**json.loads(json.dumps(changes))))))
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert lost in record.message


def test_comfyuis_second_pass_is_not_taken_for_the_first(tmp_path):
    graph = comfy(n11={"class_type": "LatentUpscale", "samples": ["3", 0]})
    second = {"class_type": "KSampler", "inputs": graph["3"]["inputs"] | {"seed": 1, "latent_image": ["11", 0]}}
    path = png(tmp_path / "i.png", prompt=json.dumps({"1": second, **graph}))
    assert metadata.read_request(path) == Request(**BOTTLE)


def test_masks_of_comfyui_are_noticed(tmp_path):
    graph = comfy(n5={"class_type": "VAEEncodeForInpaint"})
    assert metadata.read_origin(png(tmp_path / "i.png", prompt=json.dumps(graph))).masked


# --- by InvokeAI ------------------------------------------------------------------------------------------------------

V3 = {
    "app_version": "3.4.0", "generation_mode": "txt2img", "cfg_scale": 7.5, "width": 512, "height": 640,
    "positive_prompt": "a cat", "negative_prompt": "a dog", "seed": 3, "rand_device": "cpu", "steps": 30,
    "scheduler": "dpmpp_2m_k", "clip_skip": 1, "vae": None, "loras": [], "cfg_rescale_multiplier": 0.2,
    "model": {"model_name": "stable-diffusion-v1-5", "base_model": "sd-1", "model_type": "main"},
}  # fmt: skip
V3_FIELDS = {
    "prompt": "a cat", "negative_prompt": "a dog", "steps": 30, "sampler": "dpmpp_2m", "schedule": "karras",
    "seed": 3, "width": 512, "height": 640, "clip_skip": 2, "cfg_scale": 7.5, "guidance_rescale": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {}),
        ({"scheduler": "dpmpp_2m"}, {"schedule": "normal"}),
        ({"scheduler": "kdpm_2_a"}, {"sampler": "dpm_2_a", "schedule": "normal"}),
        ({"scheduler": "dpmpp_2m_sde_k"}, {"sampler": "dpmpp_2m_sde", "brownian": True}),
        ({"scheduler": "dpmpp_2s_k"}, {"sampler": "dpmpp_2s_a"}),
        ({"scheduler": "euler_k"}, {"sampler": "euler"}),
        ({"scheduler": "ddim"}, {"sampler": "ddim", "schedule": None}),
        ({"scheduler": "pndm"}, {"sampler": "plms", "schedule": None}),
        ({"scheduler": "unipc", "clip_skip": 0}, {"sampler": "unipc", "schedule": None, "clip_skip": 1}),
        ({"seamless_x": True, "rand_device": "cuda"}, {"tiling": "x", "noise": "cuda"}),
        ({"generation_mode": "img2img", "init_image": "x.png", "strength": 0.7}, {"strength": 0.7}),
        ({"model": {"key": "1", "name": "stable-diffusion-v1-5", "base": "sd-1"}}, {}),
    ],
)
def test_pictures_of_invokeai(tmp_path, caplog, changes, fields):
    path = png(tmp_path / "i.png", invokeai_metadata=json.dumps(V3 | changes))
    origin = metadata.read_origin(path)
    assert origin.request == Request(**V3_FIELDS | fields)
    assert origin.model == "stable-diffusion-v1-5"
    assert not caplog.records


OLD = {
    "model": "stable diffusion", "model_weights": "stable-diffusion-1.5", "model_hash": "cc6c", "app_id": "invoke-ai",
    "app_version": "2.3.0", "image": {
        "prompt": [{"prompt": "a cat [a dog] on a mat [blurry]", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5,
        "threshold": 0, "perlin": 0, "height": 640, "width": 512, "seed": 3, "seamless": False, "hires_fix": False,
        "type": "txt2img", "postprocessing": None, "sampler": "k_lms", "variations": [],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {}),
        ({"sampler": "k_euler_a"}, {"sampler": "euler_a"}),
        ({"sampler": "k_dpm_2"}, {"sampler": "dpm_2", "schedule": "normal"}),
        ({"sampler": "k_dpmpp_2"}, {"sampler": "dpmpp_2m", "schedule": "normal"}),
        ({"sampler": "plms"}, {"sampler": "plms"}),
        ({"seamless": True, "prompt": "a cat [a dog, blurry] on a mat"}, {"tiling": "both"}),
        ({"type": "img2img", "strength": 0.4}, {"strength": 0.4}),
        ({"variations": [{"seed": 9, "weight": 0.1}]}, {"variation_seed": 9, "variation_strength": 0.1}),
    ],
)
def test_pictures_of_old_invokeai(tmp_path, caplog, changes, fields):
    path = png(tmp_path / "i.png", sd_metadata=json.dumps(OLD | {"image": OLD["image"] | changes}))
    expected = Request(
        "a cat on a mat",
        negative_prompt="a dog, blurry",
        steps=50,
        cfg_scale=7.5,
        sampler="lms",
        seed=3,
        width=512,
        height=640,
    )
    origin = metadata.read_origin(path)
    assert origin.request == Request(**{**vars(expected), **fields})
    assert origin.model == "stable-diffusion-1.5"
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"loras": [{"lora": {"model_name": "ink"}, "weight": 1}]}, "loras"),
        ({"hrf_enabled": True}, "hrf_enabled"),
        ({"positive_prompt": "a cat++"}, "weights of words"),
    ],
)
def test_what_invokeai_did_otherwise_is_told(tmp_path, caplog, changes, lost):
    metadata.read_request(png(tmp_path / "i.png", invokeai_metadata=json.dumps(V3 | changes)))
    [record] = caplog.records
    assert lost in record.message


# --- hostile ----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers() | st.just(10**400),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(), c, max_size=3),
    max_leaves=8,
)


def refused_or_read(path) -> None:
    try:
        metadata.read_origin(path)
    except (ImageError, RequestError) as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 3000


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["3", "4", "5", "6"]), st.data(), JSON)
def test_hostile_graphs(tmp_path_factory, name, data, value):
    graph = comfy()
    input_name = data.draw(st.sampled_from([*graph[name]["inputs"], "class_type", ""]))
    if input_name in graph[name]["inputs"]:
        graph[name]["inputs"][input_name] = value
    elif input_name:
        graph[name]["class_type"] = value
    else:
        graph[name] = value
    refused_or_read(png(tmp_path_factory.mktemp("i") / "i.png", prompt=json.dumps(graph)))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(V3)), st.sampled_from(sorted(OLD["image"])), JSON)
def test_hostile_invokeai(tmp_path_factory, name, old_name, value):
    folder = tmp_path_factory.mktemp("i")
    refused_or_read(png(folder / "i.png", invokeai_metadata=json.dumps(V3 | {name: value})))
    old = OLD | {"image": OLD["image"] | {old_name: value}}
    refused_or_read(png(folder / "i.png", sd_metadata=json.dumps(old)))


@given(st.text() | JSON.map(json.dumps), st.sampled_from(["request", "parameters", "prompt", "invokeai_metadata"]))
def test_hostile_chunks(tmp_path_factory, text, name):
    refused_or_read(png(tmp_path_factory.mktemp("i") / "i.png", **{name: text.encode("utf-8", "replace").decode()}))


@pytest.mark.parametrize("name", ["request", "prompt", "invokeai_metadata", "sd_metadata"])
@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "[" * 900 + "]" * 900, "1" * 5000, "NaN", "null", "{}", '{"3": 1e999}']
)
def test_broken_json_is_refused(tmp_path, name, text):
    with pytest.raises((ImageError, RequestError), match=r"^[^\n]*$"):
        metadata.read_request(png(tmp_path / "i.png", **{name: text}))


@pytest.mark.parametrize(
    "changes",
    [
        {"n3": {"latent_image": ["3", 0], "seed": ["3", 0]}},
        {"n3": {"latent_image": ["11", 0]}, "n11": {"class_type": "KSampler", "latent_image": ["3", 0]}},
        {"n3": {"positive": ["11", 0]}, "n11": {"conditioning": ["12", 0]}, "n12": {"conditioning": ["11", 0]}},
        {"n6": {"text": ["11", 0]}, "n11": {"text": ["12", 0]}, "n12": {"text": ["11", 0]}},
        {"n3": {"model": ["3", 0], "steps": ["nowhere", 0], "cfg": [["deep"], 0]}},
    ],
)
def test_graphs_in_circles(tmp_path, changes):
    refused_or_read(png(tmp_path / "i.png", prompt=json.dumps(comfy(**json.loads(json.dumps(changes))))))


def test_large_graphs_take_linear_time(tmp_path):
    count = 20_000
    latents = {f"n{i}": {"class_type": "KSampler", "latent_image": [str(i + 1), 0]} for i in range(100, count)}
    texts = {f"n{i}": {"class_type": "X", "a": [str(i + 1), 0]} for i in range(count, 2 * count)}
    graph = json.dumps(comfy(n3={"latent_image": ["100", 0], "positive": [str(count), 0]}, **latents, **texts))
    start = time.process_time()
    refused_or_read(png(tmp_path / "i.png", prompt=graph))
    assert time.process_time() - start < 4  # quadratic, it would be minutes


def test_foreign_files(tmp_path):
    path = tmp_path / "i.png"
    path.write_bytes(b"not a picture")
    with pytest.raises(ImageError, match="not a readable image"):
        metadata.read_request(path)
    with pytest.raises(ImageError, match="carries no request"):
        metadata.read_request(png(path))
    with pytest.raises(RequestError, match="prompt is 1"):
        metadata.read_request(png(path, request='{"prompt": 1}'))
    IMAGE.save(tmp_path / "i.jpg")
    with pytest.raises(ImageError, match="carries no request"):
        metadata.read_request(tmp_path / "i.jpg")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 255), st.integers(0, 50))
def test_mutated_pngs(tmp_path_factory, position, change, cut):
    """Checksums made right again, so that mutations reach the decoder."""
    folder = tmp_path_factory.mktemp("png")
    content = bytearray(save(folder / "i.png", Request("a")).read_bytes())
    content[8 + position % (len(content) - 8)] ^= change
    start = 8
    while start + 12 <= len(content):
        length = int.from_bytes(content[start : start + 4], "big")
        end = start + 8 + length
        if end + 4 > len(content):
            break
        content[end : end + 4] = zlib.crc32(content[start + 4 : end]).to_bytes(4, "big")
        start = end + 4
    (folder / "m.png").write_bytes(content[: len(content) - cut])
    refused_or_read(folder / "m.png")


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 2**16), change=st.integers(1, 255), cut=st.integers(0, 50))
def test_mutated_exif(tmp_path_factory, suffix, position, change, cut):
    folder = tmp_path_factory.mktemp("exif")
    content = bytearray(save(folder / f"i{suffix}", Request("a")).read_bytes())
    start = content.find(b"Exif" if suffix == ".jpg" else b"EXIF")
    content[start + position % 200] ^= change
    (folder / f"m{suffix}").write_bytes(content[: len(content) - cut])
    refused_or_read(folder / f"m{suffix}")


def test_commas_in_a_models_name_are_quoted():
    assert 'Model: "v1, Steps: 99"' in metadata.parameters(Request("a"), 25, "v1, Steps: 99")
