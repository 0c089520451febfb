"""A record as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_n.inspect.attention import Heads
from attn_n.inspect.moments import Distribution


def draw(attention: Mapping[str, Heads], activations: Mapping[str, Distribution], path: str | Path) -> None:
    """Write heat maps of what each head does, and above one another kurtosis and infinity norm of each module."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("attn_n.inspect: a picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(14, 9), dpi=120, layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    maps, curves = parts
    kinds = ("to_nothing", "weight to nothing"), ("first_token", "weight on the first token"), ("entropy", "entropy")
    for axes, (kind, title) in zip(maps.subplots(1, 3), kinds, strict=True):
        _heat_map(maps, axes, attention, kind, title)
    for axes, kind in zip(curves.subplots(2, 1, sharex=True), ("kurtosis", "infinity_norm"), strict=True):
        axes.plot([getattr(x, kind) for x in activations.values()], "o-", color="#0050a0", ms=4, lw=1)
        axes.set_ylabel(kind.replace("_", " "))
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        every = max(1, len(activations) // 60)
        axes.set_xticks(range(0, len(activations), every), list(activations)[::every], rotation=90, fontsize=7)
    figure.savefig(path)


def _heat_map(figure: Any, axes: Any, attention: Mapping[str, Heads], kind: str, title: str) -> None:
    most = max((len(heads.rows) for heads in attention.values()), default=1)
    rows = [[*getattr(heads, kind), *[math.nan] * (most - len(heads.rows))] for heads in attention.values()]
    image = axes.imshow(rows or [[0.0]], cmap="Blues", vmin=0.0, aspect="auto")
    axes.set(title=title, xlabel="head")
    every = max(1, len(rows) // 40)
    axes.set_yticks(range(0, len(rows), every), list(attention)[::every], fontsize=7)
    figure.colorbar(image, ax=axes)
