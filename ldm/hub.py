"""Public Stable Diffusion v1 models: where they are, what they must be, and downloading them."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import CheckpointError, LdmError, RequestError
from ldm.files import sha256


@dataclass(frozen=True)
class Model:
    """One file of a repository at one commit, and what it has to hold."""

    repo: str
    revision: str  # all 40 digits of the commit: neither the file nor the answer to "is it cached?" can change
    file: str
    sha256: str
    size: int  # bytes
    licence: str
    about: str


MODELS = {
    "sd-v1-5": Model(
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        file="v1-5-pruned-emaonly.safetensors",
        sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        size=4_265_146_304,
        licence="CreativeML OpenRAIL-M",
        about="Stable Diffusion v1.5, float32",
    ),
    "sd-v1-5-fp16": Model(
        repo="Comfy-Org/stable-diffusion-v1-5-archive",
        revision="9cfd069101959ca3828bf9c04a4419870832b74f",
        file="v1-5-pruned-emaonly-fp16.safetensors",
        sha256="e9476a13728cd75d8279f6ec8bad753a66a1957ca375a1464dc63b37db6e3916",
        size=2_132_696_762,
        licence="CreativeML OpenRAIL-M",
        about="Stable Diffusion v1.5, float16: half the download",
    ),
    "sd-v1-5-inpainting": Model(
        repo="stable-diffusion-v1-5/stable-diffusion-inpainting",
        revision="8a4288a76071f7280aedbdb3253bdb9e9d5d84bb",
        file="sd-v1-5-inpainting.ckpt",
        sha256="c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19",
        size=4_265_437_280,
        licence="CreativeML OpenRAIL-M",
        about="Stable Diffusion v1.5 for inpainting, 9 input channels",
    ),
    "sd-v1-4": Model(
        repo="CompVis/stable-diffusion-v-1-4-original",
        revision="f0bb45b49990512c454cf2c5670b0952ef2f9c71",
        file="sd-v1-4.ckpt",
        sha256="fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
        size=4_265_380_512,
        licence="CreativeML OpenRAIL-M",
        about="Stable Diffusion v1.4, the first release",
    ),
    "vae-ft-mse": Model(
        repo="stabilityai/sd-vae-ft-mse-original",
        revision="629b3ad3030ce36e15e70c5db7d91df0d60c627f",
        file="vae-ft-mse-840000-ema-pruned.safetensors",
        sha256="735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75",
        size=334_641_190,
        licence="MIT",
        about="a VAE with smoother faces, for --vae",
    ),
}


def download(name: str, folder: str | Path | None = None) -> Path:
    """The path of a model of the table, downloaded unless it is there, and its sha256 checked either way.

    It goes to Hugging Face's cache; or into `folder`, under its own name. A run that was killed or failed leaves a
    part file, where the next one goes on. The environment variables of huggingface_hub hold: HF_HOME, HF_ENDPOINT,
    HF_TOKEN, HF_HUB_OFFLINE and the others.
    """
    if name not in MODELS:
        raise RequestError(f"model {name!r} is unknown: use one of {', '.join(MODELS)}")
    model = MODELS[name]
    target = None if folder is None else Path(folder) / model.file
    if target is not None and target.exists():
        return _recognised(target, model)
    # Both are read when the library is imported. Without the first, it asks the hub for a list of AI agents, to report
    # which of them it runs under. With the second, old versions write pieces in any order, which cannot be resumed.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise LdmError("downloading needs huggingface_hub: run pip install -e '.[download]'") from None
    try:
        return _fetch(model, target)
    except LdmError:
        raise
    except Exception as error:  # whatever it is: the library lets those of requests, httpx or httpx2 pass, by version
        raise LdmError(_explain(error, model)) from error


def _fetch(model: Model, target: Path | None) -> Path:
    """The file in the hub's cache, or a file of its own at `target`; asked for only if the cache does not have it."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(model.repo, model.file, revision=model.revision)
    cached = _checked(Path(found), model) if isinstance(found, str) else None
    if target is not None:
        return _complete(model, target, target.with_name(f".{model.sha256}.part"), cached)
    if cached is not None:
        return cached
    # The layout of the cache is documented, and shared with other tools.
    repo = Path(constants.HF_HUB_CACHE) / f"models--{model.repo.replace('/', '--')}"
    blob = repo / "blobs" / model.sha256
    if blob.exists():  # from another commit, or a run that was killed between the two names
        _checked(blob, model)
    else:
        _complete(model, blob, blob.with_name(f"{model.sha256}.part"))
    return _link(blob, repo / "snapshots" / model.revision / model.file)


