"""Which backends there are, which of them serves a call, and why the others do not."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from attn_n import order
from attn_n.backends.base import Backend, Family
from attn_n.call import AttentionCall
from attn_n.compilation import constant_when_compiled

ENVIRONMENT_VARIABLE = "ATTN_N_BACKEND"
ENTRY_POINT_GROUP = "attn_n.backends"

# Where each built-in backend lives. A module may import its library at its top: it is imported when first asked for.
BUILT_IN = {
    "triton": "attn_n.backends.triton",
    "sdpa": "attn_n.backends.sdpa",
    "flash_attn": "attn_n.backends.flash_attn",
    "xformers": "attn_n.backends.xformers",
    "reference": "attn_n.backends.reference",
}


class UnsupportedError(NotImplementedError):
    """No backend, or not the one that was named, serves this call; the text says why and what to do."""


@dataclass(frozen=True)
class Verdict:
    """What one backend says of one call.

    Attributes:
        reason: why it does not serve the call; None if it does.
        rank: its place in the automatic order, counted from 1; None if it serves only when it is named.
        by_name: why it has no place there, where there is something to say.
    """

    name: str
    reason: str | None
    rank: int | None
    by_name: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call and why, as `explain` returns and prints it."""

    call: AttentionCall
    chosen: str | None
    asked_by: str
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        width = max(len(verdict.name) for verdict in self.verdicts)
        lines, chosen = [f"call: {self.call}"], self.chosen or ""
        listed = [verdict.name for verdict in self.verdicts]
        serving = chosen if chosen in listed else chosen.partition(":")[0]
        for verdict in self.verdicts:
            mark = "->" if verdict.name == serving else "  "
            if verdict.reason is not None:
                said = f"no: {verdict.reason}"
            elif verdict.rank is None:
                said = "serves it, when asked for by name" + (f": {verdict.by_name}" if verdict.by_name else "")
            else:
                said = f"serves it, number {verdict.rank} in the automatic order"
            lines.append(f"{mark} {verdict.name:{width}}  {said}")
        return "\n".join([*lines, f"chosen: {self.chosen or 'none'} ({self.asked_by})"])


class _Entry:
    """A backend that is loaded when first asked for; `problem` says why it could not be.

    Loading runs foreign code: it imports modules, each under a lock of Python's own, and a module may call attn_n while
    it is imported. A lock of ours held meanwhile could therefore wait for a thread that waits for it. So none is held:
    threads that ask at the same time all load, which the locks of the imports turn into waiting, and what the first of
    them found is kept for all. Only then is the backend there.
    """

    def __init__(self, load: Callable[[], Backend], module: str | None = None) -> None:
        """`module` is what `load` imports."""
        self._load, self._module = load, module
        self._found: tuple[Backend | None, str | None] | None = None
        self._loading = threading.local()

    def load(self) -> None:
        """Returns once the backend or its problem is known, but within its own import."""
        if self._found is not None or getattr(self._loading, "here", False):
            return
        self._loading.here = True
        found: tuple[Backend | None, str | None]
        broken = False
        try:
            found = self._load(), None
        except ModuleNotFoundError as error:
            found = None, f"needs {error.name}, which is not installed"
        except Exception as error:  # a broken install can raise anything; its own words are the explanation
            if self._is_being_imported():
                return
            found = None, f"is installed but cannot be imported: {type(error).__name__}: {error}"
            broken = True
        finally:
            self._loading.here = False
        with _lock:
            first = self._found is None
            if first:
                self._found = found
                _changed()
        # Of others a call or `explain` names the backend, and is told.
        if first and broken and self._module in BUILT_IN.values():
            said = f"attn_n: {self._module} {found[1]}; the automatic choice passes over it"
            warnings.warn(said, RuntimeWarning, stacklevel=2)

    def get(self) -> tuple[Backend | None, str | None]:
        """The backend, or the reason why there is none."""
        return (None, "is being imported, and is there when that is done") if self._found is None else self._found

    def _is_being_imported(self) -> bool:
        """Whether this thread, or one that waits for it, is importing the module: then it has not its last word yet."""
        spec = getattr(sys.modules.get(self._module or ""), "__spec__", None)
        return bool(getattr(spec, "_initializing", False))


_entries: dict[str, _Entry] = {}
_entry_points_read = False
_generation = 0
_lock = threading.RLock()  # held for a few assignments, and never while foreign code runs
_innermost: ContextVar[str | None] = ContextVar("attn_n_backend", default=None)


