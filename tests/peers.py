"""k-diffusion as a peer to compare with: its samplers alone, because the rest of it imports what has no place here."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

STANDINS = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def _import() -> tuple[ModuleType, ModuleType]:
    spec = find_spec("k_diffusion")
    assert spec is not None and spec.origin is not None, "pip install --no-deps k-diffusion==0.1.1.post1"
    package = ModuleType("k_diffusion")
    package.__path__ = [str(Path(spec.origin).parent)]  # so that its __init__, which imports all of it, is not run
    added = {name: ModuleType(name) for name in STANDINS if name not in sys.modules}
    for name, module in added.items():
        parent, _, leaf = name.rpartition(".")
        if parent in added:
            setattr(added[parent], leaf, module)
    sys.modules |= added | {"k_diffusion": package}
    try:
        return importlib.import_module("k_diffusion.sampling"), importlib.import_module("k_diffusion.external")
    finally:
        for name in added:
            del sys.modules[name]


k_sampling, k_external = _import()
