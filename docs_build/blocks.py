"""Generated parts of Markdown documents, between two comments that a reader does not see."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Makers = Mapping[str, Callable[[], str]]


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(text: str, makers: Makers) -> str:
    """Return `text` with every block made anew; a block that nobody makes is a KeyError with its name."""
    return _BLOCK.sub(lambda block: f"{block[1]}{makers[block[2]]()}\n{block[3]}", text)


def names(text: str) -> list[str]:
    return [block[2] for block in _BLOCK.finditer(text)]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def filled(text: str) -> str:
    """Return a paragraph in lines of 120, which break no "n = 1" and no number from its unit."""
    kept = re.sub(r"n = |(?<=\d) (?=%|us\b)", lambda found: found[0].replace(" ", "\0"), text)
    return textwrap.fill(kept, 120).replace("\0", " ")
