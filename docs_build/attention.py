"""The picture of what n does to attention, and what it says, from the numbers of the demo."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.reporting import figures
from docs_build.blocks import ROOT, filled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#2b8fd9", "#009e73", "#e69f00", "#d55e00")  # of layers, on light and on dark pages
MEASURED = ROOT / "docs" / "measured" / "demo" / "results.json"


def findings() -> str:
    """The means over all heads, and the most of any head."""
    plain, offset = _runs()
    first = {name: _mean_and_most(run["first_token"]) for name, run in (("n = 0", plain), ("n = 1", offset))}
    return filled(
        f"With n = 1 a head gives {_mean_and_most(offset['to_nothing'])} of its attention to nothing. To the first"
        f" token it gives {first['n = 0']} with n = 0, and {first['n = 1']} with n = 1."
    )


def draw(theme: str) -> Figure:
    """Maps of the share of each head on the first token and on nothing, and lines of the latter by position."""
    from matplotlib.figure import Figure

    plain, offset = _runs()
    maps = {
        "first token, n = 0": plain["first_token"],
        "first token, n = 1": offset["first_token"],
        "nothing, n = 1": offset["to_nothing"],
    }
    most = max(np.max(shares) for shares in maps.values())
    with figures.style(theme):
        figure = Figure((9, 5.2), layout="constrained")
        figure.suptitle("Mean share of a head's attention that goes to ...")
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
        for axes, (title, shares) in zip(above.subplots(1, 3, sharey=True), maps.items(), strict=True):
            _map(axes, np.array(shares), most, title)
        _by_position(below.subplots(), np.array(offset["to_nothing_by_position"]))
    return figure


def _map(axes: Axes, shares: np.ndarray, most: float, title: str) -> None:
    """Draw a number for each head, `(layers, heads)`."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    for (layer, head), share in np.ndenumerate(shares):
        axes.text(
            head,
            layer,
            f"{100 * share:.1f} %",
            ha="center",
            va="center",
            color="white" if share > most / 2 else "black",
        )
    layers, heads = shares.shape
    axes.set(title=title, xticks=range(heads), yticks=range(layers), xlabel="head", ylabel="layer")
    axes.grid(False)
    axes.tick_params(length=0)


def _by_position(axes: Axes, shares: np.ndarray) -> None:
    """Draw a line for each head of shares `(layers, heads, positions)`, those of a layer in one colour."""
    layers, _, positions = shares.shape
    for layer in range(layers):
        lines = axes.plot(np.arange(1, positions + 1), shares[layer].T, color=_COLORS[layer % len(_COLORS)], lw=1.2)
        lines[0].set_label(f"layer {layer}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set(title="nothing, n = 1, by position: a line for each head", xlabel="keys that the row sees", ylim=(0, None))
    axes.legend(ncols=layers)


def _mean_and_most(shares: list[list[float]]) -> str:
    return f"{100 * np.mean(shares):.1f} % on average (at most {100 * np.max(shares):.1f} %)"


def _runs() -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(MEASURED.read_text())["runs"]
    return runs
