"""The failures a caller may want to catch. Each message is one line for a person: what, got, allowed, what to do."""

from __future__ import annotations

from collections.abc import Sequence


class LdmError(Exception):
    """Base of every error this package raises on purpose."""


class RequestError(LdmError, ValueError):
    """A request asks for something that does not exist: a wrong size, an unknown sampler, a strength of 1.5."""


class CheckpointError(LdmError):
    """A model file is damaged, incomplete, or of a kind that is not supported; `details` may list every fault."""

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = details


class ImageError(LdmError):
    """A picture is absent, damaged or too large."""


class NumericalError(LdmError):
    """The networks produced NaN or infinity where a picture was expected."""


def printable(text: str, most: int = 100) -> str:
    """Text out of a file, which may hold anything, for a message: without control characters, and not too long."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= most else f"{shown[:most]}…"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or torch, on any device, means that memory ran out. torch's differ in type."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY)


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "invalid buffer size")
