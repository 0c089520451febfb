"""The pictures of README.md and docs/: each for a light page and for a dark one. And the badges."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench.reporting import figures
from bench.reporting.record import Run
from docs_build import attention, measured
from docs_build.blocks import ROOT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = ROOT / "docs" / "pictures"
THEMES = ("light", "dark")
# Of a kind of results, the pictures that the documents show.
SHOWN = {
    "grid": ("overview", "speed", "best-peer", "cost-of-n"),
    "scaling": ("scaling",),
    "decode": ("decode",),
    "memory-host": ("memory",),
}


def draw() -> Iterator[Path]:
    """Draw every picture; yield the paths."""
    FOLDER.mkdir(exist_ok=True)
    project = (ROOT / "pyproject.toml").read_text()
    for label, key in {"licence": "license", "python": "requires-python"}.items():
        said = re.findall(f'^{key} = "(.*)"', project, re.MULTILINE)[0].replace(">=", "from ")
        path = FOLDER / f"{label}.svg"
        path.write_text(badge(label, said))
        yield path
    for kind, names in SHOWN.items():
        for theme in THEMES:
            yield from draw_run(measured.run(measured.newest(kind)), names, theme)
    for theme in THEMES:
        yield saved(attention.draw(theme), "attention", theme)


def draw_run(run: Run, names: tuple[str, ...], theme: str) -> Iterator[Path]:
    for name, _, figure in figures.pictures(run, theme):
        if name in names:
            yield saved(figure, name, theme)


def saved(figure: Figure, name: str, theme: str) -> Path:
    path = FOLDER / f"{name}-{theme}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def badge(label: str, said: str) -> str:
    """Return a badge as SVG: two fields, 6.6 pixels a letter."""
    left, right = (round(6.6 * len(text)) + 12 for text in (label, said))
    width = left + right
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img">
<title>{label}: {said}</title>
<clipPath id="round"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#round)"><rect width="{left}" height="20" fill="#555"/>
<rect x="{left}" width="{right}" height="20" fill="#0072b2"/></g>
<g fill="#fff" text-anchor="middle" font-family="Verdana, DejaVu Sans, sans-serif" font-size="11">
<text x="{left / 2}" y="14">{label}</text><text x="{left + right / 2}" y="14">{said}</text></g>
</svg>
"""
