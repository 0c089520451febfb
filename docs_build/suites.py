"""The tables of the other suites in docs/results.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from bench.reporting.decoding import tables as decode_tables
from docs_build.blocks import table
from docs_build.measured import (
    PASSES,
    headed,
    newest,
    newest_of_cpu,
    of_suite,
    points,
    run,
    source,
    span,
    three,
    value,
    whole,
)
from docs_build.names import (
    AUTOMATIC,
    CUDNN,
    EAGER,
    FA2,
    FA3,
    FA4,
    FLEX,
    HOPPER,
    NAMES,
    PORTABLE,
    TORCHS,
    TORCHS_FA2,
    label,
    label_of_line,
)


def scaling() -> str:
    """One sequence, a row for each length."""
    paths = newest("scaling"), newest("scaling-131072")
    there = pd.concat([of_suite(path, "scaling") for path in paths])
    names = AUTOMATIC, HOPPER, PORTABLE, FA4, FA3, CUDNN, FLEX
    rows = [[f"{length:,}", *_both_passes(group, names)] for length, group in there.groupby("S")]
    return headed("TFLOP/s, forward / backward", names, rows, *paths)


def varlen() -> str:
    return _by_workload("varlen-window", "varlen", (HOPPER, PORTABLE, FA4, FA3, FLEX))


def window() -> str:
    return _by_workload("varlen-window", "window", (HOPPER, PORTABLE, FA4, FA3, FLEX))


def gqa() -> str:
    return _by_workload("gqa", "gqa", (HOPPER, PORTABLE, FA4, FA3, CUDNN, FLEX))


def decode() -> str:
    """How near decoding is to the bandwidth, by the tables of bench, or as times of the older suite."""
    path = newest("decode")
    copy_bytes = (run(path).machine.get("ceilings") or {}).get("copy_bytes")
    found = [(title, _of_frame(each)) for title, each in decode_tables(run(path).points, copy_bytes)]
    if found:
        return "\n\n".join([*(f"{title}:\n\n{each}" for title, each in found), source(path)])
    there = of_suite(path, "decode")
    names = AUTOMATIC, HOPPER, PORTABLE, FA4, FA3, CUDNN, FLEX
    rows = []
    for length, group in there.groupby("L"):
        best = group.set_index("contender").value.reindex(names) * 1e6
        rows.append([f"{length}", *map(whole, best)])
    one = there.iloc[0]
    corner = f"{one.batch} sequences of {one.S:,} keys, {one.BxH.partition('x')[2]} heads, {one.heads_kv} KV heads"
    return headed(f"{corner}, E = {one.E}; queries: us", names, rows, path)


def bias() -> str:
    """A learned bias, forward and backward together."""
    path = newest("learned-bias")
    rows = []
    for line in json.loads(path.read_text())["lines"]:
        batch, heads, length, width = line["q"]
        cells = [f"{found['ms']:.2f} ms, {found['peak MB'] / 1000:.1f} GB" for found in line["contenders"].values()]
        rows.append([f"`{line['bias']}`, {batch} x {heads} heads, S = {length:,}, E = {width}", *cells])
    names = list(json.loads(path.read_text())["lines"][0]["contenders"])
    head = table(["bias", *(f"`{name}`" if ":" in name else label(name) for name in names)], rows)
    return f"{head}\n\n{source(path)}"


def padding() -> str:
    """A training step of a padded batch, beside the same sequences without padding."""
    path = newest("padding")
    rows = []
    for line in json.loads(path.read_text())["lines"]:
        ms, over = line["ms"], line["speed over"]
        cells = [f"{ms[name]:.2f} ms" for name in ("padded", "varlen", "full")]
        rows.append([f"`{line['backend']}`, E = {line['E']}", *cells, f"{over['varlen']:.2f}"])
    head = table(["backend", "padded", "as varlen", "all rows in use", "speed over varlen"], rows)
    return f"{head}\n\n{source(path)}"


def transformers() -> str:
    """A small gpt-oss in transformers, by attention implementation."""
    path = newest("transformers")
    lines = json.loads(path.read_text())["lines"]
    names = list(dict.fromkeys(line["implementation"] for line in lines))
    found = {(line["what"], line["implementation"]): _of_model(line) for line in lines}
    rows = [[what, *(found[what, name] for name in names)] for what in dict.fromkeys(line["what"] for line in lines)]
    return f"{table(['', *(f'`{name}`' for name in names)], rows)}\n\n{source(path)}"


def _of_model(line: dict[str, Any]) -> str:
    if "ms" not in line:
        return str(line["reason"])
    return f"{line['ms']:.0f} ms, {line['peak_MiB'] / 1024:.1f} GiB"


def distributed() -> str:
    """Attention of two GPUs together, by their efficiency over one."""
    path = newest("distributed", "*x2")
    stored = json.loads(path.read_text())
    rows = []
    for line in stored["lines"]:
        if "both, ms" in line:
            passes = [f"{line[f'{each}, efficiency']:.2f}" for each in ("forward", "backward", "both")]
            speed, peak = line["both, TFLOP/s a GPU"], max(line["peak with its inputs, MB, by rank"])
            rows.append([f"{line['tokens']:,}", line["contender"], f"{speed:.0f}", *passes, f"{peak / 1000:.2f} GB"])
    columns = ["tokens", "", "TFLOP/s a GPU", "efficiency, forward", "backward", "both", "peak of a GPU, with inputs"]
    return f"{table(columns, rows)}\n\n{source(path)} Each GPU: {stored['machine']['device']}."


def sink() -> str:
    """What the kernel that applies n costs behind other libraries."""
    path = newest("fold")
    lines = json.loads(path.read_text())["lines"]
    copies = [line["over the copy"]["fold, n = 1"] for line in lines if "over the copy" in line]
    rows = []
    of_libraries = [line for line in lines if "backend" in line]
    kinds = dict.fromkeys((line["problem"], line["pass"], line["logits"]) for line in of_libraries)
    backends = dict.fromkeys(line["backend"] for line in of_libraries)
    for kind in kinds:
        found = {line["backend"]: line["n = 1 costs"] for line in of_libraries if _kind_of(line) == kind}
        rows.append([", ".join(kind), *(found.get(backend, "-").replace("-0.0", "0.0") for backend in backends)])
    said = f"The kernel takes {span(copies)} times as long as a copy of `out`. What n = 1 adds to a library:"
    head = table(["workload", *(f"`{backend}`" for backend in backends)], rows)
    return f"{said}\n\n{head}\n\n{source(path)}"


def _kind_of(line: dict[str, str]) -> tuple[str, str, str]:
    return line["problem"], line["pass"], line["logits"]


def memory() -> str:
    """The peak of a forward and a backward beyond the inputs, in MB."""
    there = of_suite(newest("memory-host"), "memory")
    names = AUTOMATIC, HOPPER, PORTABLE, FA4, FA2, CUDNN, TORCHS_FA2, FLEX
    rows = []
    for length, group in there.groupby("S"):
        rows.append([f"{length:,}", *map(whole, group.set_index("contender").value.reindex(names) / 1e6)])
    return headed("S; MB", names, rows, newest("memory-host"))


def first_call() -> str:
    """The first forward and backward of a process with empty caches, in seconds."""
    there = of_suite(newest("first-call"), "first call").set_index("contender").value
    names = HOPPER, PORTABLE, FA4, FA2, CUDNN, FLEX, TORCHS_FA2
    rows = [[NAMES[name], f"{there[name]:.2f}"] for name in names if name in there]
    return f"{table(['first call, caches empty', 's'], rows)}\n\n{source(newest('first-call'))}"


def host() -> str:
    """The time of the host for each kind of call and pass, beside PyTorch's SDPA."""
    there = points(newest("host"))
    names = AUTOMATIC, HOPPER, PORTABLE
    rows = []
    for suite, group in there.groupby("suite", sort=False):
        by_name = group.assign(contender=group.contender.str.replace("n=(0|per head)$", "n=1", regex=True))
        ours = by_name[by_name.ours].set_index("contender").value.reindex(names) * 1e6
        torchs = group[group.line.isin(["torch sdpa", "torch sdpa mask"])].value * 1e6
        cells = [*map(whole, ours), whole(torchs.iloc[0]) if len(torchs) else "-"]
        rows.append([str(suite).removeprefix("host: "), *cells])
    head = ["us", *(NAMES[name].removesuffix(", n = 1") for name in names), "PyTorch's SDPA"]
    return f"{table(head, rows)}\n\n{source(newest('host'))}"


