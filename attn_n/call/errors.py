"""The error of a call that no backend serves."""

from __future__ import annotations


class UnsupportedError(NotImplementedError):
    """No backend, or not the one that was named, serves this call; the text says why and what to do."""
