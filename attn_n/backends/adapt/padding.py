"""Batches with rows that do not exist: packed as varlen sequences, for kernels that know these, or taken one by one.

Keys from `leftpad_k` to `seqused_k` and queries up to `seqused_q` are sequences whose last query is at the last key, as
those of varlen tensors are. The lengths stay on the GPU: the packed tensors have as many rows as the batch, and what is
behind the last sequence is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_n.backends.adapt import one_by_one
from attn_n.backends.base import Backend, empty_in_order
from attn_n.call import Gradients, Grads, Options, Saved


def exists(x: Tensor, used: Tensor | None, first: Tensor | None = None) -> Tensor:
    """Return which rows of x `(B, H, L, E)` exist, `(B or 1, 1, L, 1)`."""
    rows = torch.arange(x.shape[2], device=x.device)[:, None]
    found = rows < (x.shape[2] if used is None else used[:, None, None, None])
    return (found if first is None else found & (rows >= first[:, None, None, None])).reshape(-1, 1, x.shape[2], 1)


class Rows(NamedTuple):
    """Which rows of `(B, H, L, E)` are those of the packed `(B * L, H, E)`, and the other way around."""

    starts: Tensor  # (B + 1,) int32, as cu_seqlens
    batch: Tensor  # (B * L,): of each packed row its batch and its row there
    row: Tensor
    packed: Tensor  # (B, L): of each row its place among the packed ones, if it exists
    exists: Tensor  # (B, L)

    def pack(self, x: Tensor) -> Tensor:
        """Return `(B * L, H, E)` for `(B, H, L, E)`, or `(B * L, H)` for `(B, H, L)`."""
        return x.transpose(1, 2)[self.batch, self.row]

    def unpack(self, x: Tensor, otherwise: float = 0.0) -> Tensor:
        """Return the batch of what is packed; `otherwise` is in the rows that do not exist."""
        batch = x[self.packed]
        there = self.exists.reshape(*self.exists.shape, *(1,) * (batch.dim() - 2))
        return batch.where(there, otherwise).transpose(1, 2)


def rows_of(x: Tensor, used: Tensor | None, first: Tensor | None = None) -> Rows:
    batch, _, length, _ = x.shape
    begin = torch.zeros(batch, dtype=torch.long, device=x.device) if first is None else first.long()
    end = torch.full_like(begin, length) if used is None else used.long()
    starts = F.pad((end - begin).clamp_min(0).cumsum(0), (1, 0))
    place = torch.arange(batch * length, device=x.device)
    # Behind the last sequence these are rows of the last batch, whatever they hold.
    of_batch = torch.searchsorted(starts[1:], place, right=True).clamp_max(batch - 1)
    of_row = (place - starts[of_batch] + begin[of_batch]).clamp_max(length - 1)
    row = torch.arange(length, device=x.device)
    there = (row >= begin[:, None]) & (row < end[:, None])
    packed = (row - begin[:, None] + starts[:-1, None]).clamp(0, batch * length - 1)
    return Rows(starts.to(torch.int32), of_batch, of_row, packed, there)


def as_varlen(q: Tensor, k: Tensor, options: Options) -> tuple[Rows, Rows, Options]:
    """Return how to pack the queries and the keys, and the options of the varlen sequences."""
    queries = rows_of(q, options.seqused_q)
    keys = rows_of(k, options.seqused_k, options.leftpad_k)
    packed = options.replaced(
        cu_seqlens_q=queries.starts, cu_seqlens_k=keys.starts, max_seqlen_q=q.shape[2], max_seqlen_k=k.shape[2],
        seqused_q=None, seqused_k=None, leftpad_k=None,
    )  # fmt: skip
    return queries, keys, packed


def forward_packed(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute a batch by the varlen forward of a backend."""
    queries, keys, packed = as_varlen(q, k, options)
    out, lse, rng_state = backend.forward(queries.pack(q), keys.pack(k), keys.pack(v), None, packed)
    return queries.unpack(out), queries.unpack(lse, -math.inf), rng_state


