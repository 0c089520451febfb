"""First calls may come from several threads: none sees a backend half loaded, and none waits for ever."""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_n
from attn_n import flash_attention_n
from attn_n.backends import registry
from attn_n.backends.adapt.library import Library
from attn_n.dispatch import order, serving
from tests.calls import Eager, inputs
from tests.oracle import attention_n

SECONDS = 30.0  # after which a test has failed; nothing here takes long


@pytest.fixture(autouse=True)
def no_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own copy of the registry."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    executor = ThreadPoolExecutor(4)
    yield executor
    executor.shutdown(wait=False, cancel_futures=True)


class Gate:
    """A gate at which a thread announces itself and waits until the gate is opened."""

    def __init__(self) -> None:
        self.reached, self._open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self._open.wait(SECONDS)

    def wait(self) -> None:
        assert self.reached.wait(SECONDS)

    def open(self) -> None:
        self._open.set()


def waits(future: Future[Any]) -> bool:
    try:
        future.result(0.2)
    except concurrent.futures.TimeoutError:  # no other than the built-in one from Python 3.11 on
        return True
    return False


def slow(backend: attn_n.Backend, gate: Gate) -> registry._Entry:
    def load() -> attn_n.Backend:
        gate()
        return backend

    return registry._Entry(load)


def first_call(backend: str | None) -> Tensor:
    q, k, v = inputs()
    out = flash_attention_n(q, k, v, True, sm_n=2.0, backend=backend)
    exact = attention_n(q.double(), k.double(), v.double(), causal=True, n=2.0)[0]
    assert torch.allclose(out.double(), exact, atol=1e-6)  # threads draw in any order, so that an element may be small
    return out


