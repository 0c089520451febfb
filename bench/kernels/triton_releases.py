"""Compares releases of Triton by the Hopper kernels' grid, each as a ratio to cuDNN in the same process.

    python -m bench.kernels.triton_releases OUT.json /tmp/triton-3.7.1 /tmp/triton-3.8.0

A folder is what `pip install --no-deps --target FOLDER triton==...` fills; the release that is installed comes first.
The releases take turns, a process each; a line has the median of their rounds, over that of the installed one. PyTorch
stays the same: only our kernels are compiled by Triton. `-k` selects points as pytest does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.method.machine import commit
from bench.reporting.record import load

GRID = "grid and not both and (attn_n-triton:hopper-n1 or torch-sdpa-cudnn)"
OURS, PEER = "attn_n triton:hopper n=1", "torch sdpa cudnn n=0"

Place = tuple[object, ...]


def measured(folder: str, selected: str) -> tuple[dict[Place, float], dict[str, Any]]:
    """Runs the grid with one release, and returns our speed over that of cuDNN at each place, and the machine."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-k", selected]
    with tempfile.TemporaryDirectory() as results:
        file = Path(results) / "grid.json"
        subprocess.run([*command, "--results", str(file)], env=environment, stdout=subprocess.DEVNULL, check=True)
        run = load(file)
    medians = {(point.place, point.contender): point.median for point in run.points if point.values}
    ratios = {
        place: medians[place, PEER] / median
        for (place, contender), median in medians.items()
        if contender == OURS and (place, PEER) in medians
    }
    return ratios, run.machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.triton_releases")
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="with another release of Triton")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-k", dest="selected", default=GRID)
    options = parser.parse_args()
    found: dict[str, dict[Place, list[float]]] = {folder: defaultdict(list) for folder in ("", *options.folders)}
    machine: dict[str, Any] = {}
    for _ in range(options.rounds):
        for folder, of_folder in found.items():
            ratios, on = measured(folder, options.selected)
            machine = machine or on
            for place, ratio in ratios.items():
                of_folder[place].append(ratio)
        _write(options.out, found, machine)
    installed = found.pop("")
    for folder, of_folder in found.items():
        for place, rounds in sorted(of_folder.items(), key=str):
            ratio = statistics.median(rounds) / statistics.median(installed[place])
            print(f"{Path(folder).name}: x{ratio:.3f} {place}", flush=True)


def _write(out: Path, found: dict[str, dict[Place, list[float]]], machine: dict[str, Any]) -> None:
    """Writes the ratios to cuDNN of all rounds so far: a run that is cut short keeps what it had."""
    lines = [
        {
            "triton": Path(folder).name or "installed", "pass": measure, **dict(fields),
            "over cuDNN": [round(ratio, 4) for ratio in rounds],
        }
        for folder, of_folder in found.items()
        for (_, measure, fields), rounds in sorted(of_folder.items(), key=str)
    ]  # fmt: skip
    out.write_text(json.dumps({"machine": machine, "commit": commit(), "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
