"""Attention in parts, put together: it equals attention over all keys, and n counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_n import flash_attention_n, flash_attention_n_varlen, merge_attention
from tests.oracle import attention_n

SPLITS = ((0, 3), (3, 4), (4, 9))


def inputs(*leading: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    q, k, v = (torch.randn(*leading, heads, 9, 8, dtype=dtype) for heads in (4, 2, 2))
    q[..., 0], k[..., 0] = -2.0, 3.0
    return [x.requires_grad_() for x in (q, k, v)]


def parts(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    found = [
        flash_attention_n(q, k[..., a:b, :], v[..., a:b, :], return_lse=True, backend="reference") for a, b in SPLITS
    ]
    return [out for out, _ in found], [lse for _, lse in found]


N = {
    "zero": {},
    "number": {"sm_n": 1.0},
    "scalar": {"sm_n": torch.tensor(1.7, dtype=torch.float64)},
    "per head": {"sm_n": torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)},
    "sinks": {"sinks": torch.tensor([0.0, -2.0, 20.0, -torch.inf], dtype=torch.float64)},
    "sinks a row": {"sinks": torch.randn(2, 4, 1, dtype=torch.float64)},
}


@pytest.mark.parametrize("kind", N)
def test_against_all_keys_at_once(kind: str) -> None:
    """In float64, with the gradients of q, k, v and n, by out and by lse."""
    x = inputs(2)
    given = {name: x.clone().requires_grad_() if isinstance(x, Tensor) else x for name, x in N[kind].items()}
    out, lse = merge_attention(*parts(*x), **given)
    n, sinks = given.get("sm_n", 0.0), given.get("sinks")
    truth, truth_lse = attention_n(*x, n, sinks)
    assert torch.allclose(out, truth, atol=1e-12)
    assert torch.allclose(lse, truth_lse, atol=1e-12)
    leaves = [*x, *(one for one in given.values() if isinstance(one, Tensor))]
    grads = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), leaves, grads)
    for gradient, expected in zip(found, torch.autograd.grad((truth, truth_lse), leaves, grads), strict=True):
        assert torch.allclose(gradient, expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    x = [one.detach() for one in inputs(2, dtype=dtype)]
    outs, lses = parts(*x)
    out, lse = merge_attention(torch.stack(outs), torch.stack(lses), sm_n=1.0)
    truth, truth_lse = attention_n(*(one.double() for one in x), 1.0)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.allclose(out.double(), truth, atol=4 * torch.finfo(dtype).eps)
    assert torch.allclose(lse.double(), truth_lse, atol=1e-5)


def test_rows_without_keys() -> None:
    """A part that a row does not see, in either spelling, counts nothing; without any the row is empty."""
    out, lse = torch.randn(2, 3, 4), torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, torch.inf, torch.inf]])
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    out[:, 1:] = 0.0
    for n, expected in ((0.0, -torch.inf), (2.0, torch.tensor(2.0).log().item())):
        outs = [x.clone().requires_grad_() for x in (nothing[0], out)]
        merged, merged_lse = merge_attention(outs, [nothing[1], lse], sm_n=n)
        assert torch.allclose(merged[:, 0], out[:, 0] / (1 + n))
        assert not merged[:, 1:].any()
        assert (merged_lse[:, 1:] == expected).all()
        assert all(x.isfinite().all() for x in torch.autograd.grad(merged.sum(), outs))


def test_a_shared_prefix_of_varlen_sequences() -> None:
    """All sequences see the prefix, then themselves: as if each had it in front."""
    q, k, v = (torch.randn(7, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    prefix_k, prefix_v = (torch.randn(5, 2, 8, dtype=torch.float64) for _ in range(2))
    starts, all_q, all_k = ([0, 3, 7], [0, 7], [0, 5])
    cu, cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (starts, all_q, all_k))
    shared = flash_attention_n_varlen(q, prefix_k, prefix_v, cu_q, cu_k, 7, 5, return_lse=True)
    own = flash_attention_n_varlen(q, k, v, cu, cu, 4, 4, True, return_lse=True)
    out, _ = merge_attention(*zip(shared, own, strict=True), sm_n=1.0, varlen=True)
    for a, b in ((0, 3), (3, 7)):
        one_q, one_k, one_v = (
            x.transpose(0, 1)[None]
            for x in (q[a:b], torch.cat([prefix_k, k[a:b]]), torch.cat([prefix_v, v[a:b]]))
        )  # fmt: skip
        truth = attention_n(one_q, one_k, one_v, 1.0, causal=True)[0][0].transpose(0, 1)
        assert torch.allclose(out[a:b], truth, atol=1e-12)


@pytest.mark.parametrize(
    ("outs", "lses", "more", "error", "text"),
    [
        ([], [], {}, ValueError, "outs, lses: expected as many of each, at least one, got 0 and 0"),
        ([torch.ones(2, 3, 4)], [], {}, ValueError, "at least one, got 1 and 0"),
        ([torch.ones(2, 3, 4)], [torch.ones(2, 4)], {}, ValueError, r"lses\[0\]: expected shape \(2, 3\), got \(2, 4"),
        ([torch.ones(2, 3, 4)] * 2, [torch.ones(2, 3), 5], {}, TypeError, r"lses\[1\]: expected a torch.Tensor, got i"),
        ([torch.ones(2, 3, 4)], [torch.ones(2, 3).half()], {}, TypeError, r"lses\[0\]: expected float32, got float16"),
        ([torch.ones(3, 4)], [torch.ones(3)], {"varlen": True}, ValueError, r"expected 3 dimensions \(T, H, Ev\)"),
        ([torch.ones(2, 3, 4)], [torch.ones(2, 3)], {"sm_n": -1.0}, ValueError, "sm_n: expected a finite number >= 0"),
        (
            [torch.ones(2, 3, 4)],
            [torch.ones(2, 3)],
            {"sm_n": 1.0, "sinks": torch.ones(2)},
            ValueError,
            "sinks: expected None together with sm_n",
        ),
    ],
)  # fmt: skip
def test_errors(outs: Any, lses: Any, more: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        merge_attention(outs, lses, **more)
