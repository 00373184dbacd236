"""Which files may become examples: in a folder, and in WebDataset shards, whose files can be read in any order.

A shard is a plain tar archive. The files of one example differ only in what follows the first dot of their names
(github.com/webdataset/webdataset). Nothing is ever unpacked to disk, so no name in an archive can do harm; links and
the like are not followed.
"""

from __future__ import annotations

import glob
import io
import itertools
import logging
import math
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ldm.checkpoint.files import parse_json
from ldm.errors import CheckpointError, ImageError, RequestError, printable

log = logging.getLogger(__name__)

PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif")  # what the names of pictures end in
METADATA = "metadata.jsonl"
TEXTS = (".txt", ".caption")  # of captions beside pictures; the first that is there holds
CAPTION_KEYS = ("text", "caption")  # of JSON; the first that is there holds
MOST_CAPTION_BYTES = 1 << 20  # with whatever else a JSON file tells of a picture
NAMED = 5  # files in a message that could name thousands
MOST_SHARDS = 100_000  # that a pattern may stand for
MOST_HEADER_BYTES = 1 << 14  # of a long name or PAX records; a path has 4 kB at most


@dataclass(frozen=True)
class Span:
    """Some bytes of a file: a file of its own, or a member of a shard."""

    path: Path
    start: int
    length: int

    @contextmanager
    def open(self, most: int) -> Iterator[BinaryIO]:
        """As a file. Raises ImageError for more than `most` bytes, and where the file cannot be read."""
        if self.length > most:
            raise ImageError(f"has {self.length:,} bytes, more than the {most:,} that are allowed")
        try:
            with self.path.open("rb") as file:
                yield io.BufferedReader(_Window(file, self.start, self.length))
        except OSError as error:
            raise ImageError(f"cannot be read ({error.strerror or error})") from error