def lengths() -> str:
    """Calls whose lengths change: the mean wall time of a call by contender and stream."""
    there = points(newest("lengths"))
    wall = there[there.measure == "wall"].assign(stream=there.suite.str.removeprefix("lengths: "))
    streams = list(wall.stream.unique())
    # In a stream a contender has one n: what it was asked for there stands in the name of the stream.
    times = wall.pivot_table("value", "line", "stream", sort=False)[streams] * 1e3
    ours = set(wall[wall.ours].line)
    order = sorted(times.index, key=lambda line: line not in ours)
    rows = [[label_of_line(line), *(three(value) for value in times.loc[line])] for line in order]
    return f"{table(['ms a call', *streams], rows)}\n\n{source(newest('lengths'))}"


def cpu() -> str:
    """Forward and backward on a CPU in ms, and n = 1 over PyTorch's SDPA."""
    path = newest_of_cpu()
    names = AUTOMATIC, TORCHS, EAGER
    rows = []
    for (length, mask), group in of_suite(path, "grid").groupby(["S", "mask"], sort=False):
        times = [{each: value(group, name, each) for each in PASSES} for name in names]
        cells = [" / ".join(three(1e3 * seconds) for seconds in each.values()) for each in times]
        over = " / ".join(f"{times[0][each] / times[1][each]:.2f}" for each in PASSES)
        rows.append([f"{length:,}, {mask}", *cells[:2], over, cells[2]])
    head = ["S; ms, forward / backward", NAMES[AUTOMATIC], NAMES[TORCHS], "ratio", NAMES[EAGER]]
    used = of_suite(path, "memory")
    memory = []
    for length, group in used.groupby("S"):
        memory.append([f"{length:,}", *map(three, group.set_index("contender").value.reindex(names) / 1e6)])
    found = run(path).machine
    said = f"{source(path)} {found['device']}, PyTorch {found['torch']}, float32."
    peaks = table(["S; MB", *(NAMES[name] for name in names)], memory)
    return "\n\n".join([table(head, rows), "Peak memory of forward and backward beyond the inputs:", peaks, said])


def _by_workload(kind: str, suite: str, names: Sequence[str]) -> str:
    there = of_suite(newest(kind), suite)
    rows = [[f"`{workload}`", *_both_passes(group, names)] for workload, group in there.groupby("workload", sort=False)]
    return headed("TFLOP/s, forward / backward", names, rows, newest(kind))


def _both_passes(group: pd.DataFrame, names: Sequence[str]) -> list[str]:
    return [" / ".join(whole(value(group, name, measure, "speed")) for measure in PASSES) for name in names]


def _of_frame(found: pd.DataFrame) -> str:
    return table(list(map(str, found.columns)), [list(map(str, row)) for row in found.values])
