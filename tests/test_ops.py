"""The operators within PyTorch: opcheck, compilation, checkpointing, autocast, meta and fake tensors."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attn_n import Backend, UnsupportedError, flash_attention_n, flash_attention_n_varlen, register_backend, use_backend
from attn_n.autograd import passes
from attn_n.autograd.passes import log_of, rows_may_be_empty_in
from attn_n.backends import registry
from attn_n.backends.base import lies_in_order
from attn_n.call import AttentionCall, Gradients, Grads, Options, Saved, autocast
from tests.cases import CASES, Case, make
from tests.operators import opcheck
from tests.oracle import attention_n
from tests.places import slow


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case) -> None:
    inputs = make(case, torch.float32, "cpu")
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    if case.learned:
        inputs.mask, inputs.alibi_slopes = (
            None if x is None else x.detach() for x in (inputs.mask, inputs.alibi_slopes)
        )
    packing: tuple[Any, ...] = inputs.packing() if case.varlen else (None, None, 0, 0)
    batch = len(case.lengths_q) or case.batch
    slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes.expand(batch, -1)
    mask = None if inputs.mask is None else inputs.mask[(None,) * (4 - inputs.mask.dim())]
    left, right = case.window or (None, None)
    options = Options(0.25, left, 0 if case.causal else right, case.softcap, 0.0, mask, slopes, *packing)
    log_n = torch.linspace(-1, 1, case.heads_q)
    if inputs.sinks is not None and inputs.sinks.dim() > 1:
        log_n = inputs.sinks.detach()
    opcheck(q, k, v, log_n, "sdpa:cpu", options, compiled=case.name in ("causal", "GQA", "varlen"))


def step(q: Tensor, k: Tensor, v: Tensor, n: Tensor, **options: Any) -> tuple[Tensor, ...]:
    out, lse = flash_attention_n(q * 1.0, k, v, sm_n=n, return_lse=True, **options)
    return torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v, n))


def leaves(length: int, heads_kv: int = 2, device: str = "cpu") -> list[Tensor]:
    shapes = ((2, 4, length, 16), (2, heads_kv, length + 3, 16), (2, heads_kv, length + 3, 16))
    n = torch.linspace(0.5, 2.0, 4, device=device)
    return [x.requires_grad_() for x in (*(torch.randn(shape, device=device) for shape in shapes), n)]


@pytest.mark.parametrize("backend", [None, *slow("reference")])
@pytest.mark.parametrize(
    ("compiler", "options"),
    [
        pytest.param("aot_eager", {}, marks=pytest.mark.slow),
        ("aot_eager", {"window": (3, 2)}),
        ("inductor", {"causal": True}),  # behind the same tracing as in aot_eager
    ],
    ids=str,
)
def test_compile_with_dynamic_shapes(
    backend: str | None, options: dict[str, Any], compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # an older one knows older fakes
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def attend(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash_attention_n(q * 1.0, k, v, sm_n=n, return_lse=True, backend=backend, **options)
        return out * 2, lse

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=compiler)
    for length in (17, 24, 40):
        inputs = leaves(length)
        got, expected = compiled(*inputs), attend(*inputs)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))
        gradients = [torch.autograd.grad(out.square().sum() + lse.sum(), inputs) for out, lse in (got, expected)]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))
    assert counters["stats"]["unique_graphs"] == 1, "one graph for all lengths"


def test_compile_varlen() -> None:
    torch.compiler.reset()
    starts = torch.tensor([0, 3, 10], dtype=torch.int32)
    q, k, v = (torch.randn(10, 2, 8, requires_grad=True) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        return flash_attention_n_varlen(q, k, v, starts, starts, 7, 7, True, sm_n=1.0)

    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v, starts)
    assert torch.allclose(got, attend(q, k, v, starts), atol=1e-6)
    torch.autograd.grad(got.sum(), (q, k, v))


def test_compile_self_attention_of_one_tensor() -> None:
    torch.compiler.reset()

    def attend(x: Tensor) -> Any:
        return flash_attention_n(x, x, x, True, sm_n=1.0)

    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    got, expected = torch.compile(attend, fullgraph=True, backend="aot_eager")(x), attend(x)
    assert torch.allclose(got, expected, atol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (got, expected)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_compile_honours_use_backend(ran: list[str]) -> None:
    torch.compiler.reset()
    inputs = [x.detach() for x in leaves(8)]

    def attend(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Any:
        return flash_attention_n(q, k, v, sm_n=n)

    with use_backend("reference"):
        torch.compile(attend, fullgraph=True, backend="eager")(*inputs)
    assert "attend reference" in ran
    assert "forward sdpa:cpu" not in ran


def test_compile_as_the_first_call_of_all() -> None:
    """Backends can be imported while tracing: no eager call is needed before."""
    code = (
        "import torch, attn_n\n"
        "x = torch.randn(1, 2, 9, 8)\n"
        "for backend in ('sdpa', 'reference'):\n"
        "    attend = lambda x: attn_n.flash_attention_n(x, x, x, sm_n=1.0, backend=backend)\n"
        "    torch.compile(attend, fullgraph=True, backend='eager')(x)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_export() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return flash_attention_n(q, k, v, True, sm_n=1.0)

    q, k, v, _ = (x.detach() for x in leaves(8))
    program = torch.export.export(Attention(), (q, k, v))
    assert any("attn_n.forward" in str(node.target) for node in program.graph.nodes)
    assert torch.allclose(program.module()(q, k, v), Attention()(q, k, v))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5}], ids=str)
def test_checkpoint(reentrant: bool, options: dict[str, Any]) -> None:
    inputs = leaves(9)

    def attend(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Any:
        return flash_attention_n(q, k, v, True, sm_n=n, **options)

    gradients = []
    for run in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=reentrant)):
        for x in inputs:
            x.grad = None
        torch.manual_seed(3)
        run(*inputs).square().sum().backward()
        gradients.append([x.grad for x in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("forward_watched", [True, False])
def test_only_one_pass_is_watched(forward_watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatch mode makes the operator run, which cannot return None; the other pass runs the bare function."""
    *inputs, n = leaves(9)
    kernel, states = registry.loaded("sdpa:cpu"), []
    backward_of_kernel = kernel.backward

    def recorded(grads: Grads, saved: Saved, options: Options) -> Gradients:
        states.append(saved.rng_state)
        return backward_of_kernel(grads, saved, options)

    monkeypatch.setattr(kernel, "backward", recorded)
    forward, backward = (_Watching(), contextlib.nullcontext())[:: 1 if forward_watched else -1]
    gradients = []
    for modes in ((contextlib.nullcontext(), contextlib.nullcontext()), (forward, backward)):
        with modes[0]:
            loss = flash_attention_n(*inputs, True, sm_n=n, backend="sdpa").square().sum()
        with modes[1]:
            gradients.append(torch.autograd.grad(loss, (*inputs, n)))
    assert states == [None, None]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("len_q", "len_k", "options", "expected"),
    [
        (9, 5, {}, False),
        (5, 5, {"window_right": 0}, False),
        (6, 5, {"window_right": 0}, True),
        (5, 5, {"window_left": 2}, False),
        (6, 5, {"window_left": 2}, True),
        (5, 9, {"window_right": -1}, True),
        (5, 0, {}, True),
        (5, 5, {"mask": torch.ones(1, 1, 1, 1)}, True),
        (5, 5, {"cu_seqlens_q": torch.zeros(1)}, True),
    ],
    ids=str,
)
def test_which_calls_may_have_rows_without_keys(
    len_q: int, len_k: int, options: dict[str, Any], expected: bool
) -> None:
    q, k = torch.empty(1, 1, len_q, 8), torch.empty(1, 1, len_k, 8)
    assert rows_may_be_empty_in(q, k, Options(1.0, **options)) == expected


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_autocast(backend: str) -> None:
    q, k, v, n = leaves(9)
    mixed = q.to(torch.bfloat16)  # autocast takes inputs of different dtypes, as torch's own SDPA does
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = flash_attention_n(mixed, k, v, sm_n=n, return_lse=True, backend=backend)
        (out.sum() + lse.sum()).backward()
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert k.grad is not None
    assert k.grad.dtype == torch.float32
    assert n.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        doubles = [x.detach().double() for x in (q, k, v)]
        assert flash_attention_n(*doubles, backend=backend).dtype == torch.float64