class _OfThread(threading.local):
    """What `_innermost` holds, for torch.compile, which guards an attribute of an object but no context variable."""

    def __init__(self) -> None:
        self.innermost: str | None = None


_of_thread = _OfThread()


def register_backend(backend: Backend) -> None:
    """Make `backend` known by its name, in place of an earlier one of that name.

    It is used when named (`backend=`, `use_backend`, `ATTN_N_BACKEND`); the automatic order stays as it is. A package
    can register without being imported, by an entry point of the group `attn_n.backends` that loads to a `Backend`.

    Raises:
        TypeError: `backend` is not an instance of `attn_n.Backend`, or has no name.
        ValueError: its name is empty or has a colon, which separates a family from its member.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend: expected an instance of attn_n.Backend, got {type(backend).__name__}")
    name = getattr(backend, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"backend: expected an attribute name that is a str, got {type(name).__name__}")
    if not name or ":" in name:
        raise ValueError(f"backend: expected a name without a colon, got {name!r}")
    with _lock:
        _entries[name] = _Entry(lambda: backend)
        _changed()


def generation() -> int:
    """Grows when a backend is registered, and when one has been loaded: what was chosen before may no longer hold."""
    return _generation


def _changed() -> None:
    """To be called after the change: who reads the new number must find what it stands for."""
    global _generation
    _generation += 1


def names() -> list[str]:
    """The known backends, the built-in ones first."""
    _read_entry_points()
    return list(_entries)


def find(name: str) -> tuple[Backend | None, str | None]:
    """The backend called `name`, or the reason why it cannot be loaded.

    Raises:
        ValueError: nobody has registered that name.
    """
    base, colon, member = name.partition(":")
    _load(base)
    if base not in _entries:
        raise ValueError(_unknown(name, [one for known in names() for one in _with_members(known)]))
    backend, problem = _entries[base].get()
    if backend is None or not colon:
        return backend, problem
    members = backend.members if isinstance(backend, Family) else {}
    if member not in members:
        raise ValueError(_unknown(name, _with_members(base)))
    return members[member], None


def _with_members(name: str) -> list[str]:
    """A known backend, and the members of it if it is a family that can be loaded."""
    backend, _ = find(name)
    return [name, *(f"{name}:{member}" for member in (backend.members if isinstance(backend, Family) else ()))]


def _unknown(name: str, expected: list[str]) -> str:
    by_any_name = {one.partition(":")[2]: one for one in reversed(expected)} | {one: one for one in expected}
    near = difflib.get_close_matches(name.lower(), by_any_name, n=1)
    hint = f": did you mean {by_any_name[near[0]]!r}?" if near else ""
    return f"backend: expected one of {', '.join(expected)}, got {name!r}{hint}"


@constant_when_compiled  # an import cannot be traced
def _load(name: str) -> None:
    if name not in _entries:
        _read_entry_points()
    if name in _entries:
        _entries[name].load()


def loaded(name: str) -> Backend:
    """The backend called `name`, which has been chosen before and is therefore there."""
    return _loaded(name, _generation)


@functools.lru_cache(256)  # a call asks for its backend in a few places
def _loaded(name: str, generation: int) -> Backend:
    """With the generation, so that what was found before a change, and is kept only after it, is never found again."""
    backend, problem = find(name)
    if backend is None:
        raise UnsupportedError(f"backend {name}: {problem}")
    return backend


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within `with use_backend(name):`, calls that pass no `backend=` use that one; None means automatic.

    It holds for this thread or task, the innermost one wins, and it wins over `ATTN_N_BACKEND`. Compiled functions see
    that of the thread: a task that enters one beside others should call none of them before they are done.

    Raises:
        TypeError: the name is neither None nor a str.
        ValueError: the name is unknown.
    """
    if name is not None:
        if not isinstance(name, str):
            raise TypeError(f"use_backend: expected None or a name, got {type(name).__name__}")
        find(name)
    token = None if torch.compiler.is_compiling() else _innermost.set(name or "")
    before, _of_thread.innermost = _of_thread.innermost, name or ""
    try:
        yield
    finally:
        if token is None:
            _of_thread.innermost = before
        else:
            _innermost.reset(token)
            _of_thread.innermost = _innermost.get()  # and not `before`, which may be another task's


def forced(backend: str | None) -> tuple[str | None, str]:
    """The backend that is asked for by name, if any, and who asks."""
    if backend is not None:
        if not isinstance(backend, str):
            raise TypeError(f"backend: expected None or a name, got {type(backend).__name__}")
        return backend, "backend="
    named = _of_thread.innermost if torch.compiler.is_compiling() else _innermost.get()
    if named is not None:
        return named or None, "use_backend" if named else "automatic"
    return _of_environment()


