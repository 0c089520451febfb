"""The direction of the imports: from the public functions down to the description of a call, and never back."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The layers from the lowest up. A layer may import those before it, and its own modules.
LAYERS = (
    ("version", "compilation", "recent"),
    ("call",),
    ("launcher",),
    ("cache",),
    ("sink",),
    ("backends",),
    ("autograd",),
    ("dispatch",),
    ("functional", "inference", "merge", "softmax"),
    ("compat", "distributed"),
    ("nn", "inspect", "testing", "integrations"),
    ("__init__",),
    ("doctor",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "attn_n").rglob("*.py"))
}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(module: str) -> Iterator[str]:
    """The modules of attn_n that a module imports, at its top or in its functions, by a statement or by name."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (str(x.value) for x in node.args if isinstance(x, ast.Constant) and x.value in MODULES)


def test_every_module_has_a_layer() -> None:
    assert {layer(module) for module in MODULES} == RANK.keys()


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upward(module: str) -> None:
    upward = [other for other in imported(module) if RANK[layer(other)] > RANK[layer(module)]]
    assert upward == []


def test_there_is_no_circle() -> None:
    graph = {module: set(imported(module)) - {module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_link_at_the_top() -> None:
    link = ROOT / "backends"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "attn_n" / "backends"
