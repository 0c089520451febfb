"""The tables of the study of n and int8, from what `python -m examples.study --out docs/measured` wrote."""

from __future__ import annotations

import json
import statistics
from typing import Any

from docs_build.blocks import ROOT, table

PATH = ROOT / "docs" / "measured" / "study.json"
# What is shown of each run, by the fields of `examples.study.Result`.
COLUMNS = {
    "loss": ("loss", ".4f"),
    "int8_loss": ("loss with int8", ".4f"),
    "kurtosis": ("largest kurtosis of a block's output", ".1f"),
    "infinity_norm": ("its largest absolute value", ".1f"),
    "first_token": ("weight on the first token", "%"),
    "to_nothing": ("weight to nothing", "%"),
    "to_nothing_of_a_head": ("that of the head with the most", "%"),
}
DIFFERENCES = {"loss": "loss", "increase": "what int8 adds to it"}


def means() -> str:
    """A row for each kind of model: the means over the seeds."""
    runs = _runs()
    rows = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        of_kind = [run for run in runs if run["kind"] == kind]
        of_fields = {field: statistics.mean(run[field] for run in of_kind) for field in COLUMNS}
        rows.append([kind, *(_shown(of_fields[field], form) for field, (_, form) in COLUMNS.items())])
    return table(["", *(name for name, _ in COLUMNS.values())], rows)


def differences() -> str:
    """How n = 1 and learned sinks differ from n = 0, seed by seed."""
    runs = {(run["kind"], run["seed"]): run for run in _runs()}
    kinds, seeds = (list(dict.fromkeys(each)) for each in zip(*runs, strict=True))
    rows = []
    for field, name in DIFFERENCES.items():
        for kind in kinds[1:]:
            found = [runs[kind, seed][field] - runs[kinds[0], seed][field] for seed in seeds]
            rows.append([f"{name}, {kind} minus {kinds[0]}", *(f"{difference:+.4f}" for difference in found)])
    return table(["nats per byte", *(f"seed {seed}" for seed in seeds)], rows)


def _shown(value: float, form: str) -> str:
    return f"{100 * value:.1f} %" if form == "%" else format(value, form)


def _runs() -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(PATH.read_text())["runs"]
    return [{**run, "increase": run["int8_loss"] - run["loss"]} for run in runs]
