"""The command `python -m attn_n`, which prints the report of `attn_n.doctor`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict

from attn_n.doctor import report, text
from attn_n.doctor.progress import Progress, is_terminal

COLOURS = {"PASS": "32", "FAIL": "31;1", "failed": "31;1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a self-check fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m attn_n", description="What attn_n can do on this machine.")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="the self-check of one case, and no timings")
    extent.add_argument("--full", action="store_true", help="the self-check of all cases, and timings on each GPU")
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")
    options = parser.parse_args(arguments)

    found, progress, out = report.Report(), Progress(sys.stderr), sys.stdout
    asked = report.QUICK if options.quick else report.FULL if options.full else report.USUAL
    coloured = is_terminal(out) and not os.environ.get("NO_COLOR")
    with contextlib.redirect_stdout(sys.stderr):  # a library may print when it is imported or compiled
        for section in report.steps(found, asked, progress):
            progress.clear()
            if not options.json:
                said = text.section(found, section)
                print(_coloured(said) if coloured else said, end="\n\n", file=out, flush=True)
    if options.json:
        print(json.dumps(asdict(found), indent=2, allow_nan=False))
    return 0 if found.passed else 1


def _coloured(section: str) -> str:
    """Make the title bold, and verdicts green and red."""
    title, _, lines = section.partition("\n")
    verdicts = re.sub(rf"\b({'|'.join(COLOURS)})\b", lambda word: f"\x1b[{COLOURS[word[0]]}m{word[0]}\x1b[0m", lines)
    return f"\x1b[1m{title}\x1b[0m\n{verdicts}"


if __name__ == "__main__":
    sys.exit(main())
