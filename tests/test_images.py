from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import images
from ldm.errors import ImageError


def test_tensors_round_trip_exactly():
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    x = images.to_tensor(Image.fromarray(pixels))
    assert x.shape == (1, 3, 16, 16)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert np.array_equal(np.asarray(images.to_image(x[0])), pixels)


def test_values_outside_are_clamped():
    image = images.to_image(torch.tensor([-5.0, 0.0, 5.0]).view(3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_transparency_is_laid_over_white():
    assert images.load_image(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert images.load_image(Image.new("RGBA", (2, 2), (255, 0, 0, 255))).getpixel((0, 0)) == (255, 0, 0)
    assert images.load_image(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled():
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [images.load_image(image).getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert images.load_image(tmp_path / "turned.jpg").size == (2, 4)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"i.{suffix}"
    Image.new("RGB", (8, 8), "red").save(path)
    red, green, blue = images.load_image(str(path)).getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 16


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\x00" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_hostile_files(tmp_path, content):
    path = tmp_path / "i.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="not a readable image"):
        images.load_image(path)


def test_truncated_absent_and_enormous(tmp_path):
    path = tmp_path / "i.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ImageError, match="not a readable image"):
        images.load_image(path)
    with pytest.raises(ImageError, match="no such image"):
        images.load_image(tmp_path / "absent.png")
    with pytest.raises(ImageError):
        images.load_image(tmp_path)
    Image.new("1", (20_000, 6_000)).save(path)
    with pytest.raises(ImageError, match="exceeds limit of 89478485 pixels"):
        images.load_image(path)


def test_enormous_objects_and_pixels_without_a_range():
    with pytest.raises(ImageError, match="32 bits"):
        images.load_image(Image.new("F", (2, 2), 0.5))
    with pytest.raises(ImageError, match="32 bits"):
        images.load_image(Image.new("I", (2, 2), 70_000))


@pytest.mark.parametrize(("count", "size"), [(1, (4, 6)), (2, (8, 6)), (3, (8, 12)), (4, (8, 12)), (5, (12, 12))])
def test_grid(count, size):
    tiles = [Image.new("RGB", (4, 6), (i + 1, 0, 0)) for i in range(count)]
    sheet = images.grid(tiles)
    assert sheet.size == size
    columns = size[0] // 4
    assert [sheet.getpixel((i % columns * 4, i // columns * 6))[0] for i in range(count)] == list(range(1, count + 1))


def ink(image: Image.Image) -> np.ndarray:
    """Where a contact sheet is not white."""
    return (np.asarray(image) < 250).any(-1)


def spans(ink: np.ndarray) -> list[tuple[int, int]]:
    """First and last place of each unbroken run of what is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], ink.astype(int), [0]])))
    return [(int(a), int(b) - 1) for a, b in edges.reshape(-1, 2)]


def test_a_contact_sheet_is_a_table_of_its_pictures():
    colours = [(i * 40, 10, 20) for i in range(6)]
    sheet = images.contact_sheet([Image.new("RGB", (100, 80), c) for c in colours], ["a", "b", "c"], ["d", "e"])
    left, top = sheet.width - 300, sheet.height - 160
    assert 0 < left < 30
    assert 0 < top < 30
    for i, colour in enumerate(colours):
        x, y = left + i % 3 * 100, top + i // 3 * 80
        assert sheet.crop((x, y, x + 100, y + 80)).getcolors() == [(8000, colour)]
    for i in range(3):  # a label in the middle above each column
        [(start, end), *more] = spans(ink(sheet)[:top, left + i * 100 : left + (i + 1) * 100].any(0))
        assert not more
        assert abs((start + end) / 2 - 49.5) <= 2
    assert len(spans(ink(sheet)[top:, :left].any(1))) == 2  # and one beside each row
    assert not ink(sheet)[:top, :left].any()


def test_without_labels_a_contact_sheet_is_pictures_alone():
    tiles = [Image.new("RGB", (30, 40), (i, 0, 0)) for i in range(4)]
    assert images.contact_sheet(tiles, ["", ""], ["", ""]).tobytes() == images.grid(tiles).tobytes()


def test_smaller_pictures_are_centred():
    tiles = [Image.new("RGB", size, "black") for size in [(100, 60), (40, 80), (50, 100), (20, 30)]]
    sheet = ink(images.contact_sheet(tiles, ["", ""], ["", ""]))
    assert sheet.shape == (180, 140)
    expected = np.zeros_like(sheet)
    for left, top, (width, height) in [
        (0, 10, (100, 60)), (100, 0, (40, 80)), (25, 80, (50, 100)), (110, 115, (20, 30))
    ]:  # fmt: skip
        expected[top : top + height, left : left + width] = True
    assert np.array_equal(sheet, expected)


def test_a_column_is_wide_enough_for_its_label_and_a_long_label_is_shortened():
    tile = Image.new("RGB", (16, 64), "black")
    short = images.contact_sheet([tile], ["i" * 8], [""])
    full = images.contact_sheet([tile], ["sampler=DPM++ 2M SDE Heun"], [""])
    long = images.contact_sheet([tile], ["W" * 1_000_000], ["\x00\n" * 1000])
    assert short.width < full.width < long.width < 1000
    drawn = np.flatnonzero(ink(full)[: full.height - 64].any(0))
    assert drawn[0] >= 2
    assert drawn[-1] < full.width - 2
    assert drawn[-1] - drawn[0] > 150  # all of it is there, at 14 pixels


def test_letters_grow_with_the_pictures():
    heights = []
    for side in (64, 512, 1024, 4096):
        sheet = images.contact_sheet([Image.new("RGB", (side, 100), "black")], ["H"], [""])
        rows = np.flatnonzero(ink(sheet)[: sheet.height - 100].any(1))
        heights.append(rows[-1] - rows[0] + 1)
    assert heights[0] >= 9
    assert heights == sorted(heights)
    assert heights[1] > heights[0]
    assert heights[3] < 60


def test_transparent_parts_take_the_background():
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert images.load_image(image, background="black").getpixel((0, 0)) == (0, 0, 0)
