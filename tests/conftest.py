"""Shared fixtures: which backend really ran, and a clean environment."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

# Tensors are small here, and threads that spin while they wait cost minutes where other programs run too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # on a CPU Triton's kernels run under its interpreter, chosen when they are defined
    os.environ["TRITON_INTERPRET"] = "1"

from attn_n.backends import registry
from attn_n.backends.base import Backend, Family, Prepared
from attn_n.call import canonical
from attn_n.dispatch import call_cache, forced
from tests.ranks import Pools

LONGEST = ("ahead_of_time", "random_calls", "inductor")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    # The longest come first, so that no worker is left with one at the end.
    items.sort(key=lambda item: not any(part in item.name for part in LONGEST))


@pytest.fixture(autouse=True)
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with the automatic choice, whatever the shell's variable is, and from the same random state."""
    monkeypatch.delenv(forced.ENVIRONMENT_VARIABLE, raising=False)
    call_cache.clear()
    monkeypatch.setattr(canonical, "_warned", True)  # of rows without keys, which many cases have on purpose
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def gives_back_the_gpu() -> Iterator[None]:
    """Free cached GPU memory: several processes share one GPU, and the exact results in float64 take gigabytes."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 1 << 28:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """The ranks of tests of `attn_n.distributed`."""
    pools = Pools()
    yield pools
    pools.stop()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the built-in kernels whose code was entered, in order: `"forward sdpa:cpu"` and the like."""
    entered: list[str] = []
    for name in registry.BUILT_IN:
        backend, _ = registry.find(name)
        if backend is None:
            continue
        for kernel in backend.members.values() if isinstance(backend, Family) else (backend,):
            if kernel.differentiates:
                monkeypatch.setattr(kernel, "attend", _spied(kernel.attend, f"attend {kernel.name}", entered))
                continue
            for method in ("forward", "backward"):
                spied = _spied_once(getattr(kernel, method), f"{method} {kernel.name}", entered)
                monkeypatch.setattr(kernel, method, spied)
            monkeypatch.setattr(kernel, "prepare", functools.partial(_prepare, kernel, kernel.prepare, entered))
    return entered


def _prepare(kernel: Backend, prepare: Callable[..., Prepared], entered: list[str], *arguments: object) -> Prepared:
    passes = prepare(*arguments)
    if passes is kernel:
        return passes
    forward = _spied_once(passes.forward, f"forward {kernel.name}", entered)
    backward = _spied_once(passes.backward, f"backward {kernel.name}", entered)
    return SimpleNamespace(forward=forward, backward=backward)  # type: ignore[return-value]


def _spied(original: Callable[..., object], what: str, entered: list[str]) -> Callable[..., object]:
    def spied(*args: object, **kwargs: object) -> object:
        entered.append(what)
        return original(*args, **kwargs)

    return spied


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.within: set[str] = set()


_of_thread = _OfThread()


def _spied_once(original: Callable[..., object], what: str, entered: list[str]) -> Callable[..., object]:
    """Note that `original` is entered, but not again from within: a prepared call may hand on to its backend."""

    def spied(*args: object, **kwargs: object) -> object:
        if what in _of_thread.within:
            return original(*args, **kwargs)
        entered.append(what)
        _of_thread.within.add(what)
        try:
            return original(*args, **kwargs)
        finally:
            _of_thread.within.remove(what)

    return spied