class Blocked(torch.autograd.Function):
    """The identity, without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> None:
        return None


@pytest.mark.parametrize("watched", [False, True])
def test_a_backward_without_gradients(watched: bool) -> None:
    q, k, v, n = leaves(5)
    with FlopCounterMode(display=False) if watched else contextlib.nullcontext():
        out, lse = flash_attention_n(q, k, v, sm_n=n, return_lse=True, backend="sdpa")
    (Blocked.apply(out).sum() + Blocked.apply(lse).sum()).backward()
    assert q.grad is k.grad is v.grad is n.grad is None


SINKS = torch.tensor([-1.0, 0.5, 2.0, -torch.inf])


@pytest.mark.parametrize(
    ("n", "n_is_logit", "expected"),
    [
        (SINKS, True, SINKS),
        (SINKS.double(), True, SINKS),
        (SINKS.bfloat16(), True, SINKS),
        (SINKS.repeat_interleave(2)[::2], True, SINKS),
        (SINKS[0], True, SINKS[:1].expand(4)),
        (SINKS.exp(), False, SINKS),
        (torch.tensor(2.0), False, torch.full((4,), 2.0).log()),
        (torch.tensor(1e-50, dtype=torch.float64), False, torch.full((4,), 1e-50, dtype=torch.float64).log()),
        (SINKS[None, :, None], True, SINKS[None, :, None].expand(2, 4, 5)),
        (SINKS[None, :, None].double(), True, SINKS[None, :, None].expand(2, 4, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_log_n_as_kernels_get_it(n: Tensor, n_is_logit: bool, expected: Tensor, dtype: torch.dtype) -> None:
    """It has the dtype of the lse, and is dense in its last dimension."""
    q = torch.empty(2, 4, 5, 8, dtype=dtype)
    found = log_of(q, n.detach().requires_grad_(), n_is_logit)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert not found.requires_grad
    assert torch.allclose(found.double(), expected.double(), rtol=1e-6)
    assert found.stride() == ((20, 5, 1) if found.dim() > 1 else (0,) if n.dim() == 0 else (1,))


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "attn_n":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_operators_that_run() -> None:
    """Without dropout these are pure ones. Results lie in memory as promised for q, wherever k and v lie."""
    q, k, v, n = leaves(5)
    tokens_first = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for of_q in (q, tokens_first):
        with _Names() as mode:
            out = flash_attention_n(of_q, k, v, sm_n=n, backend="sdpa")
            (dq,) = torch.autograd.grad(out.sum(), of_q)
        assert mode.names == ["attn_n::forward", "attn_n::backward"]
        promised = registry.loaded("sdpa:cpu")
        assert lies_in_order(out, promised.out_dim_order(of_q))
        assert lies_in_order(dq, promised.gradient_dim_order(of_q))


def test_rows_without_keys_in_the_backward_operator() -> None:
    q, k, v, _ = leaves(5)
    mask = torch.ones(5, 8, dtype=torch.bool)
    mask[2] = False
    gradients = []
    for watched in (False, True):
        out = flash_attention_n(q, k, v, attn_mask=mask, backend="sdpa")
        with FlopCounterMode(display=False) if watched else contextlib.nullcontext():
            gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for a, b in zip(*gradients, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["attn_mask", "alibi_slopes"])
def test_what_is_changed_before_the_backward(name: str) -> None:
    """PyTorch sees that a saved tensor has changed, in a call that is known as well."""
    q, k, v, _ = leaves(5)
    for _ in range(2):
        given = torch.ones(5, 8) if name == "attn_mask" else torch.ones(4)
        out = flash_attention_n(q, k, v, sm_n=1.0, backend="sdpa", **{name: given})
        given.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_on_which_devices_autocast_is_on() -> None:
    """On one that PyTorch was built without, too; "meta" has none, and PyTorch raises an error when it is asked."""
    assert not any(autocast.enabled(device) for device in ("cpu", "cuda", "xpu", "meta"))
    before = torch.is_autocast_enabled("xpu")
    torch.set_autocast_enabled("xpu", True)
    try:
        assert autocast.enabled("xpu")
        assert autocast.dtype("xpu") == torch.get_autocast_dtype("xpu")
        assert autocast.dtype("cpu") is None
    finally:
        torch.set_autocast_enabled("xpu", before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("compiled", "varlen"), [(False, False), (False, True), (True, False)])
def test_the_reference_under_autocast(compiled: bool, varlen: bool, device: str) -> None:
    """Only the inputs and the output are rounded: log n, the bias and all matmuls are float32."""
    q, k, v = (torch.randn(2, 2, 33, 16, device=device).bfloat16().float().requires_grad_() for _ in range(3))
    sinks, mask = torch.tensor([0.3, 1.7], device=device, requires_grad=True), torch.randn(33, 33, device=device) * 3
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    out, lse = attention_n(*exact[:3], sinks=exact[3], mask=mask.double()[None, None])
    dout = torch.randn(out.shape, device=device).bfloat16()
    exact_gradients = torch.autograd.grad((out * dout.double()).sum() + lse.sum(), exact)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        keywords: dict[str, Any] = {"sinks": sinks, "attn_mask": mask, "return_lse": True, "backend": "reference"}
        if not varlen:
            return flash_attention_n(q, k, v, **keywords)
        starts = torch.tensor([0, 33, 66], dtype=torch.int32, device=device)
        tokens = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        results = flash_attention_n_varlen(*tokens, starts, starts, 33, 33, **keywords)
        of_out, of_lse = (x.unflatten(0, (2, 33)).transpose(1, 2) for x in results)
        return of_out, of_lse

    torch.compiler.reset()
    with torch.autocast(device, torch.bfloat16):
        got, got_lse = (torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend)(
            q, k, v, sinks
        )
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.double(), out, rtol=2**-8, atol=1e-6)
    assert torch.allclose(got_lse.double(), lse, atol=1e-5)
    *gradients, dsinks = torch.autograd.grad((got * dout).sum() + got_lse.sum(), (q, k, v, sinks))
    *exact_gradients, exact_dsinks = exact_gradients
    if not compiled:  # the compiler traces the backward under the autocast of the forward
        assert torch.allclose(dsinks.double(), exact_dsinks, rtol=1e-5, atol=1e-5)
        for gradient, truth in zip(gradients, exact_gradients, strict=True):
            assert torch.allclose(gradient.double(), truth, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("passes", ["forward", "both"])
def test_autocast_does_not_reach_a_backend(passes: str) -> None:
    """Autocast does not reach a backend of torch operations either, nor its backward, wherever that runs."""
    seen = []

    class Plain(Backend):
        name = "plain"

        def why_not(self, call: object) -> None:
            return None

        def forward(self, q: Tensor, k: Tensor, v: Tensor, log_n: object, options: Options) -> Any:
            seen.append((q.float() @ q.float().mT).dtype)
            return registry.loaded("sdpa:cpu").forward(q, k, v, None, options)

        def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
            seen.append((grads.dout.float() @ saved.q.float().mT).dtype)
            return Gradients(*saved[:3])

    register_backend(Plain())
    q, k, v, n = leaves(16)
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attention_n(q, k, v, sm_n=n, backend="plain")
        assert out.dtype == torch.bfloat16
        if passes == "both":
            out.sum().backward()
    if passes == "forward":
        out.sum().backward()
    assert seen == [torch.float32, torch.float32]
    registry._entries.pop("plain")


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_meta_and_fake_tensors(mode: str) -> None:
    if mode == "meta":
        inputs = leaves(9, device="meta")
        gradients = step(*inputs, causal=True)
        assert all(x.device.type == "meta" for x in gradients)
    else:
        with FakeTensorMode():
            inputs = leaves(9)
            gradients = step(*inputs, causal=True)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def test_the_operators_on_meta_tensors() -> None:
    q, k, v, n = (x.detach() for x in leaves(9, device="meta"))
    options = Options(0.25)
    out, lse, state = torch.ops.attn_n.forward(q, k, v, n, True, None, None, "sdpa:cpu", *options)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    gradients = torch.ops.attn_n.backward(
        out, None, q, k, v, out, lse, state, n, True, False, True, False, False, None, "sdpa:cpu", *options
    )
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape, n.shape, (0,), (0,)]


@pytest.mark.parametrize("wanted", [(False, False, False), (True, True, True), (False, True, False)])
def test_the_gradients_of_a_call_without_keys_have_their_shapes(wanted: tuple[bool, ...]) -> None:
    """The operator's fake has them for any call; of a call without keys no backend is asked."""
    found = []
    for device in ("cpu", "meta"):
        q, k, n = (torch.ones(*shape, device=device) for shape in ((2, 4, 5, 8), (2, 2, 0, 8), (4,)))
        options = Options(
            0.25, mask=torch.ones(1, 1, 5, 1, device=device), alibi_slopes=torch.ones(2, 4, device=device)
        )
        out, lse = torch.zeros_like(q), torch.zeros(2, 4, 5, device=device)
        found.append(torch.ops.attn_n.backward(
            out, lse, q, k, k, out, lse, None, n, False, True, *wanted, None, "sdpa:cpu", *options
        ))  # fmt: skip
    of_inputs = [q.shape, k.shape, k.shape, n.shape, (1, 1, 5, 1), (2, 4)]
    expected = [shape if asked else (0,) for shape, asked in zip(of_inputs, (True, True, True, *wanted), strict=True)]
    assert [x.shape for x in found[0]] == [x.shape for x in found[1]] == expected


