"""Batches with rows that do not exist: seqused_q, seqused_k, leftpad_k. The case table has them on every backend."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_upper_left

import attn_n
from attn_n import flash_attention_n, flash_attention_n_varlen
from attn_n.backends.adapt import padding
from attn_n.backends.base import Backend
from attn_n.backends.sdpa.cpu import CpuFlash
from attn_n.backends.sdpa.cuda import CudnnAttention
from attn_n.call import Gradients, Grads, Options, Request, Saved
from attn_n.dispatch import call_cache
from tests.calls import gpu_call
from tests.oracle import attention_n

Lengths = tuple[int, ...]


def inputs(batch: int = 3, length: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return q, k and v with negative logits, so that n matters."""
    q, k, v = (torch.randn(batch, 2, length, 8, dtype=dtype) for _ in range(3))
    q[..., 0], k[..., 0] = -2.0, 3.0
    return [x.requires_grad_() for x in (q, k, v)]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def exact(q: Tensor, k: Tensor, v: Tensor, used: Lengths, first: Lengths, causal: bool = True) -> Tensor:
    """Compute right- and left-padded self-attention at n = 1, each batch without its padding."""
    found = torch.zeros_like(q, dtype=torch.float64)
    for b, (end, begin) in enumerate(zip(used, first, strict=True)):
        if begin < end:
            one = q[b : b + 1, :, :end], k[b : b + 1, :, begin:end], v[b : b + 1, :, begin:end]
            found[b, :, :end] = attention_n(*(x.detach().double() for x in one), 1.0, causal=causal)[0][0]
    return found


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_known_call_reads_its_own_lengths(backend: str | None) -> None:
    q, k, v = inputs()
    for used, first in (((6, 2, 0), (0, 0, 0)), ((1, 6, 3), (0, 5, 1)), ((6, 6, 6), (2, 0, 6))):
        lengths = {"seqused_q": int32(*used), "seqused_k": int32(*used), "leftpad_k": int32(*first)}
        out = flash_attention_n(q, k, v, True, sm_n=1.0, backend=backend, **lengths)
        assert torch.allclose(out.double(), exact(q, k, v, used, first), atol=1e-5)
    with pytest.raises(ValueError, match=r"seqused_k: expected numbers from 0 to the 6 keys, got \[6, 7, 0\]"):
        flash_attention_n(q, k, v, True, sm_n=1.0, backend=backend, **{**lengths, "seqused_k": int32(6, 7, 0)})


def test_one_tensor_of_both_lengths_is_another_call_than_two() -> None:
    """With one the kernels know the diagonal, so that no other call may share what was prepared for it."""
    q, k, v = inputs()
    same, other = int32(6, 2, 0), int32(6, 2, 0)
    rest = True, None, 1.0, None, None, None, None, None, 0.0, False, None
    keys = [call_cache.key(q, k, v, Request(*rest, same, seqused_k)) for seqused_k in (same, other, same)]
    assert keys[0] == keys[2] != keys[1]


def test_the_diagonal_is_that_of_the_lengths_in_use() -> None:
    """`seqused_k` alone moves it; right-padded self-attention gives both."""
    q, k, v = inputs(1)
    both = flash_attention_n(q, k, v, True, sm_n=1.0, seqused_q=int32(4), seqused_k=int32(4))
    alone = flash_attention_n(q[:, :, :4], k[:, :, :4], v[:, :, :4], True, sm_n=1.0)
    assert torch.allclose(both[:, :, :4], alone, atol=1e-6)
    keys = flash_attention_n(q, k, v, True, sm_n=1.0, seqused_k=int32(4))
    assert torch.allclose(keys, flash_attention_n(q, k[:, :, :4], v[:, :, :4], True, sm_n=1.0), atol=1e-6)
    assert not torch.allclose(keys[:, :, :4], alone, atol=1e-2)


