"""Pictures of a run: speed, ours over the best peer, memory, what n costs, and decoding."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.reporting.ratios import base_name, contenders, duels, measured, rounds_of_ratio, workload_of
from bench.reporting.record import Point, Run

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours and Tol's, which the colour-blind tell apart.
_OURS = ("#0072b2", "#009e73", "#332288", "#44aa99", "#117733", "#88ccee")
_PEERS = ("#4d4d4d", "#8c8c8c", "#b5b5b5", "#a8937d", "#cc79a7", "#d55e00", "#e69f00", "#56b4e9", "#882255", "#999933")
_MARKERS = {"0": {"marker": "o", "mfc": "white"}, "1": {"marker": "o"}, "per head": {"marker": "s"}}
_CEILING = "#b00020"
_AUTOMATIC = "attn_n"
_STYLE: dict[Any, Any] = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 3.5,
    "savefig.dpi": 200,
    "svg.hashsalt": "bench",  # the same results make the same file
}
_END = math.log2(1.5)  # of the colours of the heat map, around 1.0
_WIDTH = 9.0  # inches: 900 pixels of a README

# By row and column of a figure, and contender: the points of a line over S, in decoding over L.
_Panels = dict[tuple[str, str], dict[str, list[tuple[float, float]]]]


@dataclass(frozen=True)
class _Scene:
    """What there is to draw: what was measured in one dtype, and how each contender's line looks."""

    points: Sequence[Point]
    looks: Mapping[str, dict[str, Any]]
    machine: Mapping[str, Any]

    def of(self, suite: str, measures: Sequence[str]) -> list[Point]:
        """In the order in which panels and lines go."""
        found = [point for point in self.points if point.suite == suite and point.measure in measures]
        return sorted(found, key=lambda point: (measures.index(point.measure), *_order(point)))

    def ceiling(self, name: str) -> float | None:
        value = (self.machine.get("ceilings") or {}).get(name)
        return None if value is None else float(value)