def backward_packed(backend: Backend, grads: Grads, saved: Saved, options: Options) -> Gradients:
    """Compute the gradients of a batch by the varlen backward of a backend."""
    queries, keys, packed = as_varlen(saved.q, saved.k, options)
    dout, dlse = queries.pack(grads.dout), None if grads.dlse is None else queries.pack(grads.dlse)
    found = backend.backward(
        grads._replace(dout=dout, dlse=dlse),
        saved._replace(
            q=queries.pack(saved.q), k=keys.pack(saved.k), v=keys.pack(saved.v), out=queries.pack(saved.out),
            lse=queries.pack(saved.lse),
        ),
        packed,
    )  # fmt: skip
    return found._replace(dq=queries.unpack(found.dq), dk=keys.unpack(found.dk), dv=keys.unpack(found.dv))


def each_batch(q: Tensor, k: Tensor, options: Options) -> Iterator[tuple[int, slice, slice, Options]]:
    """Yield the number of each batch, its queries and keys that exist, and its options.

    This reads the lengths on the host, which would synchronize with an accelerator.
    """
    batch, _, len_q, _ = q.shape
    lengths = (options.seqused_q, len_q), (options.seqused_k, k.shape[2]), (options.leftpad_k, 0)
    in_use = [[otherwise] * batch if x is None else x.tolist() for x, otherwise in lengths]
    for b, (end_q, end_k, begin) in enumerate(zip(*in_use, strict=True)):
        if end_q == 0 or end_k <= begin:
            continue
        queries, keys = slice(0, end_q), slice(begin, end_k)
        yield b, queries, keys, one_by_one.of_one(options, b, queries, keys)


def forward_each(
    forward: Callable[[Tensor, Tensor, Tensor, Options], tuple[Tensor, Tensor]], backend: Backend, q: Tensor, k: Tensor,
    v: Tensor, options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute a batch by a `forward` for each of its rows of batches alone."""
    out = empty_in_order(q, (*q.shape[:3], v.shape[3]), backend.out_dim_order(q)).zero_()
    lse = empty_in_order(q, q.shape[:3], backend.lse_dim_order(q)).to(torch.promote_types(q.dtype, torch.float32))
    lse.fill_(-math.inf)
    for b, queries, keys, alone in each_batch(q, k, options):
        one_out, one_lse = forward(q[b : b + 1, :, queries], k[b : b + 1, :, keys], v[b : b + 1, :, keys], alone)
        out[b : b + 1, :, queries], lse[b : b + 1, :, queries] = one_out, one_lse
    return out, lse


def backward_each(
    backward: Callable[[Grads, Saved, Options], Gradients], grads: Grads, saved: Saved, options: Options
) -> Gradients:
    """Compute dq, dk and dv by a `backward` for each batch alone."""
    (dout, dlse, *_), (q, k, v, out, lse, *_) = grads, saved
    # dk and dv have as many heads as q, since a kernel that repeats KV heads returns a gradient for each repetition.
    dq, dk, dv = [x.new_zeros((x.shape[0], q.shape[1], *x.shape[2:])) for x in (q, k, v)]
    for b, queries, keys, alone in each_batch(q, k, options):
        one = slice(b, b + 1)
        one_dlse = None if dlse is None else dlse[one, :, queries]
        of_one = Saved(q[one, :, queries], k[one, :, keys], v[one, :, keys], out[one, :, queries], lse[one, :, queries])
        parts = backward(Grads(dout[one, :, queries], one_dlse), of_one, alone)
        dk, dv = dk[:, : parts.dk.shape[1]], dv[:, : parts.dv.shape[1]]
        dq[one, :, queries], dk[one, :, keys], dv[one, :, keys] = parts.dq, parts.dk, parts.dv
    return Gradients(dq, dk, dv)