@pytest.mark.parametrize("name", ["sm_n", "sinks"])
def test_no_keys_under_a_dispatch_mode(name: str) -> None:
    q, k, n = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 2, 0, 8).double(), torch.full((4,), 3.0)
    n.requires_grad_()
    with FlopCounterMode(display=False):
        _, lse = flash_attention_n(q, k, k, return_lse=True, backend="sdpa", **{name: n})
        (dn,) = torch.autograd.grad(lse.sum(), n)
        _, lse_without_n = flash_attention_n(q, k, k, return_lse=True, backend="sdpa")
    assert lse.dtype == lse_without_n.dtype == torch.float64
    assert torch.allclose(dn, torch.full((4,), 10.0 / (3.0 if name == "sm_n" else 1.0)))


def test_the_operators_say_what_they_are() -> None:
    """torch.compile takes them as they are; it keeps the generator's state around one that draws."""
    operators = [getattr(torch.ops.attn_n, name).default for name in ("forward", "forward_with_dropout", "backward")]
    assert all(torch.Tag.pt2_compliant_tag in operator.tags for operator in operators)
    assert [torch.Tag.nondeterministic_seeded in operator.tags for operator in operators] == [False, True, False]


def test_the_backward_operator_has_no_derivative() -> None:
    q, k, v, n = leaves(5)
    out, lse, state = torch.ops.attn_n.forward(q, k, v, n, False, None, None, "sdpa:cpu", *Options(0.25))
    dq, *_ = torch.ops.attn_n.backward(
        out.detach(), None, q, k, v, out, lse, state, n, False, False, False, False, False, None, "sdpa:cpu",
        *Options(0.25),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="backend 'sdpa:cpu' has no double backward"):
        dq.sum().backward()


