"""scripts/evaluate.py: pictures are those of the pipeline, measures those of their formulas, errors one line."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHIPPED
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torchmetrics.image import fid
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from ldm import Request, StableDiffusion
from ldm.errors import CheckpointError, RequestError
from ldm.train.data import open_examples
from ldm.train.evaluate import (
    ALL_KINDS,
    Judged,
    Setting,
    clip_score,
    frechet_distance,
    held_out,
    render,
    sheet,
    table,
    vae_fidelity,
)
from ldm.train.judge import Verdict
from ldm.train.shapes import draw_scene, split_of

SCRIPT = Path(__file__).parent.parent / "scripts" / "evaluate.py"
SETTING = Setting("ddim", 5, 3.0)


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.mark.parametrize(("sampler", "cfg_scale"), [("ddim", 4.0), ("dpmpp_2m", 1.0), ("euler_a", 7.5)])
def test_a_batch_of_prompts_has_the_pictures_of_each_alone(shipped, sampler, cfg_scale):
    prompts = "a red circle on a blue background", "a small yellow star on a green background"
    requests = [
        Request(prompt, sampler=sampler, steps=4, cfg_scale=cfg_scale, seed=seed) for seed, prompt in enumerate(prompts)
    ]
    for request, picture in zip(requests, render(shipped, requests), strict=True):
        [alone] = shipped.generate(request)
        difference = np.asarray(picture, dtype=int) - np.asarray(alone)
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_scenes_are_held_out(kind):
    assert {split_of(held_out(3, number, kind)) for number in range(20)} == {"unseen" if kind == "unseen" else "test"}


def test_new_shapes_are_asked_for_by_name():
    for number in range(5):
        moon, known = held_out(3, number, "moon"), held_out(3, number, "one")
        assert moon.things[0].shape == "moon" and "moon" in moon.caption()
        assert moon.with_shape(known.things[0].shape) == known


def judged(kind: str, *flags: bool | None) -> Judged:
    return Judged(SETTING, kind, "a very " * 30 + "long caption", 0, Verdict(*flags), Image.new("RGB", (64, 64)))


def test_the_table_counts_what_is_told():
    rows = [
        judged("one", True, True, True, True, None, None),
        judged("one", True, True, True, False, True, None),
        judged("one", True, False, True, True, False, None),
        judged("two", True, True, True, True, None, True),
    ]
    assert table(rows).splitlines()[2:] == [
        "| one | ddim | 5 | 3 | 3 | 33.3 | 100.0 | 66.7 | 100.0 | 66.7 | 50.0 | – |",
        "| two | ddim | 5 | 3 | 1 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | – | 100.0 |",
    ]


def test_the_sheet_frames_what_is_right_green():
    right, false = judged("one", *[True] * 6), judged("one", *[False] * 6)
    pixels = np.asarray(sheet([right, false]))
    assert pixels[0, pixels.shape[1] // 4].tolist() == [0, 128, 0]
    assert pixels[0, 3 * pixels.shape[1] // 4].tolist() == [255, 0, 0]
    assert sheet([right] * 1000).width < 2000  # a hundred of them


def test_evaluation_from_end_to_end(main, tmp_path, capsys):
    arguments = ["--prompts", "4", "--kinds", "one", "unseen", "--steps", "2", "3", "--sampler", "DDIM", "--device"]
    arguments += ["cpu", "--dtype", "float32", "--batch-size", "3", "--out", str(tmp_path / "new" / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "new" / "out" / "table.md").read_text(encoding="utf-8") == printed
    assert [line.split(" | ")[:5] for line in printed.splitlines()[2:]] == [
        [f"| {kind}", "ddim", str(steps), "2", "2"] for steps in (2, 3) for kind in ("one", "unseen")
    ]
    results = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert len(results) == 8
    assert {result["seed"] for result in results} == {0, 1}
    assert results[0]["caption"] == results[4]["caption"]
    assert Image.open(tmp_path / "new" / "out" / "sheet.png").format == "PNG"
    assert main(arguments) == 2  # nothing is replaced
    assert "give another --out" in capsys.readouterr().err


def ssim_of(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, in float64, over windows that lie within the picture."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    means = []
    for a, b in zip(np.moveaxis(x, -1, 0), np.moveaxis(y, -1, 0), strict=True):

        def blur(picture: np.ndarray) -> np.ndarray:
            return gaussian_filter(picture, 1.5, radius=5)[5:-5, 5:-5]

        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
        numerator = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
        means.append((numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())
    return float(np.mean(means))


def test_vae_fidelity_is_that_of_the_formulas(shipped):
    count, seed = 3, 5
    pairs = []
    for number in range(count):
        picture = draw_scene(seed, number, "test").draw(shipped.config.image_size)
        [decoded] = shipped.decode(shipped.encode(picture))
        pairs.append([np.asarray(each, dtype=np.float64) for each in (picture, decoded)])
    told = vae_fidelity(shipped, count, seed)
    psnr = np.mean([10 * np.log10(255**2 / ((x - y) ** 2).mean()) for x, y in pairs])
    assert told["PSNR"] == pytest.approx(psnr, rel=1e-5)
    assert told["SSIM"] == pytest.approx(np.mean([ssim_of(x, y) for x, y in pairs]), rel=1e-4)


@pytest.fixture
def clip_folder(tmp_path, shipped) -> Path:
    """A tiny CLIP model with random weights and the shipped model's tokenizer."""
    torch.manual_seed(8)  # cosines on both sides of 0
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer", local_files_only=True)
    text = {**size, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {**size, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures with captions."""
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        scene = draw_scene(0, number)
        scene.draw(48).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(scene.caption())
    return tmp_path / "pictures"


def test_clip_score_is_the_mean_cosine(clip_folder, folder):
    examples = open_examples(str(folder))
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    cosines = []
    for index in range(len(examples)):
        inputs = processor(text=[examples[index].caption], images=[examples[index].image], return_tensors="pt")
        seen = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
        read = model.text_projection(model.text_model(inputs["input_ids"]).pooler_output)
        a, b = (features[0].double().numpy() for features in (seen, read))
        cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    assert min(cosines) < -0.01 and max(cosines) > 0.01
    told, count = clip_score(examples, clip_folder, torch.device("cpu"))
    assert told == pytest.approx(100 * np.maximum(cosines, 0).mean(), rel=1e-4)
    assert count == 3


def cut(*pictures: Path) -> None:
    """Leave a picture its header and little else."""
    for picture in pictures:
        picture.write_bytes(picture.read_bytes()[:60])


def test_broken_pictures_have_no_part_in_scores(main, clip_folder, folder, capsys, caplog):
    arguments = ["--images", str(folder), "--clip", str(clip_folder), "--device", "cpu"]
    cut(folder / "1.png")
    assert main(arguments) == 0
    assert re.fullmatch(r"CLIP score [0-9]+\.[0-9]{2}, n = 2\n", capsys.readouterr().out)
    assert "1.png: " in caplog.text and "takes its place" not in caplog.text
    cut(*folder.glob("*.png"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith(f"evaluate: {folder}: 3 of 3 pictures are broken and left out: 0.png (") and not printed.out


def changed(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


CLIP_DAMAGES = {
    "junk": lambda folder: (folder / "model.safetensors").write_bytes(b"junk" * 100),
    "cut off": lambda folder: os.truncate(folder / "model.safetensors", 9000),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "another width": lambda folder: changed(folder, projection_dim=8),
    "config of BERT": lambda folder: (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 32}'),
    "a tensor less": without_a_tensor,
    "pictures of another size": lambda folder: [
        path.write_text(re.sub(r'"(height|width|shortest_edge)": 32', r'"\1": 48', path.read_text()))
        for path in folder.glob("*processor*")
    ],
    "processor is a list": lambda folder: [path.write_text("[]") for path in folder.glob("*processor*")],
}


@pytest.mark.parametrize("damage", CLIP_DAMAGES.values(), ids=CLIP_DAMAGES)
def test_a_damaged_clip_is_an_error_in_a_line(clip_folder, folder, capfd, damage):
    damage(clip_folder)
    capfd.readouterr()
    with pytest.raises(CheckpointError) as error:
        clip_score(open_examples(str(folder)), clip_folder, torch.device("cpu"))
    assert str(error.value).startswith(f"{clip_folder}: not a folder of a CLIP model and its processor (")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # transformers would tell, in a table


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "file: File exists"),
        ("file/below", "file/below: Not a directory"),
        ("/proc/x", "/proc/x: "),
        ("/proc", "/proc: no file can be made there ("),
    ],
)
def test_where_results_go_is_tried_first(main, tmp_path, monkeypatch, capsys, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(StableDiffusion, "load", lambda *_, **__: pytest.fail("it loads a model"))
    assert main(["--out", out]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"evaluate: {message}") and error.count("\n") == 1


def test_a_failure_leaves_no_folder(main, tmp_path):
    assert main(["--out", str(tmp_path / "new" / "out"), "--model", "nowhere"]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kinds", "four"], 2, "kinds are four: use some of one, two"),
        (["--clip", "x"], 2, "--clip is for --images: leave it out"),
        (["--vae", "--out", "x"], 2, "--out is for pictures of shapes, not --vae: leave it out"),
        (["--images", "x", "--cfg-scale", "3"], 2, "--cfg-scale is for pictures of shapes, not --images: leave it out"),
        (["--lora", "absent.safetensors"], 1, "absent.safetensors: no such file"),
        (["--prompts", "3"], 2, "prompts is 3: use 5 or more"),
        (["--prompts", "none"], 2, "use a whole number from 1"),
        (["--sampler", "dimm"], 2, "nearest is ddim"),
        (["--steps", "0"], 2, "steps is 0"),
        (["--model", "nowhere"], 1, "nowhere"),
        (["--vae", "--model", "nowhere"], 1, "nowhere"),
        (["--images", "."], 2, "--images needs --reference, --clip or both"),
        (["--images", ".", "--reference", "."], 2, "--reference needs --inception"),
        (["--images", "{folder}", "--reference", "{folder}", "--inception", "no.pth"], 1, "no.pth: no such file"),
        (["--images", "{folder}", "--clip", "{folder}"], 1, "not a folder of a CLIP model"),
        (["--images", "nowhere", "--clip", "."], 2, "no such folder"),
    ],
)
def test_errors_are_one_line(main, folder, capsys, arguments, code, message):
    assert main([argument.format(folder=folder) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


class MeanColour(torch.nn.Module):
    """Stands in for Inception: three features of pictures of 0 to 255."""

    num_features = 3

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        assert pictures.dtype == torch.uint8
        return pictures.double().mean(dim=(2, 3))


def test_fid_is_that_of_the_formula(tmp_path, monkeypatch):
    """Heusel et al. 2017, equation 6, of the means and covariances of two sets of mean colours."""
    sets = []
    for name, seed in (("made", 1), ("real", 2)):
        (tmp_path / name).mkdir()
        pictures = [draw_scene(seed, number).draw(32) for number in range(7)]
        for number, picture in enumerate(pictures):
            picture.save(tmp_path / name / f"{number}.png")
        sets.append(np.array([np.asarray(picture, dtype=float).mean(axis=(0, 1)) for picture in pictures]))
    means, covariances = zip(*((features.mean(axis=0), np.cov(features.T)) for features in sets), strict=True)
    root = sqrtm(covariances[0] @ covariances[1])
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    (tmp_path / "weights.pth").touch()
    monkeypatch.setattr(fid, "FrechetInceptionDistance", lambda **_: FrechetInceptionDistance(feature=MeanColour()))
    made, real = (open_examples(str(tmp_path / name), caption="") for name in ("made", "real"))
    told, *counts = frechet_distance(made, real, tmp_path / "weights.pth", torch.device("cpu"))
    assert told == pytest.approx(expected.real, rel=1e-3)
    assert counts == [7, 7]
    cut(*(tmp_path / "real" / f"{number}.png" for number in range(6)))
    with pytest.raises(RequestError, match=r"two whole pictures .*/made: 7 pictures; .*/real: 6 of 7 pictures"):
        frechet_distance(made, real, tmp_path / "weights.pth", torch.device("cpu"))


def test_damaged_weights_of_inception_are_an_error_in_a_line(folder, tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"junk")

    def load(feature_extractor_weights_path):
        torch.load(feature_extractor_weights_path)

    monkeypatch.setattr(fid, "FrechetInceptionDistance", load)
    examples = open_examples(str(folder))
    with pytest.raises(CheckpointError, match=r"weights.pth: not the weights of Inception \(") as error:
        frechet_distance(examples, examples, tmp_path / "weights.pth", torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_fid_without_its_package_says_what_to_install(main, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    (tmp_path / "weights.pth").touch()
    code = main(["--images", str(folder), "--reference", str(folder), "--inception", str(tmp_path / "weights.pth")])
    assert (code, "pip install -e '.[evaluate]' torch-fidelity" in capsys.readouterr().err) == (2, True)


def test_clip_scores_without_transformers_say_what_to_install(main, folder, clip_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code = main(["--images", str(folder), "--clip", str(clip_folder)])
    assert (code, "needs transformers: pip install -e '.[evaluate]'" in capsys.readouterr().err) == (2, True)
