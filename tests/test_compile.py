"""torch.compile, torch.export, checkpoints and FLOP counters do not change the numbers of a call."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils import flop_counter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attn_n import UnsupportedError, flash_attention_n, flash_attention_n_varlen, register_backend, use_backend
from attn_n.backends import registry
from attn_n.call import Gradients, Grads, Options, Saved
from tests.cases import INTERPRETED
from tests.oracle import attention_n

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled for the GPU here")
TORCH = TorchVersion(torch.__version__)
STARTS = torch.tensor([0, 3, 10], dtype=torch.int32)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def leaves(length: int = 9, size: int = 8) -> list[Tensor]:
    return [torch.randn(2, 2, length, size, requires_grad=True) for _ in range(3)]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@needs_interpreter
@pytest.mark.parametrize("training", [True, False])
def test_equal_calls_of_a_graph_drop_other_weights(training: bool) -> None:
    q, k, _ = leaves(16, 16)
    identity = torch.eye(16).expand(2, 2, 16, 16)

    def two(q: Tensor, k: Tensor, v: Tensor) -> list[Any]:
        return [flash_attention_n(q, k, v, sm_n=1.0, dropout_p=0.5, backend="triton") for _ in range(2)]

    with contextlib.nullcontext() if training else torch.no_grad():
        first, second = torch.compile(two, fullgraph=True, backend="aot_eager")(q, k, identity)
    assert not torch.equal(first != 0, second != 0)


@needs_interpreter
def test_a_checkpoint_of_a_graph_drops_the_same_weights() -> None:
    q, k, _ = leaves(16, 16)
    v = torch.eye(16).expand(2, 2, 16, 16).clone().requires_grad_()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention_n(q * 1.0, k, v, sm_n=1.0, dropout_p=0.5, backend="triton")

    out = torch.compile(lambda *x: checkpoint(attend, *x, use_reentrant=False), fullgraph=True, backend="aot_eager")(
        q, k, v
    )
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    # of v = 1 the output is the weights themselves, and dv = P^T dout
    assert torch.allclose(dv, out.mT @ dout, atol=1e-5)


def test_use_backend_after_compilation(ran: list[str]) -> None:
    q, k, v = (x.detach() for x in leaves())
    attend = torch.compile(lambda q, k, v: flash_attention_n(q, k, v, sm_n=1.0), fullgraph=True, backend="eager")
    attend(q, k, v)
    with use_backend("reference"):
        attend(q, k, v)
    attend(q, k, v)
    assert ran[-1] == "forward sdpa:cpu"
    assert "attend reference" in ran
    assert graphs() == 2
    said = "flash_attn: has no kernel for device cpu" if TORCH >= "2.11" else "."  # 2.8 says what it cannot trace
    with use_backend("flash_attn"), pytest.raises(Exception, match=said):
        attend(q, k, v)


@pytest.mark.skipif(TORCH < "2.11", reason="PyTorch 2.8 does not trace the context manager")
def test_use_backend_within_a_graph(ran: list[str]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with use_backend("reference"):
            return flash_attention_n(q, k, v, sm_n=1.0)

    torch.compile(attend, fullgraph=True, backend="eager")(*leaves())
    assert set(ran) == {"attend reference"}
    flash_attention_n(*leaves(), sm_n=1.0)
    assert ran[-1] == "forward sdpa:cpu"


@pytest.mark.parametrize(
    ("backend", "varlen"),
    [("sdpa", True), *(pytest.param(backend, False, marks=pytest.mark.slow) for backend in ("sdpa", "reference"))],
)
def test_one_graph_for_all_n_and_scales(backend: str, varlen: bool) -> None:
    x = [torch.randn(10, 2, 8, requires_grad=True) for _ in range(3)] if varlen else leaves()
    packing: list[Any] = [STARTS, STARTS, 7, 7] if varlen else []

    def attend(n: float, scale: float) -> Any:
        function: Any = flash_attention_n_varlen if varlen else flash_attention_n
        return function(*x, *packing, True, sm_n=n, sm_scale=scale, return_lse=True, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, scale in ((1.0, 0.2), (0.25, 0.2), (3.0, 0.7), (30.0, 0.01)):
        results = []
        for function in (compiled, attend):
            out, lse = function(n, scale)
            results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), x)))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
    assert graphs() == 1
    compiled(0.0, 0.2)  # plain softmax is another call
    assert graphs() == 2


@pytest.mark.skipif(TORCH < "2.11", reason="PyTorch 2.8 puts the inputs of a graph that are numbers there itself")
def test_a_default_device_is_not_that_of_numbers() -> None:
    x = leaves()
    compiled = torch.compile(
        lambda *x, n, scale: flash_attention_n(*x, sm_n=n, sm_scale=scale),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for n, scale in ((1.5, 0.3), (2.5, 0.4)):
        with torch.device("meta"):
            out = compiled(*x, n=n, scale=scale)
        assert torch.allclose(out.double(), attention_n(*(y.double() for y in x), n=n, scale=scale)[0], atol=1e-5)


@needs_interpreter
def test_a_default_device_is_not_that_of_dropout() -> None:
    x = leaves()
    with torch.device("meta"):
        out = flash_attention_n(*x, sm_n=1.0, dropout_p=0.5, backend="triton")
    out.sum().backward()
    assert all(y.grad is not None for y in x)


def dlses(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Record the gradients of lse that the backend gets, in order."""
    kernel, seen = registry.loaded(name), []
    original = kernel.backward

    def recorded(grads: Grads, saved: Saved, options: Options) -> Gradients:
        seen.append(grads.dlse)
        return original(grads, saved, options)

    monkeypatch.setattr(kernel, "backward", recorded)
    return seen


