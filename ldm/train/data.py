"""What training learns from, and in which order: captioned pictures, the batches of every step, and their sizes.

Broken pictures are found as early as is cheap, left out, counted and named: one in a million ends no run.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

from ldm.checkpoint.files import parse_json
from ldm.errors import CheckpointError, ImageError, RequestError, printable
from ldm.images import FORMATS, load_image, open_header
from ldm.train.shapes import LAYOUTS, SIDES, Scene, draw_scene
from ldm.train.shards import (
    METADATA,
    MOST_CAPTION_BYTES,
    PICTURES,
    Files,
    Span,
    caption_in,
    folder_files,
    shard_files,
    some,
)

log = logging.getLogger(__name__)

MOST_PICTURE_BYTES = 256 << 20  # what Pillow's limit of 89 megapixels has at most, uncompressed

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Example:
    """An RGB picture, upright, its caption, and what messages call it."""

    image: Image.Image
    caption: str
    name: str


class Examples(Protocol):
    """Captioned pictures in a fixed order. `broken` tells of each that was found to be broken why."""

    @property
    def broken(self) -> Mapping[str, str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Raises ImageError where the picture is broken, which `load_example` gets over."""

    def size(self, index: int) -> Size:
        """(width, height) of the picture, upright, without decoding it."""

    def name(self, index: int) -> str: ...

    def caption(self, index: int) -> str: ...

    def version(self, index: int) -> object:
        """What differs, in its repr, where the picture does: its name, and when its file was written."""

    def summary(self) -> str:
        """One line: how many there are, which are broken."""


def open_examples(
    source: str,
    *,
    seed: int = 0,
    kinds: Sequence[str] = (),
    count: int | None = None,
    side: int = 128,
    caption: str | None = None,
) -> Examples:
    """The pictures and captions of a source. Raises RequestError where there are none, or none that is whole.

    source: "shapes", the world of ldm.train.shapes, of which the seed's first `count` scenes are drawn, of `kinds` in
    turn, side×side pixels (these four arguments are of use for nothing else); or a folder, with all below it; or
    WebDataset shards, as a path, a glob (*.tar) or a brace pattern ({000..009}.tar).

    A caption is in a line {"file_name": ..., "text": ...} of a metadata.jsonl in the picture's folder or one above it,
    or else in NAME.txt or NAME.caption beside the picture; in shards in KEY.txt, or else in KEY.json under
    "text" or "caption". `caption` is for pictures that have none, or an empty one; without it they are an error. Hidden
    files are skipped.
    """
    if source == "shapes":
        return Shapes(seed, count, side, kinds)
    if count is not None:
        raise RequestError(f"{printable(source)}: count is for shapes only; a source on disk has as many as it has")
    if os.path.isdir(source):
        return Pictures(source, folder_files(Path(source)), caption)
    if ".tar" in source:
        return Pictures(source, shard_files(source), caption)
    raise RequestError(f"{printable(source)}: no such folder; give shapes, a folder of pictures, or shards (*.tar)")


def load_example(examples: Examples, index: int) -> Example:
    """Example `index`, or in place of one whose picture is broken the next that is whole, with its own caption.

    Raises RequestError where all are broken.
    """
    return find_whole(examples, index)[1]


def find_whole(examples: Examples, index: int) -> tuple[int, Example]:
    """`load_example`'s example, with its own number before it."""
    for step in range(len(examples)):
        number = (index + step) % len(examples)
        try:
            return number, examples[number]
        except ImageError:
            continue  # it has been logged and counted
    raise RequestError(examples.summary())


class Shapes:
    """Scenes 0 … count - 1 of the shapes world's training split; those of `kinds`, in turn, if there are any."""

    def __init__(self, seed: int, count: int | None, side: int, kinds: Sequence[str] = ()):
        if count is None or count < 1 or side not in SIDES:
            raise RequestError(
                f"shapes: expected a count of scenes (1 or more) and a side of {SIDES[0]} to {SIDES[-1]} pixels, "
                f"got {count} and {side}"
            )
        if unknown := [kind for kind in kinds if kind not in LAYOUTS]:
            raise RequestError(f"shapes: {unknown[0]!r:.50} is no kind of scene: use one of {', '.join(LAYOUTS)}")
        self.seed, self.count, self.side, self.kinds = seed, count, side, kinds
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return Example(self._scene(index).draw(self.side), self.caption(index), self.name(index))

    def size(self, index: int) -> Size:
        return self.side, self.side

    def name(self, index: int) -> str:
        return f"shapes {index}"

    def caption(self, index: int) -> str:
        return self._scene(index).caption(Random(f"{self.seed} {index}"))

    def version(self, index: int) -> object:
        return self.seed, index, *self._kind(index)

    def _scene(self, index: int) -> Scene:
        return draw_scene(self.seed, range(self.count)[index], "train", *self._kind(index))

    def _kind(self, index: int) -> Sequence[str]:
        return [self.kinds[index % len(self.kinds)]] if self.kinds else []

    def summary(self) -> str:
        return f"{self.count:,} scenes of the shapes world"


