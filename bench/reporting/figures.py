"""Pictures of a run: speed, ours over the best peer, memory, what n costs, and decoding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from bench.reporting.frame import ORDER, best_pairs, by_pass, contenders, fastest, frame, measured
from bench.reporting.ratios import ratio
from bench.reporting.record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS = "attn_n, n = 1"
# The lines of a picture by the name of a contender without its n, mostly in Okabe and Ito's colours, which the
# colour-blind tell apart. PyTorch's FlashAttention 2 is shown where the package is not installed; the last two are
# those of a CPU.
_LINES = {
    "flash-attn 4": ("FlashAttention 4", "#d55e00"),
    "flash-attn 3": ("FlashAttention 3", "#cc79a7"),
    "flash-attn 2": ("FlashAttention 2", "#e69f00"),
    "torch sdpa cudnn": ("cuDNN", "#009e73"),
    "torch sdpa cudnn mask": ("cuDNN", "#009e73"),
    "flashinfer": ("FlashInfer", "#9467bd"),
    "flashinfer tensor cores": ("FlashInfer", "#9467bd"),
    "flex": ("FlexAttention", "#56b4e9"),
    "torch sdpa flash": ("PyTorch's FlashAttention 2", "#e69f00"),
    "torch sdpa": ("PyTorch's SDPA", "#d55e00"),
    "eager softmax_n": ("softmax_n in plain PyTorch", "#999999"),
}
# What n costs is shown of these alone, where there are any: of most others it is the same kernel behind theirs.
_COSTS = {
    "attn_n triton:hopper": "#2b8fd9",
    "attn_n triton:portable": "#009e73",
    "attn_n flash_attn:4": "#d55e00",
    "attn_n sdpa:cudnn": "#cc79a7",
    "attn_n sdpa:flash": "#e69f00",
}
_CEILING = "#e5484d"
_STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 3.5,
    "savefig.dpi": 200,
    "savefig.transparent": True,
    "svg.hashsalt": "bench",  # the same results make the same file
}
_END = math.log2(1.5)  # of the colours of the heat map, around 1.0
_WIDTH = 9.0  # inches: 900 pixels of a README

# The page, its text, its lines, and our own line, which stands out on both.
_THEMES = {
    "light": ("#ffffff", "#1f2328", "#e1e4e8", "#0072b2"),
    "dark": ("#0d1117", "#d1d7e0", "#353b44", "#4aa8ff"),
}

Picture = Callable[[pd.DataFrame, Mapping[str, Any]], "Figure"]


def draw(run: Run, folder: Path, stem: str, theme: str = "light") -> list[Path]:
    """Makes every picture for which there are points, as SVG and PNG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, dtype, figure in pictures(run, theme):
        paths += _save(figure, folder / f"{stem}-{dtype}-{name}")
    return paths


def pictures(run: Run, theme: str = "light") -> Iterator[tuple[str, str, Figure]]:
    """Yields the name, the dtype and the figure of every picture for which there are points."""
    timed = measured(frame(run.points)).sort_values(ORDER, kind="stable")
    grid = by_pass(timed[timed.suite == "grid"], ("forward", "backward"))
    speed = _lines(grid[grid.flops.notna()])
    made: dict[str, tuple[Picture, pd.DataFrame]] = {
        "overview": (_overview, speed[(speed.E == 128) & speed.causal]),
        "speed": (_speed, speed),
        "scaling": (_speed, _lines(by_pass(timed[timed.suite == "scaling"], ("forward", "backward")))),
        "best-peer": (_best_peer, best_pairs(grid)),
        "memory": (_memory, _lines(timed[timed.measure == "memory"])),
        "cost-of-n": (_cost_of_n, _over_plain(grid[grid.ours])),
        "decode": (_decode, _lines(_contiguous(timed[(timed.suite == "decode") & (timed.measure == "forward")]))),
    }
    for (name, (picture, points)), dtype in itertools.product(made.items(), timed.dtype.unique()):
        shown = points[points.dtype == dtype]
        if len(shown):
            with style(theme):
                figure = picture(shown, run.machine)
                figure.suptitle(f"{figure.get_suptitle()}: {run.machine['device']}, {dtype}", fontsize=9.5)
                yield name, dtype, figure


