"""Writing files and folders whole or not at all, and the checksum of a file."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_new(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then give it the name: the file appears whole, or not at all.

    Raises FileExistsError where the path is taken.
    """
    with staged_file(path) as temporary, temporary.open("wb") as file:
        write(file)


UNFINISHED = ".part"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system that tell no file, such as a full disk's, or a temporary one are told of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(error.filename).endswith(UNFINISHED)):
            error.filename = str(path)
        raise


@contextmanager
def staged_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """The path of a temporary file to fill; it takes the name `path` when the block ends without an error.

    At any moment there is the old file or the new one, whole. Raises FileExistsError where the path is taken, unless
    `overwrite`.
    """
    with naming(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=UNFINISHED)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
            if overwrite:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())  # so that not even a loss of power leaves neither
                temporary.replace(path)
            else:
                _link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path, names: str) -> None:
    """Remove what killed processes left of writing what has `names`, a pattern of glob's, in a folder.

    For those who know that nobody is writing there now.
    """
    for left in folder.glob(f".{names}.*{UNFINISHED}"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def staged_folder(path: Path, overwrite: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """As `staged_file`, for a folder. Raises FileExistsError where `path` is no empty folder, unless `overwrite`."""
    with naming(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=UNFINISHED))
        try:
            yield temporary
            temporary.chmod(mode & ~_umask())
            if overwrite and path.exists():
                _exchange(temporary, path)
            else:
                try:
                    temporary.rename(path)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                    raise _exists(path) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """With a folder, which is made if need be, its parents too. What was made goes again if the block fails."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it is not empty any more
                folder.rmdir()
        raise


def _exchange(first: Path, second: Path) -> None:
    """Swap two names in one step, where the system can: a folder with content cannot be renamed over."""
    names = os.fsencode(first), os.fsencode(second)
    swapped = False
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        swapped = libc.renameat2(here, names[0], here, names[1], exchange) == 0
    elif sys.platform == "darwin":
        swap = 2  # RENAME_SWAP
        swapped = ctypes.CDLL(None).renamex_np(*names, swap) == 0
    if not swapped:  # a file system that cannot: two steps, between which the old content has the longer name
        aside = first.with_suffix(".old")
        second.rename(aside)
        first.rename(second)
        aside.rename(first)


def _link(source: Path, target: Path) -> None:
    """Unlike a rename, fails where the name is taken. On file systems without links, a look before a rename must do."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        if target.exists():
            raise _exists(target) from None
        source.rename(target)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sha256(path: Path) -> str:
    """Of a whole file, with a bar on stderr, because a model takes seconds to minutes."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    total = path.stat().st_size
    with path.open("rb") as file, tqdm(total=total, desc="sha256", unit="B", unit_scale=True, leave=False) as bar:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
