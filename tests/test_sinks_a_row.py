"""Sinks of one logit a row, in every form in which they can be passed; the case table has them on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attn_n
from attn_n import flash_attention_n, flash_attention_n_varlen
from attn_n.backends.base import Backend
from tests.calls import gpu_call
from tests.cases import INTERPRETED
from tests.oracle import attention_n

BACKENDS = [None, "reference", *(["triton"] if INTERPRETED else [])]


def inputs(*leading: int, sinks: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return q, k, v with negative logits, and sinks."""
    q, k, v = (torch.randn(*leading, heads, 5, 8, dtype=dtype) for heads in (4, 2, 2))
    q[..., 0], k[..., 0] = -2.0, 3.0
    return [x.requires_grad_() for x in (q, k, v, torch.randn(sinks, dtype=dtype))]


def exact(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    batch = q.shape[:-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]).double() for x in (q, k, v))
    of_rows = sinks.double().expand(*batch, 4, 5).reshape(-1, 4, 5)
    return attention_n(q, k, v, sinks=of_rows, causal=True)[0].reshape(*batch, 4, 5, 8)


@pytest.mark.parametrize(
    ("leading", "shape"),
    [
        ((), (4, 5)), ((), (1, 5)), ((), (4, 1)), ((2,), (2, 4, 5)), ((2,), (1, 1, 5)), ((2,), (2, 4, 1)),
        ((2, 3), (2, 3, 4, 5)), ((2, 3), (1, 3, 1, 5)), ((2, 3), (1, 1, 4, 1)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(leading: tuple[int, ...], shape: tuple[int, ...], backend: str | None) -> None:
    dtype, tolerance = (torch.float32, 1e-4) if backend == "triton" else (torch.float64, 1e-9)
    x = inputs(*leading, sinks=shape, dtype=dtype)
    truth = exact(*x)
    dout = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, x, dout)
    for _ in range(2):  # the second call is prepared
        out = flash_attention_n(*x[:3], True, sinks=x[3], backend=backend)
        assert torch.allclose(out.double(), truth, atol=tolerance)
        for found, gradient in zip(torch.autograd.grad(out, x, dout.to(dtype)), expected, strict=True):
            assert found.shape == gradient.shape
            assert torch.allclose(found, gradient, atol=tolerance)


def test_a_matrix_of_queries_has_one_sink_alone() -> None:
    x = torch.randn(5, 8)
    assert flash_attention_n(x, x, x, sinks=torch.zeros(1)).isfinite().all()
    with pytest.raises(
        ValueError, match=r"sinks: expected \(1,\), one a head, or one a row: .*\(5,\), .* got \(1, 5\)$"
    ):
        flash_attention_n(x, x, x, sinks=torch.zeros(1, 5))


def test_varlen_names_its_own_shape() -> None:
    x, starts = torch.randn(7, 4, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"one a row: the shape of the lse, \(7, 4\), or 1 for any of it; got \(2, 4, 5\)$"
    ):
        flash_attention_n_varlen(x, x, x, starts, starts, 4, 4, sinks=torch.zeros(2, 4, 5))


def test_sinks_projected_in_half_precision() -> None:
    """As a layer makes them from its hidden states, which trains with them."""
    x = [each.detach() for each in inputs(2, sinks=(2, 4, 5), dtype=torch.float32)]
    sinks = x[3].bfloat16().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out = flash_attention_n(*x[:3], True, sinks=sinks)
    wide = sinks.detach().double().requires_grad_()
    truth = exact(*x[:3], wide)
    assert torch.allclose(out.double(), truth, atol=1e-5)
    got, expected = (torch.autograd.grad(y.sum(), s)[0] for y, s in ((out, sinks), (truth, wide)))
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.double(), expected, rtol=1e-2, atol=1e-3)


def under_func_grad(x: list[Tensor]) -> tuple[Tensor, ...]:
    found = torch.func.grad(lambda *y: flash_attention_n(*y[:3], True, sinks=y[3]).sin().sum(), (0, 1, 2, 3))(*x)
    return tuple(found)


def under_a_checkpoint(x: list[Tensor]) -> tuple[Tensor, ...]:
    out = checkpoint(lambda *y: flash_attention_n(*y[:3], True, sinks=y[3]), *x, use_reentrant=False)
    return torch.autograd.grad(out.sin().sum(), x)


def under_compile(x: list[Tensor]) -> tuple[Tensor, ...]:
    attend = torch.compile(lambda *y: flash_attention_n(*y[:3], True, sinks=y[3]), fullgraph=True, backend="aot_eager")
    return torch.autograd.grad(attend(*x).sin().sum(), x)


@pytest.mark.parametrize("run", [under_func_grad, under_a_checkpoint, under_compile])
@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 4, 1)], ids=str)
def test_gradients(run: Any, shape: tuple[int, ...]) -> None:
    x = inputs(2, sinks=shape)
    expected = torch.autograd.grad(exact(*x).sin().sum(), x)
    for found, gradient in zip(run(x), expected, strict=True):
        assert torch.allclose(found, gradient, atol=1e-9)


@pytest.mark.parametrize("dim", [0, None])
@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 4, 5)], ids=str)
def test_vmap(shape: tuple[int, ...], dim: int | None) -> None:
    q, k, v, _ = (x.detach() for x in inputs(3, 2, sinks=(1,)))
    sinks = torch.randn((3, *shape) if dim == 0 else shape, dtype=torch.float64)
    got = torch.vmap(lambda *x: flash_attention_n(*x[:3], True, sinks=x[3]), (0, 0, 0, dim))(q, k, v, sinks)
    of_each = sinks if dim == 0 else sinks.expand(3, *shape)
    for one, *x in zip(got, q, k, v, of_each, strict=True):
        assert torch.allclose(one, exact(*x), atol=1e-9)


def test_who_serves_them() -> None:
    call = gpu_call(n_kind="per row", needs_grad=False)
    assert Backend().refusal(call) is None  # plain attention: n is applied behind it

    class Applies(Backend):
        applies_n = True

    assert Applies().refusal(call) == "has no n or sinks of more than one dimension"
    q, k, v, sinks = inputs(2, sinks=(2, 4, 5))
    assert "n: per row" in str(attn_n.explain(q, k, v, sinks=sinks))