def style(theme: str) -> AbstractContextManager[None]:
    """The look of all pictures, for a page that is "light" or "dark"; its background is left transparent."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError("the pictures need matplotlib, which is missing: pip install 'attn-n[bench]'") from error
    page, text, line, ours = _THEMES[theme]
    of_text = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "axes.edgecolor")
    colors = {"grid.color": line, "lines.color": ours, **dict.fromkeys(of_text, text)}
    pages = dict.fromkeys(("figure.facecolor", "axes.facecolor"), page)
    return rc_context({**_STYLE, **colors, **pages})


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png")]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], transparent=False)
    return paths


def _lines(points: pd.DataFrame) -> pd.DataFrame:
    """Our automatic choice with n = 1, and of each library the fastest at each place, whatever its n."""
    library = points.line.str.removesuffix(" sink").str.removesuffix(" by lse").where(~points.ours)
    there = set(library)
    left_out = ["torch sdpa flash"] if "flash-attn 2" in there else []
    left_out += [] if "torch sdpa" in there else ["eager softmax_n"]
    names = library.mask(library.isin(left_out)).map({name: label for name, (label, _) in _LINES.items()})
    named = points.assign(label=names.mask(points.contender == "attn_n n=1", _OURS)).dropna(subset="label")
    return fastest(named, ["place", "label"])


def _contiguous(points: pd.DataFrame) -> pd.DataFrame:
    """Without paged caches; over a contiguous one, the call for caches stands for ours."""
    points = points[~(points.block > 0)]
    over_cache = points.contender == "attn_n kvcache n=1"
    if over_cache.any():
        points = points[points.contender != "attn_n n=1"]
    return points.assign(contender=points.contender.mask(over_cache, "attn_n n=1"))


def _over_plain(points: pd.DataFrame) -> pd.DataFrame:
    """Of ours with n, the time over that of the same backend without."""
    plain = points[points.n == "0"][["place", "line", "point"]]
    pairs = points[points.n != "0"].merge(plain, on=["place", "line"], suffixes=("", "_plain"))
    chosen = pairs.line.isin(_COSTS)
    pairs = pairs[chosen] if chosen.any() else pairs
    return pairs.assign(label=pairs.contender, cost=list(map(ratio, pairs.point, pairs.point_plain)))


def _speed(points: pd.DataFrame, machine: Mapping[str, Any]) -> Figure:
    return _speed_panels(_by_measure(points), machine, "Speed")


def _overview(points: pd.DataFrame, machine: Mapping[str, Any]) -> Figure:
    """Both passes beside each other, in one row."""
    shown = points.assign(row=points["mask"] + ", " + _width(points), column=points.measure, x=points.S)
    return _speed_panels(shown, machine, "attn_n with n = 1, and the fastest call of each library, in training")


def _speed_panels(points: pd.DataFrame, machine: Mapping[str, Any], title: str) -> Figure:
    scale, unit = (1e12, "TFLOP/s") if machine["kind"] == "cuda" else (1e9, "GFLOP/s")
    figure, all_axes = _small_multiples(points.assign(y=points.flops / points.value / scale), unit, title, _looks())
    top = _ceiling(machine, "matmul_flops")
    for axes in all_axes:
        # It is measured in 16 bits, where tensor cores are fastest, and bounds no other dtype.
        if top is not None and points.dtype.iloc[0] in ("bfloat16", "float16"):
            _mark(axes, top / scale, f"matmul {top / scale:.0f}")
        axes.set_ylim(bottom=0)
    return figure


def _memory(points: pd.DataFrame, machine: Mapping[str, Any]) -> Figure:
    from matplotlib.ticker import LogFormatter

    shown = points.assign(row=points["mask"], column=_width(points), x=points.S, y=points.value / 1e6)
    figure, all_axes = _small_multiples(shown, "MB", "Peak memory of forward and backward", _looks())
    for axes in all_axes:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    return figure


def _cost_of_n(points: pd.DataFrame, machine: Mapping[str, Any]) -> Figure:
    looks = {
        point.contender: {"color": _COSTS.get(line), "marker": "o" if point.n == "1" else "s", "lw": 1.4}
        for line, point in zip(points.line, points.point, strict=True)
    }
    shown = _by_measure(points).assign(y=points.cost)
    figure, all_axes = _small_multiples(shown, "time over n = 0", "What n costs", looks)
    for axes in all_axes:
        axes.axhline(1.0, color=axes.yaxis.label.get_color(), lw=0.9)
    return figure


def _decode(points: pd.DataFrame, machine: Mapping[str, Any]) -> Figure:
    """How fast K and V are read, each once, which is nearly all that decoding has to do."""
    scale, unit = (1e12, "TB/s") if machine["kind"] == "cuda" else (1e9, "GB/s")
    bytes_of_kv = 2 * points.batch * points.heads_kv * points.S * points.E * (4 if "32" in points.dtype.iloc[0] else 2)
    x, other = ("S", "L") if points.S.nunique() > 1 else ("L", "S")
    heads = points.BxH.str.partition("x")[2] + ":" + points.heads_kv.astype(str)
    rows = f"{other} = " + points[other].map(_short) + ", heads " + heads
    columns = _width(points) + ", batch " + points.batch.astype(str)
    shown = points.assign(row=rows, column=columns, x=points[x], y=bytes_of_kv / points.value / scale)
    figure, all_axes = _small_multiples(shown, unit, "Decoding, K and V read", _looks(), over=x)
    top = _ceiling(machine, "copy_bytes")
    for axes in all_axes:
        if top is not None:
            _mark(axes, top / scale, f"copy {top / scale:.3g}")
        axes.set_ylim(bottom=0)
    return figure


def _best_peer(pairs: pd.DataFrame, machine: Mapping[str, Any]) -> Figure:
    """A cell for each S, E and mask; the worst ratio where several workloads share one."""
    from matplotlib.figure import Figure

    pairs = _by_measure(pairs).assign(label=_width(pairs) + ", " + pairs["mask"])
    rows, passes = pairs.label.unique(), pairs.measure.unique()
    figure = Figure((_WIDTH, 0.9 + 0.3 * len(rows)), layout="constrained")
    figure.suptitle("Our fastest with n over the best peer (blue, above 1: ours is faster)")
    drawn = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for axes, measure in zip(drawn, passes, strict=True):
        there = pairs[pairs.measure == measure]
        cells = there.pivot_table("times_faster", "label", "S", aggfunc="min").reindex(rows)
        _heat_map(axes, cells)
        axes.set(title=measure, xlabel="S")
        axes.set_xticks(range(len(cells.columns)), map(_short, cells.columns))
        axes.set_yticks(range(len(rows)), rows)
    return figure


def _heat_map(axes: Axes, cells: pd.DataFrame) -> None:
    logs = cells.map(math.log2)
    axes.imshow(logs, cmap="RdBu", vmin=-_END, vmax=_END, aspect="auto")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for i, j in itertools.product(*map(range, cells.shape)):
        if not math.isnan(cells.iloc[i, j]):
            color = "white" if abs(logs.iloc[i, j]) > 0.7 * _END else "black"
            axes.text(j, i, f"{cells.iloc[i, j]:.2f}", ha="center", va="center", color=color)


def _looks() -> dict[str, dict[str, Any]]:
    """How each line looks: ours whole and bold, peers dashed with hollow points, which show what lies below them."""
    from matplotlib import rcParams

    page, ours = rcParams["figure.facecolor"], rcParams["lines.color"]
    peer = {"marker": "o", "mfc": page, "lw": 1.0, "ls": (0, (4, 1.5)), "zorder": 3}
    looks = {name: {"color": color, **peer} for name, color in _LINES.values()}
    return {**looks, _OURS: {"color": ours, "marker": "o", "lw": 1.9, "zorder": 2}}


def _by_measure(points: pd.DataFrame) -> pd.DataFrame:
    """A row of panels for each pass and mask, a column for each E, and S along the axis."""
    return points.assign(row=points.measure + ", " + points["mask"], column=_width(points), x=points.S)


def _small_multiples(
    points: pd.DataFrame, unit: str, title: str, looks: Mapping[str, Mapping[str, Any]], over: str = "S"
) -> tuple[Figure, Iterable[Axes]]:
    """A panel for each `row` and `column`, with a line for each `label` through its `x` and `y`."""
    from matplotlib.figure import Figure

    rows, columns = points.row.unique(), points.column.unique()
    ticks = sorted(points.x.unique())
    ticks = ticks[:: math.ceil(len(ticks) * len(columns) / 24)]
    names = contenders(points, "label")
    wide = len(columns) > 1
    legend = min(4 if wide else 3, len(names))
    height = (1.9 if len(rows) > 1 else 2.5) * len(rows) + 0.6 + 0.17 * math.ceil(len(names) / legend)
    figure = Figure((_WIDTH if wide else _WIDTH * 0.65, height), layout="constrained")
    figure.suptitle(title)
    drawn = figure.subplots(len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
    lines = {}
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        axes, there = drawn[i][j], points[(points.row == row) & (points.column == column)]
        for name, line in there.groupby("label", sort=False):
            (lines[name],) = axes.plot(line.x, line.y, label=name, **looks[str(name)])
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(_short, ticks))
        axes.set_xticks([], minor=True)
        axes.set_title(f"{row}, {column}", loc="left")
        axes.set(xlabel=over if i == len(rows) - 1 else "", ylabel=unit if j == 0 else "")
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=legend)
    return figure, drawn.flat


def _mark(axes: Axes, height: float, label: str) -> None:
    axes.axhline(height, color=_CEILING, lw=0.9)
    axes.set_ylim(top=max(axes.get_ylim()[1], 1.12 * height))
    across = axes.get_yaxis_transform()
    axes.annotate(label, (0.01, height), (0, 3), across, "offset points", color=_CEILING)


def _ceiling(machine: Mapping[str, Any], name: str) -> float | None:
    value = (machine.get("ceilings") or {}).get(name)
    return None if value is None else float(value)


def _width(points: pd.DataFrame) -> pd.Series:
    return "E = " + points.E.astype(str)


def _short(length: float) -> str:
    return f"{length / 1024:g}k" if length >= 1024 else f"{length:g}"
