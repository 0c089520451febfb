"""Varlen sequences taken one by one, for backends whose kernels know only batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attn_n.call import Gradients, Grads, Options, Saved, checks


def each_sequence(options: Options, tokens_q: int, tokens_k: int) -> Iterator[tuple[slice, slice, Options]]:
    """Yield the queries and the keys of each sequence, and its options as a batch of one.

    This reads cu_seqlens on the host, which synchronizes with an accelerator.
    """
    if options.cu_seqlens_q is None or options.cu_seqlens_k is None:
        raise TypeError("cu_seqlens_q, cu_seqlens_k: expected tensors, got None")
    starts_q = checks.boundaries("cu_seqlens_q", options.cu_seqlens_q, tokens_q, options.max_seqlen_q)
    starts_k = checks.boundaries("cu_seqlens_k", options.cu_seqlens_k, tokens_k, options.max_seqlen_k)
    for b in range(len(starts_q) - 1):
        queries, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        alone = of_one(options, b, slice(queries.stop - queries.start), slice(keys.stop - keys.start))
        yield queries, keys, alone


def of_one(options: Options, b: int, rows: slice, keys: slice) -> Options:
    """Return the options of one sequence, or of one padded batch, by itself: these rows and keys of its mask."""
    mask, slopes = options.mask, options.alibi_slopes
    if mask is not None:
        mask = mask if mask.shape[0] == 1 else mask[b : b + 1]
        mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
        mask = mask if mask.shape[3] == 1 else mask[:, :, :, keys]
    if slopes is not None:
        slopes = slopes[b : b + 1]
    return options.replaced(
        mask=mask, alibi_slopes=slopes, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0,
        seqused_q=None, seqused_k=None, leftpad_k=None,
    )  # fmt: skip


def batch_of_one(x: Tensor, tokens: slice) -> Tensor:
    """Return `tokens` of a varlen `(T, H, E)` tensor as a view `(1, H, tokens, E)`."""
    return x[tokens].transpose(0, 1)[None]


def forward_one_by_one(
    forward: Callable[[Tensor, Tensor, Tensor, Options], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Compute out (T, Hq, Ev) and lse (T, Hq) by a `forward` for batches; without keys out is 0 and lse -inf."""
    out = q.new_zeros((*q.shape[:2], v.shape[2]))
    lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys, alone in _not_empty(options, q, k):
        one_q, one_k, one_v = batch_of_one(q, queries), batch_of_one(k, keys), batch_of_one(v, keys)
        one_out, one_lse = forward(one_q, one_k, one_v, alone)
        batch_of_one(out, queries).copy_(one_out)
        lse[queries] = one_lse[0].T
    return out, lse


def backward_one_by_one(
    backward: Callable[[Grads, Saved, Options], Gradients], grads: Grads, saved: Saved, options: Options
) -> Gradients:
    """Compute dq, dk, dv of varlen tensors by a `backward` for batches."""
    (dout, dlse, *_), (q, k, v, out, lse, *_) = grads, saved
    # dk and dv have as many heads as q, since a kernel that repeats KV heads returns a gradient for each repetition.
    dq, dk, dv = (x.new_zeros((x.shape[0], q.shape[1], x.shape[2])) for x in (q, k, v))
    for queries, keys, alone in _not_empty(options, q, k):
        one_q, one_k, one_v = batch_of_one(q, queries), batch_of_one(k, keys), batch_of_one(v, keys)
        one_dout, one_out = batch_of_one(dout, queries), batch_of_one(out, queries)
        one_dlse = None if dlse is None else dlse[queries].T[None]
        one = Saved(one_q, one_k, one_v, one_out, lse[queries].T[None])
        parts = backward(Grads(one_dout, one_dlse), one, alone)[:3]
        dk, dv = (dx[:, : part.shape[1]] for dx, part in zip((dk, dv), parts[1:], strict=True))
        for dx, part, tokens in zip((dq, dk, dv), parts, (queries, keys, keys), strict=True):
            batch_of_one(dx, tokens).copy_(part)
    return Gradients(dq, dk, dv)


def _not_empty(options: Options, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Options]]:
    for queries, keys, alone in each_sequence(options, q.shape[0], k.shape[0]):
        if queries.start < queries.stop and keys.start < keys.stop:
            yield queries, keys, alone
