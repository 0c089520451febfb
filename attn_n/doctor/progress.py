"""A line that says how far the report is, on a terminal."""

from __future__ import annotations

import os
import shutil
from typing import TextIO

WIDTH = 24  # of the bar
ERASE = "\r\x1b[K"


def is_terminal(stream: TextIO) -> bool:
    """Return True if the stream shows escape sequences to somebody."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """A bar that is written over again and again; nothing at all where the stream is no terminal, or None."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None and is_terminal(stream) else None

    def show(self, done: int, total: int, what: str) -> None:
        if self._stream is not None:
            filled = WIDTH * done // max(1, total)
            line = f"[{'#' * filled}{'.' * (WIDTH - filled)}] {done} of {total}  {what}"
            self._write(line[: shutil.get_terminal_size().columns - 1])

    def clear(self) -> None:
        self._write("")

    def _write(self, line: str) -> None:
        if self._stream is not None:
            self._stream.write(f"{ERASE}{line}")
            self._stream.flush()