@pytest.mark.parametrize("named", [True, False], ids=["by name", "automatic"])
def test_who_comes_while_a_backend_is_loaded_waits(
    named: bool, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    backend, _ = registry.find("sdpa")
    assert backend is not None
    gate = Gate()
    monkeypatch.setitem(registry._entries, "sdpa", slow(backend, gate))
    name = "sdpa" if named else None
    first = pool.submit(first_call, name)
    gate.wait()
    second = pool.submit(first_call, name)
    asked = pool.submit(attn_n.explain, *inputs())
    assert waits(second)
    gate.open()
    assert asked.result(SECONDS).chosen == "sdpa:cpu"
    first.result(SECONDS)
    second.result(SECONDS)
    first_call(name)
    assert ran == ["forward sdpa:cpu"] * 3


def test_a_call_prepared_while_a_backend_was_loaded_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    """A backend whose import calls attn_n is unavailable to that call, and available to the next one like it."""
    backend, _ = registry.find("sdpa")
    assert backend is not None
    eager = Eager()
    attn_n.register_backend(eager)
    monkeypatch.setitem(order.DEFAULT, "cpu", ("sdpa", "eager", "reference"))
    within: list[str | None] = []

    def load() -> attn_n.Backend:
        first_call(None)
        within.append(attn_n.explain(*inputs(), True).chosen)
        return backend

    monkeypatch.setitem(registry._entries, "sdpa", registry._Entry(load))
    first_call(None)
    assert within == ["eager"]
    first_call(None)
    assert ran == ["forward sdpa:cpu"] * 2


def test_a_module_that_asks_for_itself_while_another_thread_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    """A thread that imports such a module holds its import lock while the module asks attn_n for all backends."""
    gate = Gate()
    monkeypatch.setitem(sys.modules, "third_gate", types.SimpleNamespace(gate=gate))  # type: ignore[arg-type]
    (tmp_path / "third_self.py").write_text(
        "import attn_n, torch, third_gate\nfrom tests.calls import Eager\nthird_gate.gate()\n"
        "q = torch.randn(1, 2, 5, 8)\n"
        "SAID = {v.name: v.reason for v in attn_n.explain(q, q, q, True).verdicts}\nBACKEND = Eager()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    point = importlib.metadata.EntryPoint("third", "third_self:BACKEND", registry.ENTRY_POINT_GROUP)
    monkeypatch.setitem(registry._entries, "third", registry._Entry(registry._loader(point), point.module))
    imported = pool.submit(importlib.import_module, "third_self")
    gate.wait()
    second = pool.submit(first_call, "third")
    assert waits(second)
    gate.open()
    assert imported.result(SECONDS).SAID["third"] == "is being imported, and is there when that is done"
    second.result(SECONDS)
    assert serving.why_not("third", attn_n.explain(*inputs(), True).call) is None
    monkeypatch.delitem(sys.modules, "third_self")


def test_entry_points_that_are_being_read_are_not_yet_read(
    monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    gate = Gate()

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        gate()
        return [importlib.metadata.EntryPoint("third", "tests.calls:Eager", group)]

    monkeypatch.setattr(registry, "_entry_points_read", False)
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    first = pool.submit(attn_n.backends)
    gate.wait()
    second = pool.submit(first_call, "third")
    assert waits(second)
    gate.open()
    assert "third" in first.result(SECONDS)
    second.result(SECONDS)


def test_what_was_found_before_a_registration_is_not_kept_after_it(
    monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    earlier, later, gate, find = Eager(), Eager(), Gate(), registry.find

    def slow_find(name: str) -> Any:
        found = find(name)
        gate()
        return found

    attn_n.register_backend(earlier)
    monkeypatch.setattr(registry, "find", slow_find)
    first = pool.submit(registry.loaded, "eager")
    gate.wait()
    attn_n.register_backend(later)
    gate.open()
    assert first.result(SECONDS) is earlier
    assert registry.loaded("eager") is later


def test_a_library_that_xformers_hides_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    """Importing xFormers hides flash_attn from all threads where only FlashAttention 4 is installed."""
    from attn_n.backends import xformers

    if any(importlib.util.find_spec(name) for name in ("xformers", "flash_attn")):
        pytest.skip("the real ones are installed")
    gate = Gate()
    monkeypatch.setitem(sys.modules, "third_gate", types.SimpleNamespace(gate=gate))  # type: ignore[arg-type]
    for file, text in {
        "flash_attn/cute/interface.py": "",
        "flash_attn/cute/__init__.py": "",
        "xformers/__init__.py": "",
        "xformers/ops.py": "import sys, third_gate\nHIDDEN = sys.modules['flash_attn'] is None\nthird_gate.gate()\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        first = pool.submit(Library("xformers", "xformers.ops", "", ("xformers",), load=xformers.load).why_not)
        gate.wait()
        second = pool.submit(Library("flash-attn 4", "flash_attn.cute.interface", "", ("flash-attn-4",)).why_not)
        assert waits(second)
        gate.open()
        assert first.result(SECONDS) is second.result(SECONDS) is None
        assert sys.modules["xformers.ops"].HIDDEN
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("xformers", "flash_attn")]:
            del sys.modules[name]


FIRST_CALLS = """
import sys, threading
import torch
import attn_n
from attn_n import flash_attention_n
from attn_n.dispatch import choose
from attn_n.backends import registry
from tests.oracle import attention_n

scenario, count = sys.argv[1], 6
if scenario != "explain":  # PyTorch's compiler is not to be imported in the midst of it
    import torch._dynamo
sys.setswitchinterval(1e-6)
generator = torch.Generator().manual_seed(0)
calls = [[torch.randn(1, 2, 5 + i, 16, generator=generator) for _ in range(3)] for i in range(count)]
barrier, failures = threading.Barrier(count), []
for name in ("sdpa", "reference"):
    assert registry._entries[name].get()[0] is None, "already loaded"


def attend(q, k, v):
    return flash_attention_n(q, k, v, True, sm_n=2.0, backend="triton" if scenario == "triton" else None)


def one(i):
    q, k, v = (x.clone().requires_grad_() for x in calls[i])
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out_exact = attention_n(*exact, causal=True, n=2.0)[0]
    gradients_exact = torch.autograd.grad(out_exact.sum(), exact)
    barrier.wait()
    try:
        if scenario == "explain":
            chosen = attn_n.explain(q, k, v, True).chosen
            assert chosen == "sdpa:cpu", chosen
        function = torch.compile(attend, backend="eager", fullgraph=True) if scenario == "compile" else attend
        for _ in range(2):
            out = function(q, k, v)
            gradients = torch.autograd.grad(out.sum(), (q, k, v))
            for x, expected in zip((out, *gradients), (out_exact, *gradients_exact)):
                assert torch.allclose(x.double(), expected, atol=1e-5), (x, expected)
    except BaseException as error:
        failures.append(f"{type(error).__name__}: {error}"[:500])


threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(count)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
    assert not thread.is_alive(), "waits for ever"
assert not failures, failures
print(sorted(name for name in registry.BUILT_IN if registry._entries[name].get()[0] is not None))
"""


@pytest.mark.parametrize(
    ("scenario", "loaded"),
    [
        ("automatic", "['sdpa']"),
        ("compile", "['sdpa']"),
        ("explain", "['flash_attn', 'reference', 'sdpa', 'triton', 'xformers']"),
        ("triton", "['triton']"),  # under the interpreter, which itself is for one thread
    ],
)
def test_first_calls_of_a_process(scenario: str, loaded: str) -> None:
    if scenario in ("explain", "triton"):
        pytest.importorskip("triton")
    if scenario == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    command = [sys.executable, "-c", FIRST_CALLS, scenario]
    root = Path(__file__).parents[1]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr[-3000:]
    assert said.stdout.splitlines()[-1] == loaded


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton:hopper", "triton:portable", "sdpa:flash", None])
def test_first_launches_from_several_threads(backend: str | None, pool: ThreadPoolExecutor) -> None:
    """Threads with different lengths, some of which share a kernel that none has loaded yet, all get right results."""
    if backend == "triton:hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("runs on compute capability 9.0")
    barrier = threading.Barrier(4)

    def one(i: int) -> None:
        q, k, v = (torch.randn(1, 2, 203 + i // 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        out_exact = attention_n(*exact, causal=True, n=2.0)[0]
        expected = torch.autograd.grad(out_exact.sum(), exact)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        barrier.wait(SECONDS)
        out = flash_attention_n(*leaves, True, sm_n=2.0, backend=backend)
        got = torch.autograd.grad(out.sum(), leaves)
        for x, exactly in zip((out, *got), (out_exact, *expected), strict=True):
            assert torch.allclose(x.double(), exactly, atol=5e-2, rtol=5e-2)

    for done in [pool.submit(one, i) for i in range(4)]:
        done.result(10 * SECONDS)
