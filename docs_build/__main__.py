"""python -m docs_build: writes the generated tables of README.md and docs/, and the pictures in docs/pictures."""

from __future__ import annotations

import argparse
import sys

from docs_build import blocks
from docs_build.tables import MAKERS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs_build", description=__doc__)
    parser.add_argument("--tables", action="store_true", help="only the tables")
    options = parser.parse_args()
    for path in blocks.documents():
        text = path.read_text()
        new = blocks.renewed(text, MAKERS)
        if new != text:
            path.write_text(new)
            print(path, file=sys.stderr)
    if not options.tables:
        from docs_build import pictures

        for picture in pictures.draw():
            print(picture, file=sys.stderr)


if __name__ == "__main__":
    main()
