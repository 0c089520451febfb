"""Draws where the heads of two models look, one with n = 0 and one with n > 0, and their losses."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from demo.train import Run

# The curves often coincide: a thin one over a wide one shows both. Colour-blind readers tell these colours apart.
STYLES = ("#f0a05a", 4.0), ("#0050a0", 1.3)


def draw(plain: Run, offset: Run, path: Path) -> None:
    """Writes the PNG `path` from the run with n = 0 and the one with n > 0; white, also on a dark page."""
    figure = Figure(figsize=(11, 8.4), dpi=130, layout="constrained", facecolor="white")
    above, middle, below = figure.subfigures(3, 1, height_ratios=(1, 0.25, 1.05))
    maps = {
        f"on the first token, n = {plain.n:g}": plain.first_token,
        f"on the first token, n = {offset.n:g}": offset.first_token,
        f"on nothing, n = {offset.n:g}": offset.to_nothing,
    }
    above.suptitle("Share of its attention that each head puts ... (mean over rows of held-out text)")
    largest = max(np.max(shares) for shares in maps.values())
    for axes, (title, shares) in zip(above.subplots(1, 3), maps.items(), strict=True):
        draw_map(axes, 100 * np.array(shares), 100 * largest, title)
    draw_excerpt(middle.subplots(), offset)
    left, right = below.subplots(1, 2)
    draw_positions(left, offset)
    draw_losses(right, [plain, offset])
    figure.savefig(path)


def draw_map(axes: Axes, percent: np.ndarray, largest: float, title: str) -> None:
    """Draws a number for each head, `(layers, heads)`."""
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=largest, aspect="auto")
    for (layer, head), value in np.ndenumerate(percent):
        colour = "white" if value > largest / 2 else "black"
        axes.text(head, layer, f"{value:.1f} %", ha="center", va="center", color=colour)
    layers, heads = percent.shape
    axes.set(title=title, xticks=range(heads), yticks=range(layers), xlabel="head", ylabel="layer")
    axes.tick_params(length=0)


def draw_excerpt(axes: Axes, run: Run) -> None:
    """Draws some text, and behind each byte what its row puts on nothing in the head that does so most."""
    layer, head = np.unravel_index(np.argmax(run.to_nothing), np.shape(run.to_nothing))
    percent = 100 * np.array(run.to_nothing_in_excerpt)[layer, head]
    axes.imshow(percent[None], cmap="Blues", vmin=0, aspect="auto")
    for place, (byte, value) in enumerate(zip(run.excerpt, percent, strict=True)):
        colour = "white" if value > percent.max() / 2 else "black"
        shown = byte if byte.isprintable() else "\u21b5"
        axes.text(place, 0, shown, ha="center", va="center", color=colour, family="monospace", size=9)
    axes.set(
        title=f"Where layer {layer}, head {head} attends to nothing: 0 % (white) to {percent.max():.0f} % (darkest)"
    )
    axes.set(xticks=[], yticks=[])


def draw_positions(axes: Axes, run: Run) -> None:
    """Draws a line for each head; those of a layer have one colour. Later positions are put together, as they vary."""
    layers = 100 * np.array(run.to_nothing_by_position)
    keys = np.arange(1, layers.shape[-1] + 1)
    starts = np.unique(np.geomspace(1, keys.size, 24).astype(int)[:-1]) - 1
    counts = np.diff([*starts, keys.size])
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for layer, (heads, colour) in enumerate(zip(layers, colours, strict=True)):
        for head, shares in enumerate(heads):
            label = f"layer {layer}" if head == 0 else None
            means = (np.add.reduceat(values, starts) / counts for values in (keys, shares))
            axes.plot(*means, color=colour, lw=1.2, label=label)
    axes.set(
        title=f"Share on nothing by position, a line for each head, n = {run.n:g}",
        xlabel="keys that a row sees (logarithmic axis)",
        ylabel="% of a row's attention",
        xscale="log",
        ylim=(0, None),
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_losses(axes: Axes, runs: list[Run]) -> None:
    for run, (colour, width) in zip(runs, STYLES, strict=True):
        steps, losses = zip(*run.held_out_loss, strict=True)
        axes.plot(steps, losses, "o-", color=colour, lw=width, ms=3 + width, label=f"n = {run.n:g}")
    axes.set(
        title="Loss on held-out text (same initial weights, same batches)",
        xlabel="training step",
        ylabel="nats per byte (logarithmic axis)",
        yscale="log",
        yticks=[1, 1.5, 2, 3, 4, 5, 6],
    )
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
