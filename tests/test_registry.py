"""The choice of a backend, forced and automatic, and the texts that explain it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attn_n
from attn_n import AttentionCall, Backend, UnsupportedError, flash_attention_n, use_backend
from attn_n.backends import registry
from attn_n.call import FEATURES
from attn_n.dispatch import choose, explanation, order
from tests.calls import Eager, gpu_call, inputs, varlen


@pytest.fixture(autouse=True)
def no_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own copy of the registry."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(registry, "_entry_points_read", False)


def test_automatic_is_sdpa_on_cpu(ran: list[str]) -> None:
    flash_attention_n(*inputs(), sm_n=1.0)
    assert ran == ["forward sdpa:cpu"]


def test_automatic_falls_through_to_the_reference(ran: list[str]) -> None:
    flash_attention_n(*inputs(), sm_n=1.0, dropout_p=0.25)
    assert ran == ["attend reference"]


def test_who_wins(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """backend= wins over use_backend (the innermost), that over the environment, and that over the automatic order."""
    monkeypatch.setenv("ATTN_N_BACKEND", "reference")
    flash_attention_n(*inputs())
    with use_backend("sdpa"):
        flash_attention_n(*inputs())
        with use_backend("reference"):
            flash_attention_n(*inputs())
            flash_attention_n(*inputs(), backend="sdpa")
        flash_attention_n(*inputs())
    monkeypatch.setenv("ATTN_N_BACKEND", "")
    flash_attention_n(*inputs())
    monkeypatch.setenv("ATTN_N_BACKEND", "reference")
    with use_backend(None):
        flash_attention_n(*inputs())
    assert ran == [
        "attend reference", "forward sdpa:cpu", "attend reference", "forward sdpa:cpu", "forward sdpa:cpu",
        "forward sdpa:cpu", "forward sdpa:cpu",
    ]  # fmt: skip


def test_use_backend_holds_for_its_own_thread(ran: list[str]) -> None:
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: flash_attention_n(*inputs()))
        thread.start()
        thread.join()
    assert ran == ["forward sdpa:cpu"]


def test_use_backend_in_tasks_beside_each_other(ran: list[str]) -> None:
    """Each task has its own use_backend, of which nothing remains afterwards, for compiled functions either."""

    async def task(name: str, entered: asyncio.Event, leave: asyncio.Event) -> None:
        with use_backend(name):
            entered.set()
            await leave.wait()
            flash_attention_n(*inputs())

    async def both() -> None:
        events = [asyncio.Event() for _ in range(4)]
        first = asyncio.create_task(task("reference", events[0], events[1]))
        await events[0].wait()
        second = asyncio.create_task(task("sdpa", events[2], events[3]))
        await events[2].wait()
        events[1].set()
        await first
        events[3].set()
        await second

    asyncio.run(both())
    assert ran == ["attend reference", "forward sdpa:cpu"]
    torch.compiler.reset()
    torch.compile(lambda *x: flash_attention_n(*x, sm_n=1.0), backend="eager", fullgraph=True)(*inputs())
    assert ran[-1] == "forward sdpa:cpu"


def test_use_backend_ends_after_an_error(ran: list[str]) -> None:
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    flash_attention_n(*inputs())
    assert ran == ["forward sdpa:cpu"]


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(
            ValueError,
            match=r"backend: expected one of triton, .*sdpa, sdpa:cpu, .*xformers:cutlass, reference, got 'fast'",
        ),
        use_backend("fast"),
    ):
        pass
    monkeypatch.setenv("ATTN_N_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"ATTN_N_BACKEND: expected one of triton, .*, got 'fastest'"):
        flash_attention_n(*inputs())
    for number, kind in ((3, "int"), (["a"], "list"), (b"sdpa", "bytes")):
        with pytest.raises(TypeError, match=f"use_backend: expected None or a name, got {kind}"), use_backend(number):  # type: ignore[arg-type]
            pass
    for name in ("sdpa:", "reference:"):
        with pytest.raises(ValueError, match=f"backend: expected one of .*, got '{name}'"), use_backend(name):
            pass
        monkeypatch.setenv("ATTN_N_BACKEND", name)
        with pytest.raises(ValueError, match=f"ATTN_N_BACKEND: expected one of .*, got '{name}'"):
            flash_attention_n(*inputs())
    with pytest.raises(ValueError, match="expected one of reference, got 'reference:fast'"):
        flash_attention_n(*inputs(), backend="reference:fast")
    for name, near in (("tritn", "triton"), ("cudnn", "sdpa:cudnn"), ("SDPA", "sdpa"), ("sdpa:cdnn", "sdpa:cudnn")):
        with pytest.raises(ValueError, match=f"got '{name}': did you mean '{near}'"):
            flash_attention_n(*inputs(), backend=name)
    with pytest.raises(ValueError, match=r"got 'zzz'$"):
        flash_attention_n(*inputs(), backend="zzz")


@pytest.mark.parametrize("how", ["argument", "context", "variable"])
def test_a_forced_backend_never_falls_back(how: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked_by = {"argument": "backend=", "context": "use_backend", "variable": "ATTN_N_BACKEND"}[how]
    if how == "variable":
        monkeypatch.setenv("ATTN_N_BACKEND", "sdpa")
    context = use_backend("sdpa") if how == "context" else contextlib.nullcontext()
    with context, pytest.raises(UnsupportedError) as caught:
        flash_attention_n(*inputs(), dropout_p=0.25, backend="sdpa" if how == "argument" else None)
    text = str(caught.value)
    assert text.startswith(f"backend 'sdpa' ({asked_by}) does not serve this call:\n  q (1, 2, 5, 8)")
    assert "dropout 0.25" in text
    assert "sdpa: cpu: has no dropout" in text
    assert "To do: use reference or triton, or leave the choice to the library." in text
    assert ran == []


def test_explain(capsys: pytest.CaptureFixture[str], ran: list[str]) -> None:
    explanation = attn_n.explain(*inputs(), True, sm_n=1.0, dropout_p=0.1)
    assert explanation.chosen == "reference"
    assert [(v.name, v.rank) for v in explanation.verdicts] == [
        ("sdpa", 1), ("reference", 2), ("triton", None), ("flash_attn", None), ("xformers", None),
    ]  # fmt: skip
    assert explanation.verdicts[0].reason == "cpu: has no dropout"
    assert capsys.readouterr().out.strip() == str(explanation)
    assert "causal, dropout 0.1, n: float" in str(explanation)
    assert "read as B = 1, Hq = 2, Hkv = 2, L = 5, S = 5, E = 8, Ev = 8, float32" in str(explanation)
    assert "-> reference   serves it, number 2 in the automatic order" in str(explanation)
    assert "chosen: reference (automatic)" in str(explanation)
    assert len({attn_n.explain(*inputs()) for _ in range(2)}) == 1  # what is equal hashes alike
    assert attn_n.explain(*inputs()).chosen == "sdpa:cpu"
    assert attn_n.explain(*inputs(), dropout_p=0.25, backend="sdpa").chosen is None
    assert attn_n.explain(*inputs(), backend="sdpa:flash").chosen is None
    named = attn_n.explain(*inputs(), backend="sdpa:cpu")
    assert (named.verdicts[-1].name, named.verdicts[-1].reason) == ("sdpa:cpu", None)
    assert "-> sdpa:cpu " in str(named)
    with use_backend("reference"):
        assert attn_n.explain(*inputs()).chosen == "reference"
    varlen = torch.randn(5, 2, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    said = str(attn_n.explain(*varlen, starts, starts, 3, 3))
    assert "varlen q (5, 2, 8)" in said
    assert "read as sequences = 2, Hq = 2, Hkv = 2, Tq = 5, Tk = 5, E = 8, Ev = 8" in said
    assert ran == []


def test_a_registered_backend() -> None:
    attn_n.register_backend(Eager())
    assert "eager" in attn_n.backends()
    q, k, v = inputs()
    expected = flash_attention_n(q, k, v, True, sm_n=2.0, backend="reference")
    assert torch.allclose(flash_attention_n(q, k, v, True, sm_n=2.0, backend="eager"), expected, atol=1e-6)
    assert str(attn_n.explain(q, k, v, True)).count("eager       serves it, when asked for by name") == 1
    with pytest.raises(UnsupportedError, match="eager: only causal"):
        flash_attention_n(q, k, v, backend="eager")
    with pytest.raises(TypeError, match=r"expected an instance of attn_n\.Backend, got type"):
        attn_n.register_backend(Eager)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="backend: expected an attribute name that is a str, got NoneType"):
        attn_n.register_backend(attn_n.Backend())
    unnamed = Eager()
    for name, text in (("a:b", "without a colon, got 'a:b'"), ("", "without a colon, got ''")):
        unnamed.name = name
        with pytest.raises(ValueError, match=f"backend: expected a name {text}"):
            attn_n.register_backend(unnamed)


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points may be good, lack a module, be broken, or be no backend; each is reported."""
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    names = {
        "good": "third_good:BACKEND",
        "missing": "third_missing:B",
        "broken": "third_broken:B",
        "number": "third_good:N",
    }
    lines = "\n".join(f"{name} = {target}" for name, target in names.items())
    (info / "entry_points.txt").write_text(f"[attn_n.backends]\n{lines}\n")
    (tmp_path / "third_good.py").write_text("from tests.calls import Eager\nBACKEND = Eager\nN = 3\n")
    (tmp_path / "third_missing.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "third_broken.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()

    assert attn_n.backends() == [
        "triton", "sdpa", "flash_attn", "xformers", "reference", "good", "missing", "broken", "number",
    ]  # fmt: skip
    assert flash_attention_n(*inputs(), True, backend="good").shape == (1, 2, 5, 8)
    said = {verdict.name: verdict.reason for verdict in attn_n.explain(*inputs(), True).verdicts}
    assert said["good"] is None
    assert said["missing"] == "needs a_library_that_is_not_there, which is not installed"
    assert said["broken"] == (
        "is installed but cannot be imported: OSError: libcudart.so.12: cannot open shared object file"
    )
    assert said["number"] is not None
    assert "third_good:N is a int, not an attn_n.Backend" in said["number"]
    with pytest.raises(UnsupportedError, match=r"libcudart\.so\.12"):
        flash_attention_n(*inputs(), True, backend="broken")


def test_operators_that_pytorch_changed() -> None:
    """why_not names the operator that has changed."""
    from attn_n.backends.adapt.signatures import changed_operator

    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert changed_operator(f"{name}(query, key, value, dropout_p, is_causal, *, attn_mask, scale) -> 2") is None
    for changed in (
        f"{name}(query, key, values) -> 2",
        f"{name}(query, key) -> 2",
        f"{name}(query, key, value, *, sink) -> 2",
        f"{name}(query, key, value, *, scale) -> 3",
    ):
        assert f"PyTorch {torch.__version__} has changed its operator {name}" in str(changed_operator(changed))
    assert f"PyTorch {torch.__version__} has no operator aten::_gone" in str(
        changed_operator("aten::_gone(query) -> 1")
    )
    assert str(changed_operator("some::gone(query)")) == "the installed library has no operator some::gone"


def test_a_changed_operator_is_the_reason_not_to_serve(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    from attn_n.backends.sdpa import cpu

    monkeypatch.setattr(cpu, "_SIGNATURES", ("aten::_gone(query) -> 1",))
    with pytest.raises(UnsupportedError, match="has no operator aten::_gone"):
        flash_attention_n(*inputs(), backend="sdpa")
    flash_attention_n(*inputs())
    assert ran == ["attend reference"]


bool_mask = {"mask_shape": (1, 1, 256, 256), "mask_dtype": torch.bool}
float_mask = bool_mask | {"mask_dtype": torch.bfloat16}
odd = {"q_stride": (139264, 17408, 68, 1)}  # strides that TMA cannot have
long = {"k_shape": (2, 8, 3000, 64), "v_shape": (2, 8, 3000, 64)}
many = {"q_shape": (32, 8, 256, 64), "k_shape": (32, 8, 3000, 64), "v_shape": (32, 8, 3000, 64)}
longer = {"k_shape": (2, 8, 5000, 64), "v_shape": (2, 8, 5000, 64)}
wide = {
    name: (2, 8, 3000 if name[0] != "q" else 256, 256) for name in ("q_shape", "k_shape", "v_shape")
} | {f"{x}_stride": (8 * 3000 * 256, 3000 * 256, 256, 1) for x in "qkv"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "features", "said"),
    [
        ({}, (), ""),
        ({"window_right": 0}, ("causal",), ", causal"),
        ({"window_left": 3}, ("window",), ", window (3, None)"),
        ({"window_left": 3, "window_right": 0}, ("window",), ", window (3, 0)"),
        ({"window_right": 2}, ("window",), ", window (None, 2)"),
        ({"window_right": -2}, ("window", "negative window"), ", window (None, -2)"),
        ({"softcap": 2.5}, ("softcap",), ", softcap 2.5"),
        (float_mask, ("mask",), ", bfloat16 mask (1, 1, 256, 256)"),
        (bool_mask | {"mask_needs_grad": True}, ("mask", "mask gradient"), ", bool mask (1, 1, 256, 256)"),
        ({"alibi": True}, ("alibi",), ", ALiBi"),
        ({"alibi": True, "alibi_needs_grad": True}, ("alibi", "alibi gradient"), ", ALiBi"),
        ({"dropout_p": 0.5}, ("dropout",), ", dropout 0.5"),
        ({"n_kind": "float"}, (), ", n: float"),
        ({"n_kind": "per row"}, ("n a row",), ", n: per row"),
        ({"return_lse": True}, (), ", returns lse"),
        ({"needs_grad": True}, (), ", needs gradients"),
        ({"return_lse": True, "needs_grad": True}, ("lse gradient",), ", returns lse, needs gradients"),
        ({"transform": "forward-mode AD"}, (), ", forward-mode AD"),
        ({"seqused": True}, ("seqused",), ", seqused"),
        ({"leftpad": True}, ("leftpad",), ", leftpad_k"),
        ({"cache": True}, ("cache",), ", KV cache"),
        ({"block_table": 9}, ("block table",), ", paged KV cache"),
    ],
    ids=str,
)
def test_what_a_call_asks_for(changes: dict[str, object], features: tuple[str, ...], said: str) -> None:
    """Each argument has its name in refusals, and the text of a call shows it."""
    shapes = {"q_shape": (2, 8, 5, 64), "k_shape": (2, 4, 6, 64), "v_shape": (2, 4, 6, 32), "needs_grad": False}
    call = gpu_call(**shapes | changes)
    assert call.features == frozenset(features)
    assert call.features.issubset(FEATURES)
    assert hash(call) == hash(gpu_call(**shapes | changes))
    assert str(call) == (
        "q (2, 8, 5, 64), k (2, 4, 6, 64), v (2, 4, 6, 32), read as B = 2, Hq = 8, Hkv = 4, L = 5, S = 6, E = 64,"
        f" Ev = 32, bfloat16 on cuda sm_90{said}"
    )


def test_the_description_of_a_call() -> None:
    q, k = torch.randn(2, 7, 4, 16).transpose(1, 2), torch.randn(2, 2, 9, 16)
    v, mask, slopes = torch.randn(2, 2, 9, 8), torch.randn(7, 9, requires_grad=True), torch.rand(4)
    options = {"attn_mask": mask, "window": (3, 2), "softcap": 5.0, "alibi_slopes": slopes, "dropout_p": 0.25}
    assert attn_n.explain(q, k, v, sm_n=1.0, return_lse=True, **options).call == AttentionCall(
        device="cpu", capability=None, dtype=torch.float32, q_shape=(2, 4, 7, 16), k_shape=(2, 2, 9, 16),
        v_shape=(2, 2, 9, 8), q_stride=(448, 16, 64, 1), k_stride=(288, 144, 16, 1), v_stride=(144, 72, 8, 1),
        window_left=3, window_right=2, softcap=5.0, dropout_p=0.25, mask_shape=(1, 1, 7, 9), mask_dtype=torch.float32,
        alibi=True, n_kind="float", return_lse=True, needs_grad=True, mask_needs_grad=True,
    )  # fmt: skip
    q, starts = torch.randn(6, 2, 8, requires_grad=True), torch.tensor([0, 2, 6], dtype=torch.int32)
    slopes.requires_grad_()
    found = attn_n.explain(q, q, q, starts, starts, 4, 4, True, sinks=torch.zeros(2), alibi_slopes=slopes[:2])
    of_x = {f"{x}_{name}": value for x in "qkv" for name, value in (("shape", (6, 2, 8)), ("stride", (16, 8, 1)))}
    assert found.call == AttentionCall(
        device="cpu", capability=None, dtype=torch.float32, **of_x, window_right=0, alibi=True, n_kind="per head",
        sequences=2, needs_grad=True, alibi_needs_grad=True,
    )  # fmt: skip


def test_the_text_of_a_varlen_call() -> None:
    shapes = {"q_shape": (9, 8, 64), "k_shape": (7, 4, 64), "v_shape": (7, 4, 32)}
    call = gpu_call(**shapes, sequences=3, device="cpu", capability=None, dtype=torch.float32)
    assert call.features == {"varlen"}
    assert str(call) == (
        "varlen q (9, 8, 64), k (7, 4, 64), v (7, 4, 32), read as sequences = 3, Hq = 8, Hkv = 4, Tq = 9, Tk = 7,"
        " E = 64, Ev = 32, float32 on cpu, needs gradients"
    )


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, 256),
        ({"window_right": 0}, 256),
        ({"window_left": 10}, 256),
        ({"window_left": 10, "window_right": 0}, 11),
        ({"window_left": 10, "window_right": 5}, 16),
        ({"window_left": 0, "window_right": 5}, 6),
        ({"window_left": 200, "window_right": 100}, 256),
        (varlen, 250),
        (varlen | {"window_left": 10, "window_right": 5}, 16),
        (varlen | {"sequences": 0}, 500),
        ({"window_right": -1}, 255),
        ({"window_right": -300}, 0),
        ({"window_left": 10, "window_right": -4}, 7),
        ({"window_left": 1, "window_right": -4}, 0),
    ],
    ids=str,
)
def test_how_many_keys_a_query_sees(changes: dict[str, object], keys: int) -> None:
    assert gpu_call(**changes).keys_seen == keys


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "triton:hopper"),
        ({"capability": (8, 0)}, "sdpa:flash"),
        ({"window_left": 64, "window_right": 0}, "triton:hopper"),
        ({"window_right": 0}, "triton:portable"),
        ({"window_right": 0, "needs_grad": False}, "sdpa:flash"),  # it takes the host longer than the GPU
        ({"window_right": 0, "needs_grad": False, "n_kind": "float"}, "triton:hopper"),
        (many | {"window_right": 0, "needs_grad": False}, "triton:hopper"),
        (odd, "triton:portable"),
        ({"k_shape": (2, 8, 300, 64), "v_shape": (2, 8, 300, 64), "softcap": 30.0} | odd, "triton:portable"),
        ({"dropout_p": 0.1}, "sdpa:flash"),
        (varlen, "triton:hopper"),
        (varlen | {"sequences": 8}, "triton:portable"),
        (varlen | {"sequences": 8, "needs_grad": False}, "triton:hopper"),
        (long | {"q_shape": (2, 8, 1, 64), "n_kind": "float", "needs_grad": False}, "triton:decode"),
        (longer | {"q_shape": (2, 8, 1, 64), "n_kind": "per head", "needs_grad": False}, "triton:decode"),
        (longer | {"q_shape": (2, 8, 1, 64), "n_kind": "per head"}, "sdpa:flash"),
        (long | {"q_shape": (2, 8, 1, 64), "needs_grad": False}, "sdpa:flash"),
        (long | {"q_shape": (2, 8, 1, 64), "softcap": 30.0, "needs_grad": False}, "triton:decode"),
        (long | {"q_shape": (2, 8, 1, 64), "window_left": 2000, "needs_grad": False}, "triton:decode"),
        (long | {"q_shape": (2, 8, 4, 64), "n_kind": "float"}, "triton:hopper"),
        (long | {"q_shape": (2, 8, 4, 64), "needs_grad": False}, "triton:decode"),
        ({"capability": (10, 0)}, "sdpa:flash"),
        ({"capability": (12, 0), "window_right": 0, "needs_grad": False}, "sdpa:flash"),
        (varlen | {"capability": (8, 0)}, "sdpa:flash"),
        ({"return_lse": True}, "triton:hopper"),
        ({"return_lse": True} | odd, "triton:portable"),
        ({"dtype": torch.float32}, "sdpa:efficient"),
        ({"dropout_p": 0.1, "n_kind": "float"}, "sdpa:flash"),
        ({"mask_shape": (1, 1, 256, 256), "mask_dtype": torch.bool}, "triton:portable"),
        ({"mask_shape": (1, 1, 256, 256), "mask_dtype": torch.bool, "capability": (8, 0)}, "sdpa:efficient"),
        (float_mask | {"capability": (8, 0)}, "triton:portable"),
        (float_mask | {"capability": (8, 0), "needs_grad": False}, "sdpa:efficient"),
        (bool_mask | {"capability": (8, 0)}, "sdpa:efficient"),
        ({"alibi": True}, "triton:portable"),
        ({"alibi": True, "dtype": torch.float32}, "sdpa:efficient"),
        ({"alibi": True, "needs_grad": False}, "triton:portable"),
        ({"dtype": torch.float64}, "reference"),
        ({"softcap": 30.0}, "triton:hopper"),
        ({"softcap": 30.0, "capability": (7, 5)}, "reference"),
        ({"n_kind": "float"}, "triton:hopper"),
        ({"n_kind": "float", "capability": (8, 0)}, "sdpa:flash"),
        (long | {"n_kind": "float"}, "triton:hopper"),
        (long, "triton:hopper"),
        (long | {"n_kind": "float", "window_left": 64}, "triton:hopper"),
        ({"n_kind": "float", "dtype": torch.float32}, "sdpa:efficient"),
        (wide | {"n_kind": "float"}, "triton:hopper"),
        (wide | {"n_kind": "float", "needs_grad": False}, "triton:hopper"),
        ({"device": "mps", "capability": None}, "reference"),
        ({"device": "cpu", "capability": None}, "sdpa:cpu"),
    ],
    ids=str,
)  # fmt: skip
def test_the_choice_on_other_machines(changes: dict[str, object], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice for a GPU needs no GPU: why_not sees metadata, and whether this PyTorch was built with cuDNN."""
    from attn_n.backends.triton import hopper

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(hopper, "release", lambda: hopper.LAST)  # whatever the Triton here
    assert choose.choose(gpu_call(**changes), None)[0] == chosen


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        (long, "flash_attn:4"),
        (long | {"n_kind": "float"}, "flash_attn:4"),
        (long | {"n_kind": "float", "window_left": 255, "window_right": 0}, "triton:hopper"),
        (long | {"n_kind": "float", "window_left": 2000, "window_right": 0}, "flash_attn:4"),
        (long | {"n_kind": "float", "needs_grad": False}, "triton:hopper"),
        (long | {"q_shape": (2, 8, 4, 64), "needs_grad": False}, "triton:decode"),
        (longer | {"q_shape": (8, 32, 100, 64), "needs_grad": False}, "flash_attn:3"),
        (long | {"q_shape": (2, 8, 1, 64), "needs_grad": False}, "sdpa:flash"),
        (long | {"q_shape": (2, 8, 1, 64), "needs_grad": False, "softcap": 30.0}, "triton:decode"),
        (many | {"needs_grad": False}, "triton:hopper"),
        (many | {"needs_grad": False, "window_right": 0}, "flash_attn:3"),
        (many | {"needs_grad": False} | odd, "flash_attn:3"),
        (long | {"needs_grad": False, "window_right": 0}, "sdpa:flash"),
        (wide, "triton:hopper"),
        ({"n_kind": "float"}, "triton:hopper"),
        ({"n_kind": "float"} | odd, "triton:portable"),
        (long | odd, "flash_attn:4"),
        (long | {"capability": (8, 0)}, "sdpa:flash"),
    ],
    ids=str,
)
def test_the_choice_beside_flash_attention(
    changes: dict[str, object], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attn_n.backends.triton import hopper

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(hopper, "release", lambda: hopper.LAST)
    for version in ("3", "4"):
        monkeypatch.setattr(registry.find(f"flash_attn:{version}")[0], "why_not", lambda call: None)
    explained = explanation.explain(gpu_call(**changes), None)
    assert explained.chosen == chosen
    assert ("by speed on an H100" in explained.asked_by) == ("capability" not in changes)
    assert [line[:2] for line in str(explained).splitlines()].count("->") == 1


@pytest.mark.parametrize(
    ("capability", "changes"),
    [
        ((9, 0), {"n_kind": "per head", "window_right": 0, "needs_grad": False}), ((9, 0), varlen), ((8, 0), varlen),
        *(pytest.param((9, 0), changes, marks=pytest.mark.slow) for changes in (
            {}, {"n_kind": "float"}, {"alibi": True}, {"window_left": 255, "window_right": 0, "needs_grad": False},
            varlen | {"n_kind": "float"},
        )),
        *(pytest.param(capability, changes, marks=pytest.mark.slow)
          for capability in ((8, 0), (10, 0), (12, 0))
          for changes in ({"n_kind": "per head", "window_right": 0, "needs_grad": False}, varlen)
          if (capability, changes) != ((8, 0), varlen)),
    ],
    ids=str,
)  # fmt: skip
def test_the_choice_can_be_compiled(
    capability: tuple[int, int], changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice can be traced with dynamic lengths, which make all comparisons with them symbolic."""
    from attn_n.backends.triton import hopper

    monkeypatch.setattr(hopper, "release", lambda: hopper.LAST)
    fields = {
        name: value for name, value in vars(gpu_call(**changes, capability=capability)).items() if name[:2] not in
        ("q_", "k_", "v_", "se")
    }  # fmt: skip

    members = [registry.find(name)[0] for name in ("triton:hopper", "triton:portable", "sdpa:flash", "flash_attn:2")]

    def chosen(q: Tensor, k: Tensor, starts: Tensor) -> tuple[str, list[str | None], Tensor]:
        sequences = starts.shape[0] - 1 if "sequences" in changes else None
        call = AttentionCall(
            q_shape=tuple(q.shape), k_shape=tuple(k.shape), v_shape=tuple(k.shape), q_stride=q.stride(),
            k_stride=k.stride(), v_stride=k.stride(), sequences=sequences, **fields,
        )  # fmt: skip
        refusals = [None if member is None else member.refusal(call) for member in members]
        return choose.choose(call, None)[0], refusals, q + 1

    torch.compiler.reset()
    compiled = torch.compile(chosen, fullgraph=True, dynamic=True, backend="eager")
    seen = set()
    for length, keys in ((100, 100), (257, 257), (1024, 1024), (3000, 3000), (1, 3000), (4, 3000), (4, 4)):
        shapes = [(length, 8, 64), (keys, 8, 64)] if "sequences" in changes else [(2, 8, length, 64), (2, 8, keys, 64)]
        tensors = *(torch.empty(shape, device="meta") for shape in shapes), torch.empty(3, device="meta")
        expected = chosen(*tensors)[:2]
        assert compiled(*tensors)[:2] == expected, (length, keys)
        seen.add(expected[0])
    assert "sdpa:cudnn" not in seen
    assert len(seen) > 1 or capability != (9, 0) or changes


def test_explain_says_why_cudnn_is_in_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        for changes in ({}, long, {"needs_grad": False, "window_right": 0}, {"n_kind": "float"}):
            call = gpu_call(**changes, capability=capability)
            explained = explanation.explain(call, None)
            verdict = next(verdict for verdict in explained.verdicts if verdict.name == "sdpa:cudnn")
            assert (verdict.reason, verdict.rank) == (None, None)
            assert not any("cudnn" in name for name in order.automatic(call))
            said = "serves it, when asked for by name: it builds a plan for every new shape (about 50 ms)"
            assert f"sdpa:cudnn {said}" in " ".join(str(explained).split())
            # The family leaves it out, too; its own name takes it, and is what the arrow points at.
            assert choose.choose(call, "sdpa")[0] == "sdpa:flash"
            named = explanation.explain(call, "sdpa:cudnn")
            assert named.chosen == choose.choose(call, "sdpa:cudnn")[0] == "sdpa:cudnn"
            assert "-> sdpa:cudnn" in str(named)
            assert str(named).count("-> ") == 1
    masked = gpu_call(mask_shape=(1, 1, 256, 256), mask_dtype=torch.bool)
    assert "sdpa:cudnn no: has no attn_mask" in " ".join(str(explanation.explain(masked, None)).split())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("libcuda.so.1: no such file"), r"is installed but cannot be imported: OSError: libcuda\.so\.1"),
        (ModuleNotFoundError("", name="triton.experimental"), "needs triton.experimental, which is not installed"),
        (ModuleNotFoundError("", name="triton"), None),
    ],
    ids=repr,
)
def test_a_backend_of_ours_that_is_broken_is_said_once(
    error: Exception, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken built-in backend warns once, since the automatic choice would skip it silently."""

    def broken() -> Backend:
        raise error

    monkeypatch.setitem(registry._entries, "sdpa", registry._Entry(broken, registry.BUILT_IN["sdpa"]))
    if said is not None:
        with pytest.warns(RuntimeWarning, match=rf"attn_n\.backends\.sdpa {said}.* passes over it"):
            flash_attention_n(*inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attention_n(*inputs())


def test_importing_is_light() -> None:
    """`import attn_n` imports torch and none of the optional libraries, nor any backend."""
    heavy = [
        "triton",
        "flash_attn",
        "flash_attn_interface",
        "xformers",
        "numpy.testing",
        "matplotlib",
        "attn_n.backends.sdpa",
    ]
    code = (
        "import sys, torch; before = set(sys.modules); import attn_n; new = set(sys.modules) - before\n"
        "print(sorted(name for name in new if name.split('.')[0] not in sys.stdlib_module_names))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = eval(printed)
    assert "attn_n.functional" in loaded
    assert not [name for name in loaded if any(name == one or name.startswith(f"{one}.") for one in heavy)]
    assert not [name for name in loaded if not name.startswith("attn_n")]


def test_a_backend_says_what_it_honours_by_known_names() -> None:
    class Mistaken(Backend):
        name = "mistaken"
        honours = ("causal", "causall")

    with pytest.raises(ValueError, match=r"backend: expected honours of causal, .*; got 'causall'"):
        attn_n.register_backend(Mistaken())
    assert "mistaken" not in registry.names()


def test_a_backend_without_a_backward_refuses_to_train() -> None:
    class ForwardOnly(Backend):
        name = "forward only"

    assert ForwardOnly().refusal(gpu_call(needs_grad=False)) is None
    assert ForwardOnly().refusal(gpu_call()) == "has no backward"