# ------------------------------------------------------------------------------------------------- pictures on disk


@dataclass(frozen=True)
class Item:
    """A picture whose header has been read, and its caption."""

    name: str
    picture: Span
    size: Size
    caption: str


class Pictures:
    """Pictures in files. All headers and captions are read at the start; what is broken is left out and told."""

    def __init__(self, source: str, found: Iterable[Files], caption: str | None = None):
        self.source, self.broken = printable(source), dict[str, str]()
        self.items: list[Item] = []
        for files in found:
            try:
                self.items.append(_item(files, caption))
            except ImageError as error:
                self.broken[files.name] = str(error)
        self.found = len(self.items) + len(self.broken)
        if not self.items:
            raise RequestError(self.summary())
        if bare := [item.name for item in self.items if not item.caption and caption is None]:
            raise RequestError(
                f"{self.source}: {len(bare):,} of {self.found:,} pictures have no caption ({some(bare)}): add them "
                f"(NAME.txt, or a line in {METADATA}), or give one caption for all that have none"
            )
        log.log(logging.WARNING if self.broken else logging.INFO, "%s", self.summary())

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        item = self.items[index]
        try:
            with item.picture.open(MOST_PICTURE_BYTES) as file:
                return Example(_decoded(_open(file)), item.caption, item.name)
        except ImageError as error:
            message = f"{printable(item.name)}: {error}"
            if item.name not in self.broken:
                log.warning("%s; left out", message)
                self.broken[item.name] = str(error)
            raise ImageError(message) from error

    def size(self, index: int) -> Size:
        return self.items[index].size

    def name(self, index: int) -> str:
        return self.items[index].name

    def caption(self, index: int) -> str:
        return self.items[index].caption

    def version(self, index: int) -> object:
        item = self.items[index]
        return item.name, item.picture.start, item.picture.length, item.picture.path.stat().st_mtime_ns

    def summary(self) -> str:
        if not self.found:
            return f"{self.source}: no pictures in it (.{', .'.join(PICTURES)})"
        if not self.broken:
            return f"{self.source}: {self.found:,} pictures"
        reasons = some([f"{printable(name)} ({reason})" for name, reason in self.broken.items()])
        return f"{self.source}: {len(self.broken):,} of {self.found:,} pictures are broken and left out: {reasons}"


def _item(files: Files, default: str | None) -> Item:
    """Raises ImageError with the bare reason, without the name."""
    picture = _usable(files.picture)
    with picture.open(MOST_PICTURE_BYTES) as file:
        size = _upright_size(_open(file))
    caption = files.listed
    if not caption and files.text is not None:
        caption = _text(files.text)
    if not caption and files.json is not None:
        try:
            caption = caption_in(parse_json(_text(files.json), "the JSON beside it"))
        except CheckpointError as error:
            raise ImageError(str(error)) from error
    return Item(files.name, picture, size, caption or default or "")


def _usable(span: Span | str) -> Span:
    if isinstance(span, str):
        raise ImageError(span)
    return span


def _text(span: Span | str) -> str:
    with _usable(span).open(MOST_CAPTION_BYTES) as file:
        try:
            return file.read().decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ImageError("its caption is not text in UTF-8") from error


