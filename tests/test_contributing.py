"""What CONTRIBUTING.md names exists."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted(set(re.findall(r"`([\w./]+)`", (ROOT / "CONTRIBUTING.md").read_text())))
PATHS = [name for name in NAMES if "/" in name or name.endswith((".py", ".md"))]
OBJECTS = [name for name in NAMES if name not in PATHS and re.fullmatch(r"\w+(\.\w+)+", name)]


@pytest.mark.parametrize("path", PATHS)
def test_paths(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", OBJECTS)
def test_modules_and_functions(name: str) -> None:
    pytest.importorskip("triton")  # which some of the modules import
    package, _, rest = name.partition(".")
    if package == "integrations":
        pytest.importorskip(rest.partition(".")[0])
    pkgutil.resolve_name(name if package in ("bench", "tests", "torch") else f"attn_n.{name}")


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