def draw(run: Run, folder: Path, stem: str) -> list[Path]:
    """Make every picture for which there are points, as SVG and PNG; their paths."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError("the pictures need matplotlib, which is missing: pip install 'attn-n[bench]'") from error
    pictures: dict[str, Callable[[_Scene], Figure | None]] = {
        "speed": lambda scene: _speed(scene, "grid"),
        "scaling": lambda scene: _speed(scene, "scaling"),
        "best-peer": _best_peer,
        "memory": _memory,
        "cost-of-n": _cost_of_n,
        "decode": _decode,
    }
    looks = _looks(run.points)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for dtype in dict.fromkeys(point.problem["dtype"] for point in run.points):
        points = [point for point in measured(run.points) if point.problem["dtype"] == dtype]
        for name, picture in pictures.items():
            with rc_context(_STYLE):
                figure = picture(_Scene(points, looks, run.machine))
                if figure is not None:
                    figure.suptitle(f"{figure.get_suptitle()}: {run.machine['device']}, {dtype}", fontsize=9)
                    _legend(figure, contenders(run.points))
                    paths += _save(figure, folder / f"{stem}-{dtype}-{name}")
    return paths


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png")]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1])
    return paths


def _looks(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """A colour for each backend of ours and each library, a marker for each n; ours solid, peers dashed and above."""
    looks: dict[str, dict[str, Any]] = {}
    for ours, palette in ((True, _OURS), (False, _PEERS)):
        there = {point.contender: point for point in points if point.ours == ours}
        colours = dict(zip(dict.fromkeys(map(_library, there.values())), itertools.cycle(palette), strict=False))
        line = {"lw": 1.7, "zorder": 2} if ours else {"lw": 1.0, "zorder": 3, "linestyle": (0, (4, 1.5))}
        for name, point in there.items():
            looks[name] = {"color": colours[_library(point)], **line, **_MARKERS[point.n]}
    return looks


def _library(point: Point) -> str:
    """The contender without its n, and without the way in which it comes by it."""
    return base_name(point).removesuffix(" sink").removesuffix(" by lse")


def _worth_a_line(points: Sequence[Point]) -> list[Point]:
    """What a picture can show: n = 0 and n = 1; of our backends, beside the automatic choice, n = 1 alone.

    A contender that was measured at less than half of the workloads is left to the tables.
    """
    workloads = {point.place for point in points}
    times = Counter(point.contender for point in points)
    return [
        point
        for point in points
        if 2 * times[point.contender] >= len(workloads)
        and (point.n == "1" or (point.n == "0" and (not point.ours or base_name(point) == _AUTOMATIC)))
    ]


def _speed(scene: _Scene, suite: str) -> Figure | None:
    scale, unit = (1e12, "TFLOP/s") if scene.machine["kind"] == "cuda" else (1e9, "GFLOP/s")
    points = _worth_a_line([point for point in scene.of(suite, ("forward", "backward")) if point.flops])
    panels = _panels(points, _pass, _width, lambda point: (point.flops or math.nan) / point.median / scale)
    if not panels:
        return None
    figure, axes = _small_multiples(panels, scene.looks, unit, "Speed")
    top = scene.ceiling("matmul_flops")
    for each in axes.values():
        # It is measured in 16 bits, where tensor cores are fastest, and bounds no other dtype.
        if top is not None and workload_of(points[0]).dtype.itemsize == 2:
            _mark(each, top / scale, f"matmul {top / scale:.0f}")
        each.set_ylim(bottom=0)
    return figure


def _memory(scene: _Scene) -> Figure | None:
    suites = dict.fromkeys(point.suite for point in scene.points if point.measure == "memory")
    points = _worth_a_line([point for suite in suites for point in scene.of(suite, ("memory",))])
    panels = _panels(points, _mask, _width, lambda point: point.median / 1e6)
    if not panels:
        return None
    figure, axes = _small_multiples(panels, scene.looks, "MB", "Peak memory of forward and backward")
    for each in axes.values():
        each.set_yscale("log")
    return figure


def _cost_of_n(scene: _Scene) -> Figure | None:
    points = [point for point in scene.of("grid", ("forward", "backward")) if point.ours]
    plain = {(point.place, base_name(point)): point for point in points if point.n == "0"}

    def cost(point: Point) -> float:
        return statistics.median(rounds_of_ratio(point, plain[point.place, base_name(point)]))

    costly = [point for point in points if point.n != "0" and (point.place, base_name(point)) in plain]
    panels = _panels(costly, _pass, _width, cost)
    if not panels:
        return None
    figure, axes = _small_multiples(panels, scene.looks, "time over n = 0", "What n costs")
    for each in axes.values():
        each.axhline(1.0, color="#666666", lw=0.9)
    return figure


def _decode(scene: _Scene) -> Figure | None:
    """How fast K and V are read, each once, which is nearly all that decoding has to do."""
    scale, unit = (1e12, "TB/s") if scene.machine["kind"] == "cuda" else (1e9, "GB/s")
    points = _worth_a_line(scene.of("decode", ("forward",)))
    panels = _panels(points, _keys, _batch, lambda point: _bytes_of_keys(point) / point.median / scale, _queries)
    if not panels:
        return None
    figure, axes = _small_multiples(panels, scene.looks, unit, "Decoding, K and V read", over="L")
    top = scene.ceiling("copy_bytes")
    for each in axes.values():
        if top is not None:
            _mark(each, top / scale, f"copy {top / scale:.2g}")
        each.set_ylim(bottom=0)
    return figure


def _bytes_of_keys(point: Point) -> int:
    workload = workload_of(point)
    return 2 * workload.batch * workload.num_heads_kv * workload.len_k * workload.width * workload.dtype.itemsize


def _best_peer(scene: _Scene) -> Figure | None:
    """A cell for each S, width and mask; the worst ratio where several workloads share one."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for duel in duels(scene.of("grid", ("forward", "backward"))):
        cell = f"{_width(duel.ours)}, {_mask(duel.ours)}", workload_of(duel.ours).len_k
        cells = panels[duel.ours.measure]
        cells[cell] = min(duel.times_faster, cells.get(cell, math.inf))
    if not panels:
        return None
    rows = list(dict.fromkeys(row for cells in panels.values() for row, _ in cells))
    columns = sorted({column for cells in panels.values() for _, column in cells})
    figure = Figure((_WIDTH, 0.9 + 0.3 * len(rows)), layout="constrained")
    figure.suptitle("Our fastest with n over the best peer (blue, above 1: ours is faster)")
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (measure, cells) in zip(drawn, panels.items(), strict=True):
        _heat_map(axes, [[cells.get((row, column), math.nan) for column in columns] for row in rows])
        axes.set(title=measure, xlabel="S")
        axes.set_xticks(range(len(columns)), map(_short, columns))
        axes.set_yticks(range(len(rows)), rows)
    return figure


