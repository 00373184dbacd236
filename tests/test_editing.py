"""The picture side of inpainting, against naive loops over pixels and properties that hold exactly."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from ldm import editing
from ldm.errors import ImageError, RequestError
from ldm.request import FILLS


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rectangle(size: tuple[int, int], *box: int) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


# Masks


def test_a_mask_is_luminance_at_the_size_of_the_picture(tmp_path):
    picture = Image.new("RGB", (4, 4))
    picture.paste((255, 255, 255), (2, 0, 4, 4))
    picture.save(tmp_path / "mask.png")
    mask = editing.load_mask(tmp_path / "mask.png", (4, 4))
    assert (mask.mode, mask.size) == ("L", (4, 4))
    assert np.array_equal(np.asarray(mask), [[0, 0, 255, 255]] * 4)
    assert editing.load_mask(picture, (64, 48)).size == (64, 48)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, 77),
        ("1", 1, 255),
        ("LA", (255, 0), 0),
        ("LA", (255, 255), 255),
        ("RGBA", (255, 255, 255, 100), 100),
        ("RGBA", (255, 255, 255, 0), 0),
        ("RGB", (255, 0, 0), 76),  # 0.299 · 255
    ],
)
def test_transparent_parts_of_a_mask_are_black(mode, colour, expected):
    source = Image.new(mode, (2, 1), colour)
    source.putpixel((1, 0), (255,) * len(mode) if mode != "1" and mode != "L" else 255)
    mask = editing.load_mask(source, (2, 1))
    assert (mask.getpixel((0, 0)), mask.getpixel((1, 0))) == (expected, 255)


def test_stretching_a_mask_leaves_black_what_is_far_from_white():
    mask = np.asarray(editing.load_mask(rectangle((64, 64), 32, 0, 64, 64), (200, 80)))
    assert not mask[:, :97].any()
    assert (mask[:, 103:] == 255).all()


def test_faults_of_masks_are_told(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "text.png", tmp_path / "absent.png"):
        with pytest.raises(ImageError):
            editing.load_mask(path, (8, 8))
    for black in (Image.new("L", (8, 8)), Image.new("RGBA", (8, 8), (255, 255, 255, 0))):
        with pytest.raises(RequestError, match="nothing would be painted"):
            editing.load_mask(black, (8, 8))
    with pytest.raises(RequestError, match="mask_blur is 200"):
        editing.soften(rectangle((256, 256), 100, 100, 101, 101), 200)


@pytest.mark.parametrize("blur", [1, 4, 16])
def test_a_softened_edge_follows_the_gaussian(blur):
    """A straight edge blurred is the normal distribution; Pillow's three box blurs are within 1.5% of it."""
    mask = editing.soften(rectangle((256, 4), 128, 0, 256, 4), blur)
    distance = (torch.arange(256) - 127.5) / blur
    expected = torch.special.ndtr(distance.double())
    assert (torch.tensor(np.asarray(mask)[0] / 255) - expected).abs().max() < 0.015


def test_a_blur_of_nothing_changes_nothing():
    mask = rectangle((32, 32), 3, 5, 20, 30)
    assert editing.soften(mask, 0).tobytes() == mask.tobytes()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (80, 48), (8, 8), (8192, 64)])
