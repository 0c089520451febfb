"""The backend that is forced by `backend=`, by `use_backend`, or by the environment variable `ATTN_N_BACKEND`."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

from attn_n.backends import registry
from attn_n.compilation import constant_when_compiled

ENVIRONMENT_VARIABLE = "ATTN_N_BACKEND"

# `os.environ.get` takes 0.7 us where a variable is not set: it encodes the name, and raises within. The dictionary
# behind it takes a tenth of that.
_variables = getattr(os.environ, "_data", None)
_in_environment: Callable[[], object] = (
    functools.partial(os.environ.get, ENVIRONMENT_VARIABLE)
    if _variables is None
    else functools.partial(_variables.get, os.environ.encodekey(ENVIRONMENT_VARIABLE))
)

_innermost: ContextVar[str | None] = ContextVar("attn_n_backend", default=None)


class _OfThread(threading.local):
    """A copy of `_innermost` for torch.compile, which guards attributes of objects but no context variables."""

    def __init__(self) -> None:
        self.innermost: str | None = None


_of_thread = _OfThread()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within `with use_backend(name):`, calls that pass no `backend=` use that one; None means automatic.

    It applies to this thread or task. The innermost one wins, and it wins over `ATTN_N_BACKEND`. Compiled functions see
    the one that was entered last in the thread: beside other tasks that enter one, call them when those are done.

    Raises:
        TypeError: the name is neither None nor a str.
        ValueError: the name is unknown.
    """
    if name is not None:
        if not isinstance(name, str):
            raise TypeError(f"use_backend: expected None or a name, got {type(name).__name__}")
        registry.find(name)
    token = None if torch.compiler.is_compiling() else _innermost.set(name or "")
    before, _of_thread.innermost = _of_thread.innermost, name or ""
    try:
        yield
    finally:
        if token is None:
            _of_thread.innermost = before
        else:
            _innermost.reset(token)
            _of_thread.innermost = _innermost.get()  # `before` may be that of another task


def forced(backend: str | None) -> tuple[str | None, str]:
    """Return the forced backend, if any, and what forces it."""
    if backend is not None:
        if not isinstance(backend, str):
            raise TypeError(f"backend: expected None or a name, got {type(backend).__name__}")
        return backend, "backend="
    named = _of_thread.innermost if torch.compiler.is_compiling() else _innermost.get()
    if named is not None:
        return named or None, "use_backend" if named else "automatic"
    return _of_environment()


def surroundings() -> tuple[object, object]:
    """Return what `forced` depends on besides its argument, where nothing is compiled."""
    return _innermost.get(), _in_environment()


@constant_when_compiled  # torch.compile does not guard the environment
def _of_environment() -> tuple[str | None, str]:
    named = os.environ.get(ENVIRONMENT_VARIABLE) if _in_environment() else None
    return (named, ENVIRONMENT_VARIABLE) if named else (None, "automatic")
