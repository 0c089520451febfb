"""Finds out whether a library can be imported."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType


@functools.cache
def why_absent(name: str, load: Callable[[str], ModuleType] = importlib.import_module) -> str | None:
    """Returns the reason why a module cannot be imported; None if it can."""
    try:
        load(name)
    except ModuleNotFoundError as missing:
        return f"{missing.name} is not installed"
    except Exception as failure:  # whatever a build for another torch or CUDA raises
        return one_line(failure)
    return None


def one_line(failure: Exception) -> str:
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
