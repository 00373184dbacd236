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