def _complete(model: Model, target: Path, part: Path, cached: Path | None = None) -> Path:
    """Fill the part file, from where it ends or from the cache's file; it takes the name `target` once it is right."""
    from filelock import FileLock, Timeout  # the hub's library depends on it

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = part.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=0):  # of the system, so that it ends with the process, however that ends
            try:
                if cached is not None:
                    shutil.copyfile(cached, part)
                else:
                    _request(model, part)
                _checked(part, model)
                part.replace(target)
                return target
            finally:
                with suppress(OSError):  # Windows removes it itself
                    lock.unlink()
    except Timeout:
        raise LdmError(f"{target}: another download of it is running: wait until it has ended") from None


def _request(model: Model, part: Path) -> None:
    """Append what the part file lacks. Not with hf_hub_download, because that removes what has come when it fails."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    size = part.stat().st_size if part.exists() else 0
    if size == model.size:
        return
    url = hf_hub_url(model.repo, model.file, revision=model.revision)
    answer = get_hf_file_metadata(url)  # first, because what another server sends must not get into the part file
    if (answer.commit_hash, answer.size) != (model.revision, model.size):
        what = f"{model.repo}/{model.file}"
        raise LdmError(f"{what}: {constants.ENDPOINT} has another file of that name, or is no hub: check HF_ENDPOINT")
    with part.open("ab" if size < model.size else "wb") as file:  # what is too long is nothing of the model
        http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=model.size)


def _link(blob: Path, snapshot: Path) -> Path:
    """Give the blob its name in the cache."""
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    snapshot.unlink(missing_ok=True)  # a link to a blob that is gone
    try:
        snapshot.symlink_to(os.path.relpath(blob, snapshot.parent))
    except FileExistsError:
        pass  # another run's, just now
    except OSError:  # Windows allows it to some users only; for the others, the hub's library too puts the file there
        blob.replace(snapshot)
    return snapshot


def _explain(error: Exception, model: Model) -> str:
    """A failure of the hub's library as one line that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.utils import OfflineModeIsEnabled

    what = f"{model.repo}/{model.file}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return f"{what}: not in the cache, and HF_HUB_OFFLINE forbids the network: unset it to download"
    if status in (401, 403):
        return (
            f"{what}: access refused ({status}): accept the licence at https://huggingface.co/{model.repo} if it asks "
            "for that, and set HF_TOKEN to a valid token, or unset it"
        )
    if status == 404:
        return f"{what}: not found at {constants.ENDPOINT} (404): moved, taken down, or not at this HF_ENDPOINT"
    if status is not None:
        return f"{what}: {constants.ENDPOINT} answered {status}: try again later"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{what}: the disk is full: free {format_size(model.size)}, or use another disk with HF_HOME or --to"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return (
        f"{what}: no download from {constants.ENDPOINT}: {reason} (check the network and HF_ENDPOINT, then run again)"
    )


def _checked(path: Path, model: Model) -> Path:
    """The path, if the file is what it has to be; else it is removed, so that the next run downloads it anew."""
    got = sha256(path)
    if got == model.sha256:
        return path
    while path.is_symlink():  # the cache's: from the snapshot to the blob, which may itself be one
        link, path = path, path.parent / path.readlink()
        link.unlink()
    path.unlink()
    raise CheckpointError(
        f"{model.repo}/{model.file}: sha256 is {got}, expected {model.sha256}; damaged, or HF_ENDPOINT has another "
        "file: removed, run again"
    )


def _recognised(path: Path, model: Model) -> Path:
    """The path, if the file is the model. Another file of that name is somebody's, so it stays."""
    got = sha256(path)
    if got != model.sha256:
        raise CheckpointError(
            f"{path} is there and another file: sha256 is {got}, expected {model.sha256}; move it, or use another "
            "folder"
        )
    return path


def format_size(size: int) -> str:
    """Bytes in the unit that downloads are measured in: "4.3 GB", "335 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