def test_gradients_of_repeated_heads_are_added_up() -> None:
    dk = torch.arange(8.0).reshape(1, 4, 2, 1)  # of 4 query heads and 2 keys
    assert passes._sum_groups(dk, 2)[0, :, :, 0].tolist() == [[2.0, 4.0], [10.0, 12.0]]
    assert passes._sum_groups(dk, 4) is dk


class Told(Backend):
    """`sdpa:cpu`, which notes what it is told."""

    name = "told"
    honours = frozenset(("lse gradient", "dropout"))
    state: Tensor | None = None

    def __init__(self) -> None:
        self.log_n_prepared: list[object] = []
        self.backwards: list[tuple[Grads, Saved]] = []

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, log_n: object, options: Options) -> Backend:
        self.log_n_prepared.append(log_n)
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_n: object, options: Options) -> Any:
        out, lse, _ = registry.loaded("sdpa:cpu").forward(q, k, v, None, options.replaced(dropout_p=0.0))
        return out, lse, self.state

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        self.backwards.append((grads, saved))
        return registry.loaded("sdpa:cpu").backward(grads, saved, options.replaced(dropout_p=0.0))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    backend = Told()
    register_backend(backend)
    return backend


def test_no_queries_under_a_dispatch_mode(told: Told) -> None:
    q, k, n = torch.randn(2, 4, 0, 8, requires_grad=True), torch.randn(2, 2, 5, 8, requires_grad=True), torch.ones(4)
    with FlopCounterMode(display=False):
        out = flash_attention_n(q, k, k, sm_n=n.requires_grad_(), backend="told")
        gradients = torch.autograd.grad(out.sum(), (q, k, n))
    assert [x.shape for x in gradients] == [q.shape, k.shape, n.shape]
    assert not any(x.any() for x in gradients)
    assert told.backwards == [], "no backend is asked"