def test_what_lies_beyond_reaches_nobody() -> None:
    q, k, v = inputs(2)
    n = torch.tensor([1.0, 2.0], requires_grad=True)
    lengths = {"seqused_q": int32(4, 0), "seqused_k": int32(5, 6), "leftpad_k": int32(1, 0)}
    with torch.no_grad():
        q[0, :, 4:] = q[1] = k[0, :, 5:] = v[0, :, 5:] = k[0, :, :1] = v[0, :, :1] = torch.nan
    out, lse = flash_attention_n(q, k, v, sm_n=n, return_lse=True, **lengths)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dout[0, :, 4:] = dout[1] = torch.nan
    dlse[0, :, 4:] = dlse[1] = torch.nan
    gradients = torch.autograd.grad((out, lse), (q, k, v, n), (dout, dlse))
    assert all(x.isfinite().all() for x in (out, lse, *gradients))
    assert not out[1].any()
    assert torch.allclose(lse[1], n.log()[:, None].expand(2, 6))
    dq, dk, dv, _ = gradients
    for x, rows in ((dq, slice(4, None)), (dk, slice(5, None)), (dv, slice(5, None)), (dk, slice(1)), (dv, slice(1))):
        assert not x[0, :, rows].any()
        assert not x[1].any()


@pytest.mark.parametrize("leading", [(), (2, 3)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    """A batch is the first dimension; the others share its lengths. Without one there is one length."""
    q, k, v = (torch.randn(*leading, 2, 6, 8) for _ in range(3))
    used = (4, 5)[: len(leading) or 1]
    out = flash_attention_n(q, k, v, True, sm_n=1.0, seqused_q=int32(*used), seqused_k=int32(*used))
    each = [length for length in used for _ in range(3 if leading else 1)]
    flat = [x.reshape(-1, 2, 6, 8) for x in (q, k, v)]
    truth = exact(*flat, tuple(each), (0,) * len(each)).reshape(q.shape)
    assert torch.allclose(out.double(), truth, atol=1e-5)


def under_compile(attend: Callable[..., Tensor], *x: Tensor) -> Tensor:
    result: Tensor = torch.compile(attend, fullgraph=True, backend="aot_eager")(*x)
    return result


def under_vmap(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> Tensor:
    return torch.vmap(attend)(*(x[:, None] for x in (q, k, v, used)))[:, 0]


@pytest.mark.parametrize("run", [under_compile, under_vmap])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_transforms(run: Any, backend: str | None) -> None:
    q, k, v = inputs()

    def attend(q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> Tensor:
        return flash_attention_n(q, k, v, True, sm_n=1.0, seqused_q=used, seqused_k=used, backend=backend)

    used, dout = int32(6, 2, 0), torch.randn_like(q)
    found = run(attend, q, k, v, used)
    assert torch.allclose(found.double(), exact(q, k, v, (6, 2, 0), (0, 0, 0)), atol=1e-5)
    expected = torch.autograd.grad(attend(q, k, v, used), (q, k, v), dout)
    for gradient, truth in zip(torch.autograd.grad(found, (q, k, v), dout), expected, strict=True):
        assert torch.allclose(gradient, truth, atol=1e-5)


def test_gradients_in_float64() -> None:
    x = inputs(2, 4, torch.float64)
    lengths = {"seqused_q": int32(3, 4), "seqused_k": int32(4, 2), "leftpad_k": int32(1, 0)}
    assert torch.autograd.gradcheck(lambda *x: flash_attention_n(*x, sm_n=1.0, backend="reference", **lengths), x)


class OfSequences(Backend):
    """A kernel of varlen sequences that knows nothing of the rows behind the last one, as the libraries on a GPU."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        for rows, keys in _sequences(options):
            one = [x[there].transpose(0, 1)[None] for x, there in ((q, rows), (k, keys), (v, keys))]
            found = CpuFlash().forward(*one, None, _alone(options)) if one[1].numel() else (one[0] * 0, -torch.inf)
            out[rows] = found[0][0].transpose(0, 1)
            lse[rows] = found[1][0].t() if one[1].numel() else -torch.inf
        return out, lse, None

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        found = [torch.full_like(x, torch.nan) for x in saved[:3]]
        for rows, keys in _sequences(options):
            if rows.start == rows.stop or keys.start == keys.stop:
                for x, there in zip(found, (rows, keys, keys), strict=True):
                    x[there] = 0.0
                continue
            q, k, v, out, dout = [
                x[there].transpose(0, 1)[None]
                for x, there in (
                    (saved.q, rows), (saved.k, keys), (saved.v, keys), (saved.out, rows), (grads.dout, rows),
                )
            ]  # fmt: skip
            assert grads.dlse is not None
            one = Grads(dout, grads.dlse[rows].t()[None]), Saved(q, k, v, out, saved.lse[rows].t()[None])
            parts = CpuFlash().backward(*one, _alone(options))
            for x, part, there in zip(found, parts[:3], (rows, keys, keys), strict=True):
                x[there] = part[0].transpose(0, 1)
        return Gradients(*found)


def _sequences(options: Options) -> list[tuple[slice, slice]]:
    assert options.cu_seqlens_q is not None
    assert options.cu_seqlens_k is not None
    of_q, of_k = [[slice(*x) for x in pairwise(cu.tolist())] for cu in (options.cu_seqlens_q, options.cu_seqlens_k)]
    return list(zip(of_q, of_k, strict=True))


def _alone(options: Options) -> Options:
    return Options(options.scale, options.window_left, options.window_right)


@pytest.mark.parametrize(("used_q", "used_k", "first"), [((6, 2, 0), (6, 3, 4), (0, 1, 4)), ((6, 6, 6), (1, 6, 0), ())])
def test_packed_for_kernels_of_varlen_sequences(used_q: Lengths, used_k: Lengths, first: Lengths) -> None:
    """It is what the libraries on a GPU get; here by a kernel of a CPU."""
    q, k, v = (x.detach() for x in inputs())
    options = Options(0.3, window_right=0, seqused_q=int32(*used_q), seqused_k=int32(*used_k))
    if first:
        options = options._replace(leftpad_k=int32(*first))
    expected = CpuFlash().forward(q, k, v, None, options)
    q[1, :, used_q[1] :] = k[1, :, used_k[1] :] = v[1, :, used_k[1] :] = torch.nan
    out, lse, _ = padding.forward_packed(OfSequences(), q, k, v, options)
    assert torch.allclose(out, expected[0], atol=1e-6)
    assert torch.allclose(lse, expected[1], atol=1e-6)
    grads, saved = Grads(torch.randn_like(out), torch.randn_like(lse)), Saved(q, k, v, out, lse)
    for found, truth in zip(
        padding.backward_packed(OfSequences(), grads, saved, options)[:3],
        CpuFlash().backward(grads, saved, options)[:3],
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(found, truth, atol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        ({"seqused_q": [1, 2, 3]}, TypeError, "seqused_q: expected a torch.Tensor, got list"),
        ({"seqused_k": torch.tensor([1, 2, 3])}, TypeError, "seqused_k: expected int32, got int64"),
        ({"leftpad_k": int32(1)}, ValueError, r"leftpad_k: expected shape \(3,\), one for each batch of q .* got \(1,"),
        ({"seqused_q": int32(1, 7, 1)}, ValueError, r"seqused_q: expected numbers from 0 to the 6 queries, got \[1, 7"),
        ({"leftpad_k": int32(-1, 0, 1)}, ValueError, r"leftpad_k: expected numbers from 0 to the 6 keys, got \[-1, 0"),
        (
            {"seqused_k": int32(1, 2, 3), "attn_mask": causal_upper_left(6, 5)},
            ValueError,
            "attn_mask: expected no causal_upper_left together with seqused_q or seqused_k",
        ),
    ],
)  # fmt: skip
def test_errors(lengths: dict[str, Any], error: type[Exception], text: str) -> None:
    q, k, v = inputs()
    k, v = (k[:, :, :5], v[:, :, :5]) if "attn_mask" in lengths else (k, v)
    with pytest.raises(error, match=text):
        flash_attention_n(q, k, v, **lengths)


def test_varlen_has_its_own_lengths() -> None:
    x, starts = torch.randn(7, 2, 8), int32(0, 3, 7)
    with pytest.raises(TypeError, match=r"seqused_k.*: the lengths of varlen sequences are those of cu_seqlens_q and"):
        flash_attention_n_varlen(x, x, x, starts, starts, 4, 4, seqused_k=int32(1, 2))  # type: ignore[call-overload]


def test_who_serves_them() -> None:
    text = str(attn_n.explain(*inputs(), seqused_k=int32(1, 2, 3), leftpad_k=int32(0, 1, 3)))
    assert "seqused, leftpad_k" in text
    refusal = CudnnAttention().refusal(gpu_call(seqused=True, leftpad=True))
    assert refusal == "has no seqused_q or seqused_k, no leftpad_k"
