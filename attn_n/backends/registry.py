"""The registry of backends: built-in ones, those of entry points, and those that were registered."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import sys
import threading
import warnings
from collections.abc import Callable

from attn_n.backends.base import Backend, Family
from attn_n.call import FEATURES
from attn_n.call.errors import UnsupportedError
from attn_n.compilation import constant_when_compiled

ENTRY_POINT_GROUP = "attn_n.backends"

# The modules of the built-in backends. Each is imported when first asked for, so it may import its library at its top.
BUILT_IN = {
    "triton": "attn_n.backends.triton",
    "sdpa": "attn_n.backends.sdpa",
    "flash_attn": "attn_n.backends.flash_attn",
    "xformers": "attn_n.backends.xformers",
    "reference": "attn_n.backends.reference",
}


class _Entry:
    """A backend that is loaded when first asked for, or the error of its import.

    Loading runs foreign code: it imports modules under Python's import locks, and a module may call attn_n while it is
    imported. A lock of ours held meanwhile could deadlock, so none is held. Threads that ask at the same time all load,
    which Python's import locks turn into waiting, and the result of the first one is kept for all.
    """

    def __init__(self, load: Callable[[], Backend], module: str | None = None) -> None:
        """`module` is the name of the module that `load` imports."""
        self._load, self._module = load, module
        self._found: tuple[Backend | None, str | None] | None = None
        self._loading = threading.local()

    def load(self) -> None:
        """Load the backend; return once it or its import error is known, or at once within its own import."""
        if self._found is not None or getattr(self._loading, "here", False):
            return
        self._loading.here = True
        found: tuple[Backend | None, str | None]
        broken = False
        try:
            found = self._load(), None
        except ModuleNotFoundError as error:
            found = None, f"needs {error.name}, which is not installed"
            broken = error.name != "triton"  # the one library that a backend of ours needs and an install may lack
        except Exception as error:  # a broken install can raise anything; its message is the explanation
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
        # The automatic choice would skip a broken built-in backend silently. Others run only if named, and the error
        # of that call tells.
        if first and broken and self._module in BUILT_IN.values():
            said = f"attn_n: {self._module} {found[1]}; the automatic choice passes over it"
            warnings.warn(said, RuntimeWarning, stacklevel=2)

    def get(self) -> tuple[Backend | None, str | None]:
        """Return the backend, or the reason why there is none."""
        return (None, "is being imported, and is there when that is done") if self._found is None else self._found

    def _is_being_imported(self) -> bool:
        """Return True while this thread, or one that waits for it, imports the module: its error is not final then."""
        spec = getattr(sys.modules.get(self._module or ""), "__spec__", None)
        return bool(getattr(spec, "_initializing", False))


_entries: dict[str, _Entry] = {}
_entry_points_read = False
generation = 0  # it grows when a backend is registered or loaded: earlier choices may no longer hold then
_lock = threading.RLock()  # held for a few assignments, and never while foreign code runs


def register_backend(backend: Backend) -> None:
    """Register `backend` by its name, in place of an earlier one of that name.

    It runs when named (`backend=`, `use_backend`, `ATTN_N_BACKEND`); the automatic order stays as it is. A package can
    register a backend without being imported, by an entry point of the group `attn_n.backends` that loads a `Backend`.

    Raises:
        TypeError: `backend` is not an instance of `attn_n.Backend`, or has no name.
        ValueError: its name is empty or has a colon, which separates a family from its member, or it honours what is
            not in `attn_n.FEATURES`.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend: expected an instance of attn_n.Backend, got {type(backend).__name__}")
    name = getattr(backend, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"backend: expected an attribute name that is a str, got {type(name).__name__}")
    if not name or ":" in name:
        raise ValueError(f"backend: expected a name without a colon, got {name!r}")
    if unknown := sorted(set(backend.honours) - FEATURES.keys()):
        raise ValueError(f"backend: expected honours of {', '.join(FEATURES)}; got {', '.join(map(repr, unknown))}")
    with _lock:
        _entries[name] = _Entry(lambda: backend)
        _changed()


def _changed() -> None:
    """Increase the generation. Call it after the change, so that a reader of the new number also finds the change."""
    global generation
    generation += 1


def names() -> list[str]:
    """Return the names of the known backends, the built-in ones first."""
    _read_entry_points()
    return list(_entries)


def find(name: str) -> tuple[Backend | None, str | None]:
    """Return the backend called `name`, or the reason why it cannot be loaded.

    Raises:
        ValueError: nobody has registered that name.
    """
    base, colon, member = name.partition(":")
    _load(base)
    if base not in _entries:
        raise ValueError(_unknown(name, [one for known in names() for one in _with_members(known)]))
    backend, import_error = _entries[base].get()
    if backend is None or not colon:
        return backend, import_error
    members = backend.members if isinstance(backend, Family) else {}
    if member not in members:
        raise ValueError(_unknown(name, _with_members(base)))
    return members[member], None


def _with_members(name: str) -> list[str]:
    """Return the name of a known backend, and the names of its members if it is a family that can be loaded."""
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
    """Return the backend called `name`, which has been chosen before and is therefore loaded."""
    return _loaded(name, generation)


@functools.lru_cache(256)  # a call asks for its backend in a few places
def _loaded(name: str, generation: int) -> Backend:
    """`generation` is part of the cache's key, so that a result from before a change is never found after it."""
    backend, import_error = find(name)
    if backend is None:
        raise UnsupportedError(f"backend {name}: {import_error}")
    return backend


@constant_when_compiled  # torch.compile cannot trace importlib.metadata
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