def _heat_map(axes: Axes, ratios: Sequence[Sequence[float]]) -> None:
    logs = [[math.log2(ratio) for ratio in row] for row in ratios]
    axes.imshow(logs, cmap="RdBu", vmin=-_END, vmax=_END, aspect="auto")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (i, row), j in itertools.product(enumerate(ratios), range(len(ratios[0]))):
        if not math.isnan(row[j]):
            color = "white" if abs(logs[i][j]) > 0.7 * _END else "black"
            axes.text(j, i, f"{row[j]:.2f}", ha="center", va="center", color=color)


def _panels(
    points: Iterable[Point],
    row: Callable[[Point], str],
    column: Callable[[Point], str],
    value: Callable[[Point], float],
    over: Callable[[Point], int] = lambda point: workload_of(point).len_k,
) -> _Panels:
    panels: _Panels = defaultdict(lambda: defaultdict(list))
    for point in points:
        panels[row(point), column(point)][point.contender].append((over(point), value(point)))
    return panels


def _small_multiples(
    panels: _Panels, looks: Mapping[str, dict[str, Any]], unit: str, title: str, over: str = "S"
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    from matplotlib.figure import Figure

    rows, columns = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    lengths = sorted({x for lines in panels.values() for line in lines.values() for x, _ in line})
    shown = lengths[:: math.ceil(len(lengths) * len(columns) / 24)]
    size = _WIDTH if len(columns) > 1 else _WIDTH * 0.65
    figure = Figure((size, 1.9 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title)
    drawn = figure.subplots(len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
    axes = {}
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        each = axes[row, column] = drawn[i][j]
        for name, line in panels.get((row, column), {}).items():
            each.plot(*zip(*line, strict=True), label=name, **looks[name])
        each.set_xscale("log", base=2)
        each.set_xticks(shown, [_short(length) for length in shown])
        each.set_xticks([], minor=True)
        each.set_title(f"{row}, {column}", loc="left")
        each.set(xlabel=over if i == len(rows) - 1 else "", ylabel=unit if j == 0 else "")
    return figure, axes


def _mark(axes: Axes, height: float, label: str) -> None:
    axes.axhline(height, color=_CEILING, lw=0.9)
    across = axes.get_yaxis_transform()
    axes.annotate(label, (0.99, height), (0, 1), across, "offset points", color=_CEILING, ha="right")


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """Below the panels; ours last, as in the tables."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        handles.update(zip(labels, lines, strict=True))
    if handles:
        ordered = [name for name in names if name in handles]
        width, height = figure.get_size_inches()
        columns = min(4 if width == _WIDTH else 3, len(ordered))
        figure.set_size_inches(width, height + 0.17 * math.ceil(len(ordered) / columns))
        figure.legend([handles[name] for name in ordered], ordered, loc="outside lower center", ncols=columns)


def _order(point: Point) -> tuple[bool, int, int, int, int, int]:
    workload = workload_of(point)
    return workload.causal, workload.width, workload.len_k, workload.length, workload.batch, workload.num_heads_kv


def _pass(point: Point) -> str:
    return f"{point.measure}, {_mask(point)}"


def _mask(point: Point) -> str:
    return "causal" if point.problem.get("causal") else "full"


def _width(point: Point) -> str:
    return f"E = {point.problem['width']}"


def _keys(point: Point) -> str:
    return f"S = {_short(workload_of(point).len_k)}, {_width(point)}"


def _queries(point: Point) -> int:
    return workload_of(point).length


def _batch(point: Point) -> str:
    workload = workload_of(point)
    return f"batch {workload.batch}, heads {workload.heads}:{workload.num_heads_kv}"


def _short(length: float) -> str:
    return f"{length / 1024:g}k" if length >= 1024 else f"{length:g}"
