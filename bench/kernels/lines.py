"""The command line that scripts share which print a JSON object for each thing that they measure, and write all."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

from bench.method.clocks import CudaClock
from bench.method.machine import commit, machine


def main(
    description: str | None, measured: Callable[[CudaClock], Iterable[dict[str, Any]]], indent: int | None = None,
    **about: Any,
) -> None:  # fmt: skip
    """`about` is written beside the lines; `indent` is that of what is printed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    lines = []
    for line in measured(CudaClock(options.quick)):
        print(json.dumps(line, indent=indent), flush=True)
        lines.append(line)
    with open(options.out, "w") as file:
        json.dump({"machine": machine("cuda"), "commit": commit(), **about, "lines": lines}, file, indent=1)
