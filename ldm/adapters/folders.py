"""Which file a LoRA's name in a prompt stands for. A name is compared with what is there, never made into a path."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from ldm.errors import RequestError

SUFFIXES = {".safetensors", ".pt", ".ckpt", ".bin"}


def find_loras(names: Iterable[str], folders: Sequence[Path], loaded: Collection[str] = ()) -> dict[str, Path]:
    """The file of each name that is not loaded already: the one with that stem, anywhere below one of the folders.

    Raises RequestError for a name that no file has, or that two have.
    """
    wanted = [name for name in dict.fromkeys(names) if name not in loaded]
    files = _listing(folders) if wanted else {}
    for name in wanted:
        if name not in files:
            looked = ", ".join(map(str, folders)) or "no folder: give one with --lora-dir (lora_folders)"
            folded = {known.casefold(): known for known in (*files, *loaded)}
            near = [folded[match] for match in get_close_matches(name[:100].casefold(), folded, n=3)]
            hint = f"; there is {' and '.join(near)}" if near else ""
            raise RequestError(f"no LoRA is called {name!r:.100}: looked in {looked}{hint}")
        if len(files[name]) > 1:
            raise RequestError(f"{' and '.join(map(str, files[name][:2]))} are both called {name!r}: rename one")
    return {name: files[name][0] for name in wanted}


def _listing(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """The files that may be LoRAs, by stem."""
    files: dict[str, list[Path]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RequestError(f"{folder}: no such folder to look for LoRAs in")
        for here, _, names in os.walk(folder):
            for path in (Path(here, name) for name in sorted(names)):
                if path.suffix.lower() in SUFFIXES and path not in files.setdefault(path.stem, []):
                    files[path.stem].append(path)
    return files