@constant_when_compiled  # torch.compile does not guard the environment
def _of_environment() -> tuple[str | None, str]:
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return (named, ENVIRONMENT_VARIABLE) if named else (None, "automatic")


def choose(call: AttentionCall, backend: str | None) -> tuple[str, Backend]:
    """The backend that serves `call`: the one that is asked for, else the first of the automatic order.

    Raises:
        ValueError: an unknown name.
        UnsupportedError: the forced backend, or none at all, serves the call.
    """
    name, asked_by = forced(backend)
    try:
        served = _first(call, order.automatic(call) if name is None else (name,))
    except ValueError as error:
        raise ValueError(f"{asked_by}: {str(error).removeprefix('backend: ')}") from None
    if served is None:
        raise UnsupportedError(_refusal(call, name, asked_by))
    return served


def _first(call: AttentionCall, candidates: tuple[str, ...]) -> tuple[str, Backend] | None:
    """The first of the candidates that serves `call`, and of a family its member."""
    for candidate in candidates:
        found, _ = find(candidate)
        if found is None or _beyond(found, call) is not None:
            continue
        if isinstance(found, Family):
            member = found.serving(call)
            if member is not None:
                return f"{candidate}:{member}", found.members[member]
        elif found.why_not(call) is None:
            return candidate, found
    return None


def explain(call: AttentionCall, backend: str | None) -> Explanation:
    """What each backend says of `call`, and which one serves it."""
    name, asked_by = forced(backend)
    automatic = order.automatic(call)
    listed: dict[str, str | None] = dict.fromkeys([*automatic, *names()])
    for known in tuple(listed):
        backend_known, _ = find(known)
        if isinstance(backend_known, Family):
            listed |= {f"{known}:{member}": why for member, why in backend_known.by_name(call).items()}
    if name is not None and name not in listed:
        find(name)
        listed[name] = None
    verdicts = tuple(
        Verdict(known, why_not(known, call), automatic.index(known) + 1 if known in automatic else None, by_name)
        for known, by_name in listed.items()
    )
    served = _first(call, automatic if name is None else (name,))
    chosen = None if served is None else served[0]
    return Explanation(call, chosen, order.reason(call) if name is None else asked_by, verdicts)


def why_not(name: str, call: AttentionCall) -> str | None:
    """The reason why the backend called `name` does not serve `call`, or None if it does."""
    backend, problem = find(name)
    return problem if backend is None else _beyond(backend, call) or backend.why_not(call)


def _beyond(backend: Backend, call: AttentionCall) -> str | None:
    """Why a backend with an explicit backward cannot serve the call under this transform; None if it can."""
    if call.transform is None or backend.differentiates:
        return None
    return f"{call.transform} is served by differentiable operations alone, as those of reference"


def _refusal(call: AttentionCall, name: str | None, asked_by: str) -> str:
    explanation = explain(call, name)
    who = "no backend serves this call" if name is None else f"backend {name!r} ({asked_by}) does not serve this call"
    others = [verdict.name for verdict in explanation.verdicts if verdict.reason is None]
    remedy = (
        f"use {' or '.join(others)}, or leave the choice to the library" if others else "change the call as said above"
    )
    reasons = [f"  {verdict.name}: {verdict.reason or 'serves it'}" for verdict in explanation.verdicts]
    described = [f"  {call}"]
    if torch.compiler.is_compiling():  # torch.compile does not trace the text of symbolic lengths
        described = []
    return "\n".join([f"{who}:", *described, *reasons, f"To do: {remedy}."])


@constant_when_compiled  # which cannot trace what reads them
def _read_entry_points() -> None:
    global _entry_points_read
    if _entry_points_read:
        return
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        _entries.setdefault(point.name, _Entry(_loader(point), point.module))
    _entry_points_read = True


def _loader(point: importlib.metadata.EntryPoint) -> Callable[[], Backend]:
    def load() -> Backend:
        backend = point.load()
        backend = backend() if isinstance(backend, type) else backend
        if not isinstance(backend, Backend):
            raise TypeError(f"entry point {point.value} is a {type(backend).__name__}, not an attn_n.Backend")
        return backend

    return load


def _built_in(module: str) -> Callable[[], Backend]:
    def load() -> Backend:
        backend: Backend = importlib.import_module(module).BACKEND
        return backend

    return load


for _name, _module in BUILT_IN.items():
    _entries[_name] = _Entry(_built_in(_module), _module)