def _open(file: BinaryIO) -> Image.Image:
    """A picture of which no more than the header has been read. Raises ImageError."""
    try:
        return open_header(file)
    except UnidentifiedImageError as error:
        raise ImageError(f"not a readable image; use one of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders of damaged files raise anything
        raise ImageError(f"not a readable image ({printable(str(error))})") from error


def _upright_size(header: Image.Image) -> Size:
    """The size that `load_image` will give a picture. Raises ImageError."""
    try:
        exif = Image.Image.getexif(header)  # PNG's own would decode it all
    except Exception as error:  # as above
        raise ImageError(f"not a readable image ({printable(str(error))})") from error
    # Some versions of Pillow turn the size of a TIFF as soon as it is opened.
    size = (exif[Tag.ImageWidth], exif[Tag.ImageLength]) if header.format == "TIFF" else header.size
    return size[::-1] if exif.get(Tag.Orientation) in (5, 6, 7, 8) else size


def _decoded(picture: Image.Image) -> Image.Image:
    try:
        return load_image(picture)
    except ImageError as error:
        raise ImageError(str(error).removeprefix("the image: ")) from error


# ------------------------------------------------------------------------------------------------------------- order


class Batches:
    """The indices of each step's global batch: a pure function of the seed and the step, endless.

    Every epoch is a random order of its own, and batches follow it across the ends of epochs, so that each example
    comes exactly once an epoch. With `buckets` (of each example, the number of its bucket) every `group` in a row are
    of one bucket; a bucket's last group of an epoch is filled up from the bucket's first of that epoch, so that an
    example may come twice, and more often only in a bucket smaller than a group.
    """

    def __init__(
        self,
        examples_count: int,
        batch_size: int,
        seed: int,
        buckets: Sequence[int] | None = None,
        group: int | None = None,
    ):
        """group: what goes through the networks at once, a part of batch_size; all of it if None."""
        group = 1 if buckets is None else group or batch_size
        whole = buckets is None or len(buckets) == examples_count
        if examples_count < 1 or batch_size < 1 or batch_size % group or not whole:
            raise RequestError(
                f"expected 1 or more examples, each with its bucket if any has, and a batch size of 1 or more groups, "
                f"got {examples_count}, {len(buckets) if buckets is not None else 'no'} buckets, {batch_size} and "
                f"{group}"
            )
        self.count, self.batch_size, self.seed, self.group = examples_count, batch_size, seed, group
        self.buckets = [0] * examples_count if buckets is None else buckets
        self.groups_per_epoch = sum(-(-n // group) for n in Counter(self.buckets).values())

    def __getitem__(self, step: int) -> list[int]:
        if step < 0:
            raise IndexError(f"step {step}: the first is 0")
        number = self.batch_size // self.group
        places = (divmod(step * number + i, self.groups_per_epoch) for i in range(number))
        return [index for epoch, place in places for index in _groups(self, epoch)[place]]


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def _groups(batches: Batches, epoch: int) -> list[list[int]]:
    order = list(range(batches.count))
    Random(f"{batches.seed} {epoch}").shuffle(order)
    members = defaultdict(list)
    for index in order:
        members[batches.buckets[index]].append(index)
    size, groups = batches.group, []
    for bucket in members.values():
        filled = bucket + [bucket[i % len(bucket)] for i in range(-len(bucket) % size)]
        groups += [filled[i : i + size] for i in range(0, len(filled), size)]
    if len(members) > 1:
        Random(f"{batches.seed} {epoch} batches").shuffle(groups)
    return groups


# ------------------------------------------------------------------------------------------------------------- sizes


def bucket_sizes(area_side: int, multiple: int = 64, least: int | None = None, most: int | None = None) -> list[Size]:
    """The sizes (width, height) of aspect-ratio buckets: for each width the greatest height, and the other way round.

    Sides are multiples of `multiple`, from `least` to `most` (half and twice area_side if not given); areas are at most
    area_side². As NovelAI's (github.com/NovelAI/novelai-aspect-ratio-bucketing). Raises RequestError if there are none.
    """
    least, most = area_side // 2 if least is None else least, area_side * 2 if most is None else most
    if min(area_side, multiple, least) < 1:
        raise RequestError(f"expected buckets of positive sides, got {area_side}, {multiple} and {least}")
    sizes = set()
    for width in range(-(-least // multiple) * multiple, most + 1, multiple):
        height = min(area_side**2 // width, most) // multiple * multiple
        if height >= least:
            sizes |= {(width, height), (height, width)}
    if not sizes:
        raise RequestError(
            f"no size has sides from {least} to {most}, multiples of {multiple}, and at most {area_side}² pixels"
        )
    return sorted(sizes)


def assign(sizes: Sequence[Size], buckets: Sequence[Size]) -> list[int]:
    """Of each size the number of the bucket whose aspect ratio is nearest, by the logarithm."""
    ratios = np.array([math.log(width / height) for width, height in buckets])
    order = np.argsort(ratios, kind="stable")
    middles = (ratios[order][1:] + ratios[order][:-1]) / 2
    wanted = np.log(np.array([width / height for width, height in sizes]))
    return [int(bucket) for bucket in order[np.searchsorted(middles, wanted)]]


def fit(image: Image.Image, size: Size, random_crop: Random | None = None, flip: bool = False) -> Image.Image:
    """An image that covers `size` (width, height), its aspect kept: what sticks out is cut off, evenly or by chance.

    It is cut between pixels, so that one of the right height or width keeps its pixels as they are.
    """
    shrink = min(whole / wanted for whole, wanted in zip(image.size, size, strict=True))
    width, height = (max(1, round(wanted * shrink)) for wanted in size)
    right, down = (random_crop.random(), random_crop.random()) if random_crop else (0.5, 0.5)
    left, top = round(right * (image.width - width)), round(down * (image.height - height))
    cut = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)
    return ImageOps.mirror(cut) if flip else cut