class _Window(io.RawIOBase):
    """Part of a file, read as if it were all of it."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = max(base + offset, 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.position)
        content = self.file.read(min(len(buffer), max(self.length - self.position, 0)))
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


@dataclass(frozen=True)
class Files:
    """The files that may become an example; in place of one that is of no use, why."""

    name: str
    picture: Span | str
    listed: str | None = None  # the caption, if it has been read already
    text: Span | str | None = None
    json: Span | str | None = None


# ----------------------------------------------------------------------------------------------------------- folders


def folder_files(root: Path) -> Iterator[Files]:
    """The pictures below a folder, by name, and after them those that a metadata.jsonl names but are not there.

    Hidden files are skipped; what else is left out is told. Raises RequestError for a line of metadata that cannot be
    read.
    """
    paths = {path.relative_to(root).as_posix(): path for path in sorted(_walk(root))}
    listed: dict[str, str] = {}
    for name, path in paths.items():
        if path.name == METADATA:
            listed |= read_metadata(path, os.path.dirname(name))
    others: Counter[str] = Counter()
    for name, path in paths.items():
        suffix = path.suffix.lower()
        if suffix[1:] in PICTURES:
            beside = (path.with_suffix(ending).relative_to(root).as_posix() for ending in TEXTS)
            texts = [_whole(paths[text]) for text in beside if text in paths]
            yield Files(name, _whole(path), listed.pop(name, None), texts[0] if texts else None)
        elif suffix not in TEXTS and path.name != METADATA:
            others[suffix] += 1
    for name in listed:
        yield Files(name, f"named in {METADATA}, but no picture that is there")
    _tell_others(str(root), others)


def _walk(root: Path) -> Iterator[Path]:
    """The files below a folder that are not hidden. Links to folders could lead in a circle, or anywhere."""
    left: list[str] = []

    def tell(error: OSError) -> None:
        left.append(f"{os.path.relpath(error.filename, root)} ({error.strerror})")

    for folder, subfolders, files in os.walk(root, onerror=tell):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        links = [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
        left += [f"{path.relative_to(root).as_posix()} (a link)" for path in links]
        yield from (Path(folder, name) for name in files if not name.startswith("."))
    if left:
        log.warning("%s: %d folders left out: %s", printable(str(root)), len(left), some(left))


def _whole(path: Path) -> Span | str:
    try:
        status = path.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return Span(path, 0, status.st_size) if stat.S_ISREG(status.st_mode) else "no plain file"


def _tell_others(source: str, others: Counter[str]) -> None:
    """others: how many files there are of each ending that is neither a picture's nor a caption's."""
    if others:
        kinds = [f"{number} {suffix or 'without an ending'}" for suffix, number in others.items()]
        log.warning("%s: left out, no pictures: %s", printable(source), some(kinds))


def read_metadata(path: Path, folder: str = "") -> dict[str, str]:
    """The captions of a metadata.jsonl by picture, whose names are relative to `folder`. Raises RequestError."""
    captions: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MOST_CAPTION_BYTES), b""), 1):
                _add_line(line, f"{path}, line {number}", folder, captions)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from error
    return captions


def _add_line(line: bytes, where: str, folder: str, captions: dict[str, str]) -> None:
    try:
        text = line.decode("utf-8-sig").strip()
        if not text:
            return
        content = parse_json(text, "the line")
        name, caption = content.get("file_name"), caption_in(content)
        if not isinstance(name, str):
            raise ImageError("it has no file_name")
        name = os.path.normpath(os.path.join(folder, name))
        if name in captions:
            raise ImageError("a line above tells of the same picture")
        captions[name] = caption
    except (UnicodeDecodeError, CheckpointError, ImageError) as error:
        raise RequestError(f'{where}: {error}; expected {{"file_name": "a.png", "text": "a caption"}}') from error


def caption_in(content: Mapping[str, Any]) -> str:
    """The caption in a JSON object, "" if there is none. Raises ImageError for one that is not text."""
    caption = next((content[key] for key in CAPTION_KEYS if content.get(key) is not None), "")
    try:
        caption.encode()  # JSON can spell half of a surrogate pair, which no tokenizer can read
    except (AttributeError, UnicodeEncodeError) as error:
        raise ImageError("its caption is not text") from error
    return str(caption).strip()


# ------------------------------------------------------------------------------------------------------------ shards


def shard_files(pattern: str) -> Iterator[Files]:
    """The examples of WebDataset shards, in their order; one more, which is broken, for each shard that is damaged.

    Raises RequestError where a shard is absent.
    """
    others: Counter[str] = Counter()
    for path in find_shards(pattern):
        shard = index_shard(path, {*PICTURES, "txt", "json"})
        others += shard.others
        yield from _examples(path, shard)
    _tell_others(pattern, others)


def _examples(path: Path, shard: Shard) -> Iterator[Files]:
    for key, sample in shard.samples.items():
        suffixes = [suffix for suffix in sample if suffix in PICTURES]
        if len(suffixes) == 1:
            yield Files(f"{path}/{key}.{suffixes[0]}", sample[suffixes[0]], None, sample.get("txt"), sample.get("json"))
        else:
            yield Files(f"{path}/{key}", f"{len(suffixes)} pictures of this name in the shard, expected one")
    if shard.fault:
        yield Files(str(path), shard.fault)


@dataclass
class Shard:
    """What is in a shard.

    samples: of each key, its files by what follows the key (lower case), or why a file is of no use. others: how many
    there are of each ending that is not wanted. fault: why the rest of the shard could not be read, if so.
    """

    samples: dict[str, dict[str, Span | str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    fault: str | None = None


def find_shards(pattern: str) -> list[Path]:
    """The archives that a path, a glob (*.tar) or a brace pattern ({000..009}.tar, {cats,dogs}.tar) stands for.

    Raises RequestError where one is absent.
    """
    found: dict[Path, None] = {}
    for name in [pattern] if os.path.isfile(pattern) else expand(pattern):
        paths = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name)))
        if not paths:
            raise RequestError(f"{printable(name)}: no such shard; give a path, *.tar or {{000..009}}.tar")
        found.update(dict.fromkeys(map(Path, paths)))
    return list(found)


def expand(pattern: str) -> list[str]:
    """The names that a pattern with {first..last} and {one,another} stands for, as in a shell, but not nested."""
    choices = [_choices(part) for part in re.split(r"(\{[^{}]*\})", pattern)]
    if math.prod(map(len, choices)) > MOST_SHARDS:
        raise RequestError(f"{printable(pattern)}: stands for more than {MOST_SHARDS:,} shards")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(part: str) -> Sequence[str]:
    if numbers := re.fullmatch(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}", part):
        first, last = numbers.groups()
        if not 0 <= int(last) - int(first) < MOST_SHARDS:
            raise RequestError(f"{part}: expected a first and a last number, at most {MOST_SHARDS:,} numbers")
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    return part[1:-1].split(",") if part.startswith("{") and "," in part else [part]


def index_shard(path: Path, wanted: Collection[str]) -> Shard:
    """Where the files lie whose names end in one of `wanted`, from the archive's headers alone. Never raises."""
    shard = Shard()
    try:
        with path.open("rb", buffering=0) as file:
            _index(file, path, wanted, shard)
    except Exception as error:  # tarfile raises anything for a damaged archive
        shard.fault = f"not a plain tar archive, damaged, or cut off ({error})"
    return shard


class _Headers(io.BufferedReader):
    """tarfile reads as much as an archive says that a name has, be it all of it, or less than nothing."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _index(raw: io.RawIOBase, path: Path, wanted: Collection[str], shard: Shard) -> None:
    end = path.stat().st_size
    file = _Headers(raw)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if member.size < 0:  # or tarfile would go back, for ever
                raise tarfile.ReadError(f"a file of {member.size} bytes")
            folder, slash, base = member.name.rpartition("/")
            key, _, suffix = base.partition(".")
            suffix = suffix.lower()
            if not key or member.isdir():
                continue
            if suffix not in wanted:
                shard.others[f".{suffix}" if suffix else ""] += 1
                continue
            sample = shard.samples.setdefault(folder + slash + key, {})
            sample[suffix] = "it is in the shard twice" if suffix in sample else _span(member, path, end)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes damage for the end
            raise tarfile.ReadError("no end mark")


def _span(member: tarfile.TarInfo, path: Path, end: int) -> Span | str:
    if not member.isreg() or member.issparse():
        return "a link or another thing that is not a plain file"
    if member.offset_data + member.size > end:
        return "the shard is cut off here"
    return Span(path, member.offset_data, member.size)


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(printable(name, 200) for name in names[:NAMED]) + more
