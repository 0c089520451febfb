"""A prepared call of the Hopper kernels: its launches, and what it allocates."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_n.backends.base import Prepared, aligned
from attn_n.backends.triton import allocation
from attn_n.backends.triton.hopper import prepare
from attn_n.backends.triton.hopper.prepare import Extents, can_count, list_of_tiles
from attn_n.backends.triton.kernel_key import KernelKey, Strides, describe, fits_descriptors
from attn_n.backends.triton.portable import prepare as portable
from attn_n.backends.triton.portable.prepare import log_n_of, shares_of_n
from attn_n.call import Gradients, Grads, Options, Saved
from attn_n.launcher import Part
from attn_n.recent import Recent


class HopperCall:
    """A prepared call: the launches of both passes, and what allocates their results."""

    def __init__(self, key: KernelKey, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._out, strides = allocation.empty_like(q, v.shape[-1])
        self._lse = allocation.empty(q.shape[:-1], torch.float32, q.device)
        self._launches = prepare.forward(key, strides)
        self._backwards: dict[tuple[Strides | None, ...], BackwardCall] = {}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not aligned(q, k, v):
            return portable.call_for(q, k, v, log_n, options).forward(q, k, v, log_n, options)
        out, lse, launches = self._out(), self._lse(), self._launches
        sinks, number = (log_n, None) if isinstance(log_n, Tensor) else (None, log_n)
        queries, keys = _extents(options)
        table = list_of_tiles(launches, q, queries, keys) if launches.table else None
        launches.main(q, k, v, out, lse, sinks, number, *queries[:2], *keys, table)
        return out, lse, None

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        (dout, dlse, *_), (q, k, v, out, lse, *_) = grads, saved
        log_n = None if grads.of_n is None else log_n_of(grads, saved)
        if torch.are_deterministic_algorithms_enabled() or not aligned(q, k, v):
            return portable.call_for(q, k, v, saved.log_n, options).backward(grads, saved, options)
        # The gradient of a sum is expanded, and that of a slice may be unaligned.
        if not (fits_descriptors(dout.stride(), dout.itemsize) and aligned(dout) and _can_count(options, dout)):
            dout = dout.clone(memory_format=torch.contiguous_format)
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        ready = self._backward((q, k, v, out, dout), log_n, options)
        launches = ready.launches
        dq, dk, dv, workspace = ready.dq(), ready.dk(), ready.dv(), ready.workspace()
        dq_sum = Part(workspace, 0, launches.dq_sum)
        stats = Part(workspace, launches.dq_sum, launches.stats)
        shares = None if grads.of_n is None else shares_of_n(log_n, ready.shares)
        a_row = log_n is not None and log_n.dim() > 1  # then `shares` is the gradient
        dn = None if shares is None or a_row else ready.dn()
        if shares is not None and shares.dim() == 2:  # varlen rows may belong to no sequence
            shares.zero_()
        queries, keys = _extents(options)
        table = list_of_tiles(launches, q, keys, queries) if launches.table else None
        filled = (dq, dk, dv) if options.padded else (None, None, None)  # with zeros in the rows that do not exist
        into: tuple[Tensor, ...] = dk, dv
        if launches.postprocess_kv:
            into = torch.zeros(2, launches.dkv_sum, dtype=torch.float32, device=q.device).unbind()
        launches.preprocess(out, dout, lse, dlse, stats, dq_sum, log_n, shares, *queries[:2])
        of_n = (None if dn is None else shares, dn)
        launches.main(q, k, v, dout, stats, dq_sum, *into, *filled, *queries[:2], *keys, table, *of_n)
        for launch, x_sum, x in zip(launches.postprocess_kv, into, (dk, dv), strict=False):
            launch(x_sum, x, *keys)
        launches.postprocess(dq_sum, dq, *queries)
        return Gradients(dq, dk, dv, shares if dn is None else dn)

    def _backward(self, tensors: tuple[Tensor, ...], log_n: Tensor | None, options: Options) -> BackwardCall:
        *_, out, dout = tensors
        kind = out.stride(), dout.stride(), None if log_n is None else log_n.stride()
        ready = self._backwards.get(kind)
        if ready is None:
            ready = self._backwards[kind] = BackwardCall(describe(tensors, log_n, options), *tensors[:3])
        return ready


class BackwardCall:
    """The launches of a backward, and what allocates its gradients and the workspace that the launches share."""

    def __init__(self, key: KernelKey, q: Tensor, k: Tensor, v: Tensor) -> None:
        (self.dq, of_dq), (self.dk, of_dk), (self.dv, of_dv) = [allocation.empty_like(x) for x in (q, k, v)]
        self.launches = prepare.backward(key, of_dq, of_dk, of_dv)
        self.workspace = allocation.empty((self.launches.dq_sum + self.launches.stats,), torch.float32, key.device)
        batch = 1 if key.varlen else key.batch
        tiles = self.launches.preprocess.programs // (batch * key.heads)
        self.shares = allocation.empty((batch, key.heads, tiles), torch.float32, key.device)
        self.dn = allocation.empty((key.heads,), torch.float32, key.device)


_calls: Recent[KernelKey, Prepared] = Recent()


def call_for(q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> Prepared:
    """Return the prepared call; the portable kernels run it where TMA cannot load q, k or v, as unaligned ones."""
    key = describe((q, k, v), log_n, options)
    if not (key.fits_descriptors and _can_count(options, q, k, v)):
        return portable.call_for(q, k, v, log_n, options)
    call = _calls.get(key)
    return call or _calls.put(key, HopperCall(key, q, k, v))


def _can_count(options: Options, *tensors: Tensor) -> bool:
    return not options.padded or all([can_count(x.shape, x.stride()) for x in tensors])


def _extents(options: Options) -> tuple[Extents, Extents]:
    """Return which queries and which keys exist, as the kernels get it."""
    queries = options.cu_seqlens_q, options.seqused_q, None
    return queries, (options.cu_seqlens_k, options.seqused_k, options.leftpad_k)
