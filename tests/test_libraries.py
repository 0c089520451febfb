"""FlashAttention 2, 3, 4 and xFormers: their refusals and imports, and on a GPU with them every n."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_n import UnsupportedError, flash_attention_n
from attn_n.backends.adapt.efficient import MemoryEfficientBackend
from attn_n.backends.adapt.library import Library
from attn_n.backends.adapt.signatures import changed_function
from attn_n.backends.flash_attn import version_2, version_3, version_4
from attn_n.call import Options
from attn_n.dispatch import serving
from tests import compare
from tests.calls import gpu_call
from tests.cases import Case, make, why_not_usable
from tests.operators import opcheck

BACKENDS = ("flash_attn:2", "flash_attn:3", "flash_attn:4", "xformers:flash", "xformers:cutlass")
INSTALLED = [
    pytest.param(
        name,
        marks=[pytest.mark.gpu, pytest.mark.skipif(why_not_usable(name) is not None, reason=f"{why_not_usable(name)}")],
    )
    for name in BACKENDS
]


def why_not(backend: str, **changes: object) -> str | None:
    return serving.why_not(backend, gpu_call(**changes))


WINDOW = {"window_left": 3, "window_right": None}
FEW_KEYS = {"k_shape": (2, 8, 9, 64), "v_shape": (2, 8, 9, 64)}


@pytest.mark.parametrize(
    ("backends", "changes", "reason"),
    [
        (BACKENDS, {"device": "cpu", "capability": None}, "runs on CUDA, not on cpu"),
        (BACKENDS, {"dtype": torch.float64}, "not float64"),
        (BACKENDS[:4], {"dtype": torch.float32}, "takes float16 and bfloat16, not float32"),
        (BACKENDS[:4], {"mask_shape": (1, 1, 1, 256), "mask_dtype": torch.bool}, "has no attn_mask"),
        (BACKENDS[:1], {"capability": (7, 5)}, "needs compute capability 8.0 or later, got 7.5"),
        (BACKENDS[1:2], {"capability": (8, 0)}, "is for compute capability 9.0, got (8, 0)"),
        (BACKENDS[2:3], {"capability": (8, 0)}, "is used here for compute capability 9.0 to 11.0, got (8, 0)"),
        (BACKENDS[3:], {"capability": (10, 0)}, "is used here for compute capability 8.0 to 9.0, got (10, 0)"),
        (BACKENDS[:4], {"v_shape": (2, 8, 256, 264)}, "takes head sizes up to 256, got 264"),
        (BACKENDS[:1], {"v_shape": (2, 8, 256, 256), "return_lse": True}, "of which one carries the gradient of lse"),
        (BACKENDS[2:3], {"v_shape": (2, 8, 256, 192), "capability": (10, 0)}, "takes head sizes up to 128, got 192"),
        (BACKENDS[1:3], {"alibi": True}, "has no alibi_slopes"),
        (BACKENDS[1:3], {"dropout_p": 0.1}, "has no dropout"),
        (BACKENDS[3:], {"dropout_p": 0.1}, "has no dropout"),
        (BACKENDS[:1], {"dropout_p": 0.1, "softcap": 2.0}, "takes no dropout together with softcap"),
        (BACKENDS[3:], {"softcap": 2.0}, "has no softcap"),
        (BACKENDS[3:4], {"alibi": True}, "has no alibi_slopes"),
        (BACKENDS[4:], {"alibi": True}, "rounds what is added to the logits to bfloat16"),
        (BACKENDS[:1] + BACKENDS[3:4], WINDOW | FEW_KEYS, "open to the right only for L <= S + 1"),
        (("sdpa:flash",), WINDOW | FEW_KEYS, "open to the right only for L <= S + 1"),
        (BACKENDS[3:4], WINDOW | {"sequences": 2}, "full attention, causal attention and causal windows alone"),
    ],
    ids=str,
)  # fmt: skip
def test_why_not(backends: tuple[str, ...], changes: dict[str, Any], reason: str) -> None:
    for backend in backends:
        assert reason in str(why_not(backend, **changes)), backend


def test_nothing_refuses_what_the_libraries_can_do() -> None:
    """Where a library can serve, the only reason not to is its installation."""
    for backend in BACKENDS:
        for changes in ({"return_lse": True}, {"window_right": 0}, {"sequences": 2, "window_right": 0}):
            reason = why_not(backend, **changes)
            assert reason == why_not_usable(backend) or "made without" in str(reason)
    for changes in ({"alibi": True}, {"dropout_p": 0.2}, {"softcap": 3.0}, {"window_left": 4, "window_right": 9}):
        assert why_not("flash_attn:2", **changes) == why_not_usable("flash_attn:2")
    assert why_not("xformers", dtype=torch.float32) == (
        None if why_not_usable("xformers:cutlass") is None else
        f"flash: takes float16 and bfloat16, not float32; cutlass: {why_not_usable('xformers:cutlass')}"
    )  # fmt: skip


MISSING = {
    "flash_attn:2": (version_2.LIBRARY, "needs flash-attn 2 (pip install flash-attn), which is not installed"),
    "flash_attn:4": (version_4.LIBRARY, "needs flash-attn 4 (pip install flash-attn-4), which is not installed"),
    "flash_attn:3": (
        version_3.LIBRARY,
        "needs FlashAttention 3 (from its source, or the forward alone by pip install tokenspeed-fa3), which is not"
        " installed",
    ),
    "xformers": (None, "needs xformers (pip install xformers), which is not installed"),
}


@pytest.mark.parametrize("backend", MISSING)
def test_a_library_that_is_not_installed(backend: str, ran: list[str]) -> None:
    library, said = MISSING[backend]
    name = library.packages[0] if library is not None else "xformers"
    if library.version() if library is not None else why_not_usable("xformers:flash") is None:
        pytest.skip(f"{name} is installed")
    assert said in str(why_not(backend))
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    with pytest.raises(UnsupportedError, match=f"backend '{backend}'"):
        flash_attention_n(q, k, v, backend=backend)
    assert ran == []


def library(module: str, **fields: Any) -> Library:
    return Library("some library", module, "pip install some", ("some-library", "torch"), **fields)


def test_how_a_library_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_broken.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    (tmp_path / "some_incomplete.py").write_text("import a_part_that_is_missing\n")
    (tmp_path / "some_namespace").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    found = importlib.metadata.version("torch")
    not_installed = "needs some library (pip install some), which is not installed"
    assert library("some_missing").why_not() == not_installed
    assert library("some_namespace.kernels").why_not() == not_installed
    for module, said in (
        ("some_broken", "cannot be imported: OSError: libcudart.so.12: cannot open shared object file"),
        ("some_incomplete", "needs a_part_that_is_missing, which is not"),
    ):
        reason = f"some library {found} is installed but {said}"
        with pytest.warns(RuntimeWarning, match=re.escape(f"attn_n: {reason}")):  # what it costs is not lost silently
            assert library(module).why_not() == reason
    assert library("torch", oldest="99.1").why_not() == f"needs some library 99.1 or later, found {found}"
    for oldest in ("2.0", found, None):
        assert library("torch", oldest=oldest).why_not() is None
    assert Library("some", "torch", "", ("some-library",), oldest="99.1").why_not() is None  # of an unknown version
    assert Library("some", "torch", "", ("some-library",), oldest="2.0").version() is None


def test_what_the_memory_efficient_backward_reads() -> None:
    """The backward gets a contiguous lse, also for one of several varlen sequences whose length needs no padding."""
    out, lse = torch.randn(1, 3, 64, 8), torch.randn(100, 3)[:64].T[None]
    dout, tokens_first, head_by_head = MemoryEfficientBackend().results(out, out, lse)
    assert dout.stride() == tokens_first.stride() == (64 * 3 * 8, 3 * 8, 8, 1)
    assert lse.stride(1) == 1
    assert head_by_head.stride()[1:] == (64, 1)
    assert torch.equal(head_by_head, lse)


def test_a_function_that_changed() -> None:
    assert changed_function(math, "comb", "n", "k") is None
    assert changed_function(math, "comb", "n", "sink") == "the installed math.comb has no sink"
    assert changed_function(math, "gone") == "the installed library has no math.gone"


def test_the_list_of_what_flash_attention_3_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without the list lacks nothing; a list that cannot be read is a reason not to serve."""
    monkeypatch.delitem(sys.modules, "flash_attn_config", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for text, said in (
        ("CONFIG = {'build_flags': {'FLASHATTENTION_DISABLE_BACKWARD': True}}", "was made without backward"),
        ("CONFIG = {'build_flags': {}}", "None"),
        ("CONFIG = {}", "cannot be read: KeyError: 'build_flags'"),
        ("from torch import not_there", "cannot be read: ImportError: cannot import name 'not_there'"),
    ):
        monkeypatch.delitem(sys.modules, "flash_attn_config", raising=False)
        (tmp_path / "flash_attn_config.py").write_text(f"{text}  # {len(text)}\n")
        importlib.invalidate_caches()
        assert said in str(version_3.left_out("BACKWARD"))
    monkeypatch.delitem(sys.modules, "flash_attn_config", raising=False)


def forward_only(backend: str) -> bool:
    """Make FlashAttention 3 a build without a backward, as most are."""
    return backend == "flash_attn:3" and bool(version_3.left_out("BACKWARD"))


KINDS_OF_N = (0.0, 1e-3, 1.0, 3.7, 1e4, "per head")


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("n", KINDS_OF_N)
def test_every_n(backend: str, dtype: torch.dtype, size: int, n: float | str, ran: list[str]) -> None:
    """Both passes and the gradient of n are right where n weighs as much as the keys: causal, GQA, varlen, long."""
    shift = math.log(n) if isinstance(n, float) and n else -1.0
    common: dict[str, Any] = {"size": size, "size_v": size, "n": n, "shift": shift, "heads_q": 4, "heads_kv": 2}
    for case in (
        Case("full", len_q=130, len_k=7, **common),
        Case("causal", len_q=150, len_k=150, causal=True, **common),
        Case("varlen", lengths_q=(5, 140, 9), lengths_k=(7, 160, 3), causal=True, **common),
        Case("few queries, many keys", len_q=5, len_k=3000, **{**common, "shift": shift - math.log(3000)}),
    ):
        inputs = make(case, dtype, "cuda")
        if forward_only(backend):
            got = compare.forward_of_library(inputs, backend)
            assert f"forward {backend}" in ran
        else:
            got = compare.library(inputs, backend, lse_grad=False)
            assert {f"forward {backend}", f"backward {backend}"} <= set(ran)
        excess = compare.excess(inputs, got, lse_grad="lse" in got)
        assert max(excess.values()) <= 1, (case, excess)


def on_gpu(length: int = 70, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    shapes = (2, 4, length, 64), (2, 2, length, 64), (2, 2, length, 64)
    return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backend", INSTALLED)
def test_opcheck(backend: str) -> None:
    """The fakes promise torch.compile the strides that the kernels return."""
    if forward_only(backend):
        pytest.skip("forward only")
    for first in ("heads", "tokens"):
        q, k, v = (x.detach() for x in on_gpu())
        if first == "tokens":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        opcheck(q, k, v, torch.linspace(-1, 1, 4, device="cuda"), backend, Options(0.125, None, 0))


@pytest.mark.parametrize("backend", INSTALLED)
def test_compile(backend: str) -> None:
    if forward_only(backend):
        pytest.skip("forward only")
    torch.compiler.reset()
    n = torch.linspace(0.5, 2.0, 4, device="cuda", requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention_n(q * 1.0, k, v, True, sm_n=n, backend=backend) * 2

    inputs = on_gpu()
    got, expected = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs), attend(*inputs)
    assert torch.allclose(got, expected, atol=2e-2)
    dout = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, (*inputs, n), dout) for out in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", [INSTALLED[0], INSTALLED[2]])
def test_deterministic_when_asked_for(backend: str) -> None:
    inputs, results = on_gpu(1000), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            out = flash_attention_n(*inputs, True, sm_n=1.0, backend=backend)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for found in results[1:] for a, b in zip(found, results[0], strict=True))
