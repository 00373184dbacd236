"""What an inpainting model learns to paint: rectangles and strokes by chance, and now and then everything."""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

WHOLE = 0.1  # how often everything is to be painted, which keeps text to image alive
MOST_PARTS = 4


def random_mask(size: tuple[int, int], random: Random) -> Tensor:
    """(width, height) → (1, height, width): 1 where the model is to paint, 0 where it sees the picture."""
    width, height = size
    mask = Image.new("L", size, 255 if random.random() < WHOLE else 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(random.randint(1, MOST_PARTS)):
        points = [(random.uniform(0, width), random.uniform(0, height)) for _ in range(random.randint(2, 5))]
        if random.random() < 0.5:
            (left, right), (top, bottom) = (sorted(ends) for ends in zip(*points[:2], strict=True))
            draw.rectangle((left, top, right, bottom), fill=255)
        else:
            draw.line(points, fill=255, width=round(random.uniform(0.05, 0.25) * min(size)), joint="curve")
    return torch.from_numpy(np.array(mask, dtype=np.float32) / 255)[None]