def test_the_sign_beside_a_gradient_is_resolved(told: Told) -> None:
    """Kernels read the memory of a tensor, and not the flag that its numbers are the negative ones."""
    q, k, v, _ = leaves(5)
    out, lse = flash_attention_n(q, k, v, sm_n=1.0, return_lse=True, backend="told")
    ones, ones_of_lse = torch.ones_like(out), torch.ones_like(lse)
    flagged, flagged_of_lse = torch._neg_view(-ones), torch._neg_view(-ones_of_lse)
    expected = torch.autograd.grad((out, lse), q, (ones, ones_of_lse), retain_graph=True)
    for dout, dlse in ((flagged, ones_of_lse), (ones, flagged_of_lse), (flagged, flagged_of_lse)):
        assert torch.equal(*expected, *torch.autograd.grad((out, lse), q, (dout, dlse), retain_graph=True))
    torch.autograd.grad(out, q, flagged)
    assert not any(x is not None and x.is_neg() for grads, _ in told.backwards for x in grads[:2])
    assert [grads.dlse is None for grads, _ in told.backwards] == [False] * 4 + [True]


def test_a_backward_is_asked_for_what_is_needed(told: Told) -> None:
    q, k, v, n = leaves(5)
    asked = [("sm_n", n, "n"), ("sinks", n, "log n"), ("sm_n", n.detach(), None), ("sinks", n.detach(), None)]
    for name, given, of_n in [*asked, ("sm_n", 1.0, None)]:
        for _ in range(2):  # once to prepare it
            flash_attention_n(q, k, v, backend="told", **{name: given}).sum().backward()
            grads, saved = told.backwards[-1]
            assert (grads.of_n, saved.log_n is not None) == (of_n, of_n == "log n")
    assert set(told.log_n_prepared) == {None}, "n is applied behind it"


