"""Draws the losses of both runs, and how much of its attention each head gives to nothing."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from demo.train import Run

# The curves often coincide: a thin one over a wide one shows both. Colour-blind readers tell these colours apart.
STYLES = ("#f0a05a", 4.0), ("#0050a0", 1.3)


def draw(plain: Run, offset: Run, path: Path) -> None:
    """Writes the PNG `path` from the run with n = 0 and the one with n > 0."""
    figure = Figure(figsize=(12.5, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(7, 5))
    draw_losses(left, [plain, offset])
    draw_shares(figure, right, offset)
    figure.savefig(path)


def draw_losses(axes: Axes, runs: list[Run]) -> None:
    for run, (colour, width) in zip(runs, STYLES, strict=True):
        steps, losses = zip(*run.held_out_loss, strict=True)
        axes.plot(steps, losses, "o-", color=colour, lw=width, ms=3 + width, label=f"n = {run.n:g}, held out")
        span = max(1, len(run.train_loss) // 25)
        means = np.convolve(run.train_loss, np.full(span, 1 / span), mode="valid")
        ends = np.arange(span, len(run.train_loss) + 1)
        axes.plot(ends, means, color=colour, lw=width, alpha=0.5, label=f"n = {run.n:g}, train (mean of {span} steps)")
    axes.set(
        title="Loss of a byte-level GPT (same initial weights, same batches)",
        xlabel="step",
        ylabel="loss (nats per byte, logarithmic axis)",
        yscale="log",
        yticks=[1, 1.5, 2, 3, 4, 5, 6],
    )
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_shares(figure: Figure, axes: Axes, run: Run) -> None:
    percent = 100 * np.array(run.share_to_nothing)
    image = axes.imshow(percent, cmap="Blues", vmin=0)
    for (layer, head), value in np.ndenumerate(percent):
        colour = "white" if value > percent.max() / 2 else "black"
        axes.text(head, layer, f"{value:.1f} %", ha="center", va="center", color=colour)
    layers, heads = percent.shape
    formula = r"$n\,/\,(n + \Sigma_j\, e^{s_{ij}})$"
    axes.set(
        title=f"Attention that each head gives to nothing, n = {run.n:g}",
        xticks=range(heads),
        yticks=range(layers),
        ylabel="layer",
        xlabel=f"head\n\nMean of {formula} over the held-out rows i.\nFor n = 0 it is 0 by definition, hence no map.",
    )
    figure.colorbar(image, ax=axes, label="% of a row's attention")
