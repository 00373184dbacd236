"""What to do when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from ldm.errors import is_out_of_memory

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def first_that_fits(plans: Mapping[str, Callable[..., Result]]) -> Callable[..., Result]:
    """Run the first plan; when it runs out of memory, warn once and use the next, from then on.

    Plans are functions that compute the same, by name, the fastest first. The last one's error is raised.
    """
    remaining = dict(plans)

    def run(*args: object) -> Result:
        while True:
            name, plan = next(iter(remaining.items()))
            try:
                return plan(*args)
            except (RuntimeError, MemoryError) as error:
                if len(remaining) == 1 or not is_out_of_memory(error):
                    raise
                del remaining[name]
            torch.cuda.empty_cache()
            log.warning("out of memory: %s does not fit, going on with %s", name, next(iter(remaining)))

    return run