def test_the_state_of_dropout_reaches_the_backward(told: Told) -> None:
    q, k, v, _ = leaves(5)
    told.state = torch.tensor([3, 4])
    for _ in range(3):  # the last one is known
        flash_attention_n(q, k, v, sm_n=1.0, dropout_p=0.5, backend="told").sum().backward()
        state = told.backwards[-1][1].rng_state
        assert state is not None
        assert state.tolist() == [3, 4]


def test_what_an_open_choice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[AttentionCall] = []

    def choose(call: AttentionCall) -> Backend:
        calls.append(call)
        return registry.loaded("sdpa:cpu")

    monkeypatch.setattr(passes, "_choose", choose)
    given = {"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 8), "n": (4,), "mask": (1, 1, 5, 7), "slopes": (2, 4)}
    for wanted in (None, *given):
        x = {name: torch.ones(shape, requires_grad=name == wanted) for name, shape in given.items()}
        options = Options(1.0, mask=x["mask"], alibi_slopes=x["slopes"])
        passes.chosen_now(passes.ANY_BACKEND, x["q"], x["k"], x["v"], x["n"], options)
        call = calls[-1]
        assert (call.needs_grad, call.return_lse) == (wanted is not None, wanted is not None)
        assert (call.mask_needs_grad, call.alibi_needs_grad) == (wanted == "mask", wanted == "slopes")
    q, kinds = torch.ones(given["q"]), {"float": None, "per head": torch.ones(4), "per row": torch.ones(2, 4, 5)}
    for kind, n in kinds.items():
        passes.chosen_now(passes.ANY_BACKEND, q, q, q, n, Options(1.0))
        assert (calls[-1].n_kind, calls[-1].needs_grad) == (kind, False)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    varlen = Options(1.0, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=5, max_seqlen_k=5)
    passes.chosen_now(passes.ANY_BACKEND, *[torch.ones(5, 4, 8)] * 3, torch.ones(5, 4), varlen)
    assert calls[-1].n_kind == "per row"


def test_a_backend_with_other_strides_is_set_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results in other strides than promised are copied, so that the promise to torch.compile holds."""

    class Contrary(Backend):
        name = "contrary"

        def why_not(self, call: object) -> None:
            return None

        def forward(self, q: Tensor, k: Tensor, v: Tensor, log_n: object, options: Options) -> Any:
            out, lse, _ = torch.ops.attn_n.forward(q, k, v, None, False, None, None, "sdpa:cpu", *options)
            return out.mT.contiguous().mT, lse.mT.contiguous().mT, None

    monkeypatch.setitem(registry._entries, "contrary", registry._Entry(Contrary))
    q, k, v, n = (x.detach() for x in leaves(9))
    out, lse, _ = torch.ops.attn_n.forward(q, k, v, n, False, None, None, "contrary", *Options(0.25))
    expected, expected_lse = flash_attention_n(q, k, v, sm_n=n, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert out.stride() == q.stride()
    assert lse.is_contiguous()