@pytest.mark.parametrize("return_lse", [False, True])
def test_an_lse_that_nobody_uses_costs_nothing(return_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, x = dlses("sdpa:cpu", monkeypatch), leaves()

    def attend(*x: Tensor) -> Any:
        result = flash_attention_n(*x, sm_n=1.0, return_lse=return_lse)
        return result[0] if return_lse else result

    torch.compile(attend, fullgraph=True, backend="aot_eager")(*x).sum().backward()
    assert seen == [None]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa:flash", "triton:hopper"])
def test_compiled_training_at_the_widest_heads(backend: str) -> None:
    """At these widths a column for the gradient of lse would exceed the limit of FlashAttention 2."""
    x = [torch.randn(1, 2, 64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def attend(*x: Tensor) -> Any:
        return flash_attention_n(*x, True, sm_n=1.0, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    dout = torch.randn_like(x[0])
    got, expected = (torch.autograd.grad(function(*x), x, dout) for function in (compiled, attend))
    assert all(torch.allclose(a, b, atol=2e-2) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "triton:hopper", "triton:portable", "sdpa:flash", "sdpa:efficient"])
@pytest.mark.parametrize("varlen", [False, True])
def test_one_graph_for_all_lengths_on_a_gpu(backend: str | None, varlen: bool) -> None:
    sinks = torch.linspace(-1.0, 3.0, 4, device="cuda", requires_grad=True)

    def attend(*x: Tensor) -> Any:
        if varlen:
            starts = torch.tensor([0, 40, x[0].shape[0]], device="cuda", dtype=torch.int32)
            longest = x[0].shape[0] - 40
            return flash_attention_n_varlen(*x[:3], starts, starts, longest, longest, True, sinks=x[3], backend=backend)
        return flash_attention_n(*x[:3], True, sinks=x[3], backend=backend)

    if varlen and backend == "sdpa:efficient":
        pytest.skip("it reads the boundaries to the host")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (100, 257, 1024):
        shape = (length, 4, 64) if varlen else (2, 4, length, 64)
        x = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        dout = torch.randn_like(x[0])
        got, expected = ((y := f(*x, sinks), *torch.autograd.grad(y, (*x, sinks), dout)) for f in (compiled, attend))
        assert all(torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "sdpa:flash"])
def test_dropout_in_a_graph_on_a_gpu(backend: str) -> None:
    """Equal calls drop different weights, and a checkpoint drops the same ones as its first forward."""
    q, k = (torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(2))
    v = torch.eye(64, device="cuda", dtype=torch.float16).expand(1, 2, 64, 64).clone().requires_grad_()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention_n(q * 1.0, k, v, sm_n=1.0, dropout_p=0.5, backend=backend)

    first, second = torch.compile(lambda *x: [attend(*x), attend(*x)], fullgraph=True)(q, k, v)
    assert not torch.equal(first != 0, second != 0)
    out = torch.compile(lambda *x: checkpoint(attend, *x, use_reentrant=False), fullgraph=True)(q, k, v)
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    assert torch.allclose(dv.float(), (out.mT @ dout).float(), atol=2e-2)


@pytest.mark.parametrize("counted", ["forward", "backward", "both"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("n", [1.0, "per head"])
def test_a_checkpoint_that_is_counted_in_one_pass(counted: str, reentrant: bool, n: float | str) -> None:
    """The recomputed forward takes another route than the first one, and returns the same."""
    q, k, v = leaves()
    of_n = torch.tensor([0.5, 3.0], requires_grad=True) if n == "per head" else n
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    (attention_n(*wide, n=of_n.detach().double() if isinstance(of_n, Tensor) else of_n)[0].square().sum()).backward()

    def attend(*x: Tensor) -> Any:
        return flash_attention_n(*x, sm_n=of_n, backend="sdpa")

    def counter(where: str) -> Any:
        return FlopCounterMode(display=False) if counted in (where, "both") else contextlib.nullcontext()

    with counter("forward"):
        loss = checkpoint(attend, q, k, v, use_reentrant=reentrant).square().sum()
    with counter("backward"):
        loss.backward()
    assert all(torch.allclose(x.grad.double(), y.grad, atol=1e-5) for x, y in zip((q, k, v), wide, strict=True))


@needs_interpreter
def test_a_checkpoint_on_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout all backends compute the same; with it a second forward elsewhere would drop other weights."""
    from attn_n.backends.triton.portable import PortableKernels

    class Other(PortableKernels):
        name = "other"

    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    register_backend(Other())
    q, k, v = leaves()
    with use_backend("triton"):
        plain, dropped = (
            checkpoint(lambda p=p: flash_attention_n(q, k, v, sm_n=1.0, dropout_p=p), use_reentrant=False)
            for p in (0.0, 0.5)
        )
    expected = attention_n(*(x.double() for x in (q, k, v)), n=1.0)[0]
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (plain, expected)]
    assert all(torch.allclose(a, b.float(), atol=1e-5) for a, b in zip(*gradients, strict=True))
    with use_backend("other"), pytest.raises(RuntimeError, match="another backend than 'triton:portable'"):
        dropped.sum().backward()


@pytest.mark.parametrize("backend", ["sdpa", *(["triton"] if INTERPRETED else [])])
def test_flops(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter finds 2 matmuls forward and 5 backward over all pairs, as PyTorch counts SDPA."""
    for name in ("forward", "forward_with_dropout", "backward"):  # they are registered anew
        monkeypatch.delitem(flop_counter.flop_registry, getattr(torch.ops.attn_n, name), raising=False)
    batch, heads, len_q, len_k, size, size_v = 2, 4, 5, 7, 16, 8
    q = torch.randn(batch, heads, len_q, size, requires_grad=True)
    k, v = (torch.randn(batch, 2, len_k, width, requires_grad=True) for width in (size, size_v))
    forward = 2 * batch * heads * len_q * len_k * (size + size_v)
    backward = 2 * batch * heads * len_q * len_k * (3 * size + 2 * size_v)
    with FlopCounterMode(display=False) as counter:
        out = flash_attention_n(q, k, v, True, sm_n=1.0, backend=backend)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == backward


def test_flops_of_varlen_sequences() -> None:
    q = torch.randn(10, 2, 16, requires_grad=True)
    pairs = 3 * 3 + 7 * 7
    with FlopCounterMode(display=False) as counter:
        flash_attention_n_varlen(q, q, q, STARTS, STARTS, 7, 7, True, sm_n=1.0).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * pairs * 7 * 16


def test_flops_of_sequences_whose_lengths_cannot_be_read() -> None:
    """Each counts as the longest one."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, starts = torch.randn(10, 2, 16), torch.randn(10, 2, 16), torch.empty(4, dtype=torch.int32)
        flash_attention_n_varlen(q, k, k, starts, starts, 5, 7, True, sm_n=1.0)
    assert counter.get_total_flops() == 2 * 2 * (3 * 5 * 7) * 2 * 16


def test_flops_of_a_backward_alone_in_a_new_process() -> None:
    """The formulas apply whichever operator a counter sees first, and whenever the counter was made."""
    code = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from attn_n import flash_attention_n
made_before = FlopCounterMode(display=False)
q = torch.randn(1, 2, 4, 8, requires_grad=True)
out = flash_attention_n(q, q, q, sm_n=1.0)
with FlopCounterMode(display=False) as counter:
    out.sum().backward()
assert counter.get_total_flops() == 2 * 2 * 16 * 5 * 8, counter.get_total_flops()
with made_before:
    flash_attention_n(q, q, q, sm_n=1.0)
assert made_before.get_total_flops() == 2 * 2 * 16 * 2 * 8
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_torchscript_is_refused() -> None:
    """Also a call that is known, of which nothing else is checked."""
    q = torch.randn(1, 2, 4, 8)
    flash_attention_n(q, q, q, sm_n=1.0)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace: .*\n.*torch\.export"):
        torch.jit.trace(lambda q: flash_attention_n(q, q, q, sm_n=1.0), q)


class Attention(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention_n(q, k, v, True, sm_n=1.0, **self.options)


class WithN(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Any:
        return flash_attention_n(q, k, v, True, sm_n=n)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_chooses_where_it_runs(strict: bool, ran: list[str]) -> None:
    x = leaves()
    program = torch.export.export(Attention(), tuple(y.detach() for y in x), strict=strict).module()
    expected = Attention()(*x)
    ran.clear()
    for name, runs in (("sdpa", "forward sdpa:cpu"), ("reference", "attend reference")):
        with use_backend(name):
            assert torch.allclose(program(*(y.detach() for y in x)), expected, atol=1e-6)
        assert ran[-1] == runs
    with use_backend("flash_attn"), pytest.raises(UnsupportedError, match=r"'flash_attn' .* does not serve this call"):
        program(*x)
    ran.clear()
    got = torch.autograd.grad(program(*x).square().sum(), x)
    assert ran == ["forward sdpa:cpu", "backward sdpa:cpu"]
    assert all(torch.allclose(*pair) for pair in zip(got, torch.autograd.grad(expected.square().sum(), x), strict=True))


@pytest.mark.parametrize("of_n", [False, True])
def test_an_exported_program_trains_on_the_reference(of_n: bool, ran: list[str]) -> None:
    x, n = leaves(), torch.rand(2, requires_grad=True)
    attend = WithN() if of_n else Attention()
    inputs = [*x, n] if of_n else x
    program = torch.export.export(attend, tuple(y.detach() for y in inputs)).module()
    expected = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    ran.clear()
    with use_backend("reference"):
        got = torch.autograd.grad(program(*inputs).square().sum(), inputs)
    assert set(ran) == {"attend reference"}
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(got, expected, strict=True))


class WithBias(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor) -> Any:
        return flash_attention_n(q, k, v, sm_n=1.0, attn_mask=mask, alibi_slopes=slopes, return_lse=True)


def test_the_bias_of_an_exported_program_has_its_gradient(ran: list[str]) -> None:
    x = leaves()
    x += [torch.randn(x[0].shape[2], x[1].shape[2], requires_grad=True), torch.rand(2, requires_grad=True)]
    program = torch.export.export(WithBias(), tuple(y.detach() for y in x)).module()
    ran.clear()
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda _, lse: lse.square().sum(),
        lambda *x: x[0].sum() + x[1].sum(),
    ]
    for loss, of in zip(losses, ((0, 1, 3, 4), range(5)), strict=True):  # the lse does not depend on v
        with use_backend("reference"):
            wanted = [x[i] for i in of]
            got, expected = (torch.autograd.grad(loss(*attend(*x)), wanted) for attend in (program, WithBias()))
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(got, expected, strict=True))
    assert set(ran) == {"attend reference"}


def test_an_exported_program_keeps_a_name(ran: list[str]) -> None:
    x = [y.detach() for y in leaves()]
    program = torch.export.export(Attention(backend="sdpa"), tuple(x)).module()
    ran.clear()
    with use_backend("reference"):
        program(*x)
    assert ran == ["forward sdpa:cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "triton:portable", "sdpa"])
def test_cuda_graphs_of_the_compiler(backend: str) -> None:
    """The first call of a process is warmed up in the memory of the graph, of which nothing may be kept."""
    steps = f"""
import torch
from attn_n import flash_attention_n

def loss(q, k, v, sinks):
    return flash_attention_n(q * 1.0, k, v, True, sinks=sinks, backend={backend!r}).float().square().mean()

def gradients(loss):
    torch.compiler.cudagraph_mark_step_begin()
    return [x.clone() for x in torch.autograd.grad(loss(*inputs), inputs)]

inputs = [torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
inputs.append(torch.randn(4, device="cuda", requires_grad=True))
compiled = torch.compile(loss, mode="reduce-overhead")
found = [gradients(compiled) for _ in range(4)][-1]
for x, expected in zip(found, gradients(loss), strict=True):
    torch.testing.assert_close(x, expected, rtol=1e-2, atol=1e-5)
"""
    finished = subprocess.run([sys.executable, "-c", steps], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