def test_a_latent_mask_is_the_mean_of_each_square(width, height):
    mask = noise(width, height).convert("L")
    actual = editing.latent_mask(mask, (height // 8, width // 8))
    squares = np.asarray(mask, dtype=np.float64).reshape(height // 8, 8, width // 8, 8)
    assert (actual.shape, actual.dtype) == ((1, 1, height // 8, width // 8), torch.float32)
    assert np.abs(actual[0, 0].numpy() - squares.mean((1, 3)) / 255).max() < 1e-6


def test_latent_masks_are_exactly_one_and_zero_away_from_the_edge():
    mask = editing.latent_mask(rectangle((64, 64), 16, 16, 48, 44), (8, 8))[0, 0]
    assert mask[2:5, 2:6].eq(1).all()
    assert mask[5, 2:6].eq(0.5).all()
    assert mask.sum() == 14


# What is under a mask


def naive_fill(image: Image.Image, mask: Image.Image) -> np.ndarray:
    """The formula in floating point: premultiplied colours blurred, each laid over the ones before."""
    alpha = 1 - np.asarray(mask, dtype=np.float64) / 255
    colours = np.asarray(image, dtype=np.float64)
    result = np.broadcast_to((colours * alpha[..., None]).sum((0, 1)) / alpha.sum(), colours.shape)
    opacity = np.zeros_like(alpha)
    for radius, times in [(256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)]:
        spread = true_blur(alpha, radius)
        blurred = np.stack([true_blur(colours[..., c] * alpha, radius) for c in range(3)], -1)
        blurred = blurred / np.maximum(spread, 1e-12)[..., None]
        for _ in range(times):
            below = opacity * (1 - spread)
            opacity = spread + below
            share = (spread / np.maximum(opacity, 1e-12))[..., None]
            result = share * blurred + (1 - share) * result
    return result


def true_blur(values: np.ndarray, radius: float) -> np.ndarray:
    if radius == 0:
        return values
    reach = int(4 * radius)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / radius) ** 2)
    for _ in range(2):  # along one axis, then along the other
        padded = np.pad(values, ((reach, reach), (0, 0)), mode="edge")
        values = np.apply_along_axis(np.convolve, 0, padded, kernel / kernel.sum(), mode="valid").T
    return values


@pytest.mark.parametrize("blur", [0, 4])
def test_fill_follows_its_formula(blur):
    image = noise(6, 4).resize((96, 64), Image.Resampling.BICUBIC)
    mask = editing.soften(rectangle((96, 64), 30, 10, 70, 50), blur)
    difference = np.asarray(editing.fill(image, mask, "blur")) - naive_fill(image, mask)
    assert np.abs(difference).mean() < 1
    assert np.abs(difference).max() < 8  # boxes for a Gaussian, 8 bits of premultiplied colours


@pytest.mark.parametrize("colour", [(255, 255, 255), (10, 200, 90), (1, 2, 3)])
def test_fill_keeps_what_is_not_masked_and_lets_nothing_through(colour):
    image = Image.new("RGB", (64, 64), colour)
    image.paste((255, 0, 255), (16, 16, 48, 48))
    filled = np.asarray(editing.fill(image, rectangle((64, 64), 16, 16, 48, 48), "blur")).astype(int)
    assert np.abs(filled - np.array(colour)).max() <= 8
    outside = np.ones((64, 64), bool)
    outside[16:48, 16:48] = False
    assert (filled[outside] == colour).all()


def test_fill_where_nothing_reaches():
    picture = noise(64, 64)
    assert editing.fill(picture, Image.new("L", (64, 64), 255), "blur").tobytes() == picture.tobytes()
    wide = Image.new("RGB", (4000, 16), (200, 100, 50))
    middle = editing.fill(wide, rectangle(wide.size, 16, 0, 3984, 16), "blur").getpixel((2000, 8))
    assert middle == (200, 100, 50)


@pytest.mark.parametrize("mode", sorted(set(FILLS) - {"blur"}))
def test_other_fills_leave_the_picture_as_it_is(mode):
    picture = noise(32, 32)
    assert editing.fill(picture, rectangle((32, 32), 0, 0, 9, 9), mode).tobytes() == picture.tobytes()


# The part to paint


@st.composite
def masks(draw) -> Image.Image:
    width, height = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return rectangle((width, height), left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


SIDES = st.integers(1, 128).map(lambda n: 8 * n)


@given(masks(), SIDES, SIDES, st.integers(0, 300))
def test_a_crop_region_lies_inside_and_holds_the_mask(mask, width, height, padding):
    left, top, right, bottom = editing.crop_region(mask, (width, height), padding)
    assert 0 <= left < right <= mask.width
    assert 0 <= top < bottom <= mask.height
    inner = mask.getbbox()
    assert left <= max(inner[0] - padding, 0)
    assert top <= max(inner[1] - padding, 0)
    assert right >= min(inner[2] + padding, mask.width)
    assert bottom >= min(inner[3] + padding, mask.height)


@given(masks(), SIDES, SIDES, st.integers(0, 300))
def test_a_crop_region_has_the_wanted_shape_where_the_picture_allows(mask, width, height, padding):
    left, top, right, bottom = editing.crop_region(mask, (width, height), padding)
    wide, high = right - left, bottom - top
    fits = abs(wide * height - high * width) < max(width, height)  # less than a pixel off
    assert fits or wide == mask.width or high == mask.height


@pytest.mark.parametrize(
    ("box", "size", "padding", "expected"),
    [
        ((100, 100, 228, 132), (512, 512), 0, (100, 52, 228, 180)),  # 128×32 grows to 128×128 about its middle
        ((100, 0, 228, 32), (512, 512), 0, (100, 0, 228, 128)),  # at the top edge: downwards
        ((100, 224, 228, 256), (512, 512), 0, (100, 128, 228, 256)),  # at the bottom edge: upwards
        ((100, 100, 132, 132), (512, 256), 8, (68, 92, 164, 140)),  # padded first
        ((0, 0, 256, 256), (512, 256), 32, (0, 0, 256, 256)),  # all of it cannot be wider
        ((10, 10, 246, 12), (256, 512), 0, (10, 0, 246, 256)),  # higher than the picture: all its height
    ],
)
def test_crop_regions(box, size, padding, expected):
    assert editing.crop_region(rectangle((256, 256), *box), size, padding) == expected


def test_no_crop_region_without_a_mask():
    with pytest.raises(RequestError, match="black all over"):
        editing.crop_region(Image.new("L", (8, 8)), (8, 8), 0)


# Pasting


def naive_paste(original: Image.Image, painted: Image.Image, mask: Image.Image) -> np.ndarray:
    result = np.zeros((original.height, original.width, 3))
    for y in range(original.height):
        for x in range(original.width):
            share = mask.getpixel((x, y)) / 255
            for c in range(3):
                a, b = original.getpixel((x, y))[c], painted.getpixel((x, y))[c]
                result[y, x, c] = a + share * (b - a)
    return result


def test_paste_blends_by_the_mask():
    original, painted = noise(40, 30, 1), noise(40, 30, 2)
    mask = editing.soften(rectangle((40, 30), 12, 8, 30, 22), 3)
    pasted = np.asarray(editing.paste(original, painted, mask)).astype(float)
    assert np.abs(pasted - naive_paste(original, painted, mask)).max() <= 0.51


@given(masks(), st.integers(0, 8), SIDES, SIDES, st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_paste_keeps_every_pixel_that_is_not_masked(mask, blur, width, height, padding):
    mask = mask.filter(ImageFilter.GaussianBlur(blur))
    if mask.getbbox() is None:
        return
    original, painted = noise(*mask.size, 1), Image.new("RGB", (width, height), (1, 255, 1))
    box = editing.crop_region(mask, (width, height), padding)
    before = original.tobytes()
    for place in (None, box):
        pasted = np.asarray(editing.paste(original, painted, mask, place))
        soft = np.asarray(mask)
        assert np.array_equal(pasted[soft == 0], np.asarray(original)[soft == 0])
        assert (pasted[soft == 255] == (1, 255, 1)).all()
    assert original.tobytes() == before


def test_what_was_cut_out_goes_back_to_its_place():
    original = noise(64, 48)
    mask = rectangle((64, 48), 20, 10, 40, 30)
    box = editing.crop_region(mask, (32, 32), 4)
    assert editing.paste(original, original.crop(box), mask, box).tobytes() == original.tobytes()


# Outpainting


@given(*[st.sampled_from([0, 8, 16, 64])] * 4, st.integers(8, 60), st.integers(8, 60))
@settings(max_examples=50, deadline=None)
def test_an_extended_picture_keeps_the_old_one_and_paints_the_new_area(left, right, top, bottom, width, height):
    image = noise(width, height)
    canvas, mask = editing.extend(image, left, right, top, bottom)
    assert canvas.size == mask.size == (left + width + right, top + height + bottom)
    inner = (left, top, left + width, top + height)
    assert canvas.crop(inner).tobytes() == image.tobytes()
    painted = np.asarray(mask) == 255
    across, down = min(8, width // 4), min(8, height // 4)
    expected = np.ones_like(painted)
    expected[
        top + down * (top > 0) : top + height - down * (bottom > 0),
        left + across * (left > 0) : left + width - across * (right > 0),
    ] = False
    assert np.array_equal(painted, expected)
    assert set(mask.tobytes()) <= {0, 255}


def test_the_new_area_has_the_colours_of_the_edge_it_extends():
    image = Image.new("RGB", (64, 64), (200, 0, 0))
    image.paste((0, 0, 200), (32, 0, 64, 64))
    canvas, _ = editing.extend(image, left=64, right=64, bottom=8)
    assert canvas.getpixel((0, 0)) == canvas.getpixel((40, 71)) == (200, 0, 0)
    assert canvas.getpixel((191, 40)) == canvas.getpixel((160, 71)) == (0, 0, 200)


def test_nothing_to_extend_is_nothing_to_paint():
    image = noise(24, 16)
    canvas, mask = editing.extend(image)
    assert canvas.tobytes() == image.tobytes()
    assert mask.getbbox() is None


def test_large_pictures_take_seconds():
    image = noise(8192, 64)
    mask = rectangle(image.size, 4000, 0, 4200, 64)
    start = time.perf_counter()
    soft = editing.soften(mask, 256)
    filled = editing.fill(image, soft, "blur")
    box = editing.crop_region(soft, (512, 512), 1024)
    editing.paste(image, filled.crop(box), soft, box)
    editing.latent_mask(soft, (8, 1024))
    editing.extend(image, 0, 0, 512, 512)
    assert time.perf_counter() - start < 20
