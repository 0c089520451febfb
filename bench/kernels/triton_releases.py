"""Compares releases of Triton by the Hopper kernels' grid, each as a ratio to cuDNN in the same process.

    python -m bench.kernels.triton_releases results/ /tmp/triton-3.7.1 /tmp/triton-3.8.0

A folder is what `pip install --no-deps --target FOLDER triton==...` fills; the release that is installed comes first.
The releases take turns, a process each, and a line has the median of their rounds. PyTorch stays the same: only our
kernels are compiled by Triton. `-k` selects points as pytest does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from bench.reporting.record import load

GRID = "grid and not both and (attn_n-triton:hopper-n1 or torch-sdpa-cudnn)"
OURS, PEER = "attn_n triton:hopper n=1", "torch sdpa cudnn n=0"

Place = tuple[object, ...]


def measured(folder: str, results: Path, selected: str) -> dict[Place, float]:
    """Runs the grid with one release, and returns our speed over that of cuDNN at each place."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-k", selected]
    subprocess.run([*command, "--results", str(results)], env=environment, stdout=subprocess.DEVNULL, check=True)
    medians = {(point.place, point.contender): point.median for point in load(results).points if point.values}
    return {
        place: medians[place, PEER] / median
        for (place, contender), median in medians.items()
        if contender == OURS and (place, PEER) in medians
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.triton_releases")
    parser.add_argument("results", type=Path, help="folder for the results files")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="with another release of Triton")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-k", dest="selected", default=GRID)
    options = parser.parse_args()
    found: dict[str, dict[Place, list[float]]] = {folder: defaultdict(list) for folder in ("", *options.folders)}
    for turn in range(options.rounds):
        for folder, of_folder in found.items():
            name = Path(folder).name or "installed"
            ratios = measured(folder, options.results / f"triton-{name}-{turn}.json", options.selected)
            for place, ratio in ratios.items():
                of_folder[place].append(ratio)
    installed = {place: statistics.median(ratios) for place, ratios in found.pop("").items()}
    for folder, of_folder in found.items():
        for place, ratios in sorted(of_folder.items(), key=str):
            ratio = statistics.median(ratios) / installed[place]
            print(f"{Path(folder).name}: x{ratio:.3f} {place}", flush=True)


if __name__ == "__main__":
    main()
