"""The command `python -m attn_n`, which prints the report of `attn_n.doctor`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from attn_n.doctor import report, text


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a self-check fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m attn_n", description="What attn_n can do on this machine.")
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")
    as_json = parser.parse_args(arguments).json
    with contextlib.redirect_stdout(sys.stderr):  # a library may print when it is imported or compiled
        collected = report.collect()
    print(json.dumps(asdict(collected), indent=2, allow_nan=False) if as_json else text.text(collected))
    return 0 if collected.passed else 1


if __name__ == "__main__":
    sys.exit(main())
