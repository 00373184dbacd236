"""Modules import only from floors below them, and importing them costs nothing that is not used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"ldm.config", "ldm.errors", "ldm.files"},
    {"ldm.models", "ldm.diffusion", "ldm.images", "ldm.prompt"},
    {"ldm.runtime"},
    {"ldm.checkpoint", "ldm.hub", "ldm.request", "ldm.editing"},
    {"ldm.adapters", "ldm.preview", "ldm.conditioning"},
    {"ldm.canvas", "ldm.codec", "ldm.sampling", "ldm.trajectory", "ldm.metadata"},
    {"ldm.engine"},
    {"ldm.pipeline"},
    {"ldm.train"},
    {"ldm.cli"},
    {"ldm.__main__"},
]
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "ldm").rglob("*.py"))


def unit_of(module: str) -> str:
    """`ldm.models.unet` → `ldm.models`: what floors are made of."""
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    """Every module of ours that a file names in an import, wherever in the file it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("ldm.")}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path):
    unit = unit_of(".".join(path.with_suffix("").parts))
    if unit == "ldm.__init__":
        return  # the public face names everything, lazily
    for name in imports(ROOT / path):
        target = unit_of(name)
        if target != unit and target != "ldm.__version__":
            assert FLOOR[target] < FLOOR[unit], f"{path} imports {name}, which is not below it"


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[1] == "models"], ids=str)
def test_networks_share_only_layers_and_tokenizer(path):
    siblings = {name.split(".")[2] for name in imports(ROOT / path) if name.startswith("ldm.models.")}
    assert siblings <= {"layers", "tokenizer"}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ldm; ldm.Request(prompt='')", {"torch", "numpy", "transformers", "PIL"}),
        ("import ldm.cli; ldm.cli.main(['txt2img', '--help'])", {"torch", "numpy", "transformers", "PIL"}),
        ("import ldm.diffusion", {"torch", "numpy"}),
        ("import ldm; ldm.StableDiffusion.load(device='cpu')", {"transformers", "torch._dynamo", "sympy"}),
    ],
)
def test_heavy_imports_wait(statement, absent):
    assert not modules_after(statement) & absent


def test_lazy_names_are_those_promised():
    import ldm

    for name in ldm.__all__:
        assert getattr(ldm, name) is not None
    with pytest.raises(AttributeError):
        ldm.no_such_name  # noqa: B018
