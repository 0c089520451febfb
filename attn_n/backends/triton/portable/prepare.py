"""A prepared call of the portable kernels: its launches, and what it allocates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_n.backends.base import dense_strides
from attn_n.backends.triton import allocation
from attn_n.backends.triton.allocation import Allocation
from attn_n.backends.triton.kernel_key import KernelKey, Strides, all_aligned, describe
from attn_n.backends.triton.portable import configs
from attn_n.backends.triton.portable.backward import dkdv_kernel, dmask_kernel, dq_kernel
from attn_n.backends.triton.portable.configs import Config
from attn_n.backends.triton.portable.forward import forward_kernel
from attn_n.backends.triton.portable.tile import ROW_PADDING
from attn_n.call import Gradients, Grads, Options, Saved
from attn_n.launcher import Launch, Part
from attn_n.recent import Recent
from attn_n.sink import rescale


class PortableCall:
    """A prepared call: the launches of both passes, and what allocates their results."""

    def __init__(self, key: KernelKey, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.key = key
        self._out, strides = allocation.empty_like(q, v.shape[-1])
        self._lse = allocation.empty(q.shape[:-1], torch.float32, q.device)
        self._launch = launch("forward", key, (strides,))
        self._backwards: dict[tuple[Any, ...], Backward] = {}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.key.aligned is not all_aligned((q, k, v), options):
            return call_for(q, k, v, log_n, options).forward(q, k, v, log_n, options)
        out, lse = self._out(), self._lse()
        rng_state = None
        if options.dropout_p:
            # Two random numbers of torch's own generator: they follow its seed, also in a captured graph.
            rng_state = torch.randint(1 << 62, (2,), device=q.device)
        sinks, number = (log_n, None) if isinstance(log_n, Tensor) else (None, log_n)
        if options.seqused_q is not None:
            out.zero_()
            lse.copy_(rescale.of_rows(lse, -math.inf if log_n is None else log_n, False))
        self._launch(q, k, v, out, lse, sinks, number, *_extras(rng_state, options))
        return out, lse, rng_state

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        (dout, dlse, *_), (q, k, v, out, lse, _, rng_state) = grads, saved
        log_n = None if grads.of_n is None else log_n_of(grads, saved)
        if dout.stride(-1) != 1:  # as the gradient of a sum: it is loaded many times, so that one copy pays
            dout = dout.contiguous()
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        ready = self._backward((q, k, v, out, dout), log_n, options, grads.of_mask)
        dq, dk, dv = [allocate() for allocate in ready.gradients]
        if options.seqused_q is not None:
            dq.zero_()
        if options.seqused_k is not None or options.leftpad_k is not None:
            dk.zero_()
            dv.zero_()
        workspace, rows = ready.workspace(), ready.rows
        lse_log2, delta = Part(workspace, 0, rows), Part(workspace, rows, rows)
        lost = Part(workspace, 2 * rows, rows) if self.key.float_mask else None
        extras = _extras(rng_state, options)
        shares = None if grads.of_n is None else shares_of_n(log_n, ready.shares)
        ends = options.varlen or options.seqused_q is not None
        if shares is not None and ends:  # a program beyond the end of a sequence stores nothing
            shares.zero_()
        of_slopes = None
        if grads.of_slopes:
            of_slopes = ready.shares().zero_() if ends else ready.shares()
        ready.dq(q, k, v, out, dout, lse, dlse, lse_log2, delta, lost, dq, log_n, shares, of_slopes, *extras)
        for of_keys in ready.of_keys:
            of_keys(q, k, v, dout, lse_log2, delta, lost, dk, dv, *extras)
        dmask = None
        if ready.dmask is not None:
            assert options.mask is not None
            # Of varlen sequences a mask may have more rows and keys than the longest one; a window hides keys.
            dense = not (options.varlen or options.padded) and self.key.window == (None, None)
            allocate = torch.empty if dense else torch.zeros
            dmask = allocate(options.mask.shape, dtype=options.mask.dtype, device=q.device)
            ready.dmask(q, k, v, dout, lse_log2, delta, lost, dmask, *extras)
        dslopes = None if of_slopes is None else of_slopes.sum(2)
        dn = None if shares is None else gradient_of_n(shares, log_n)
        return Gradients(dq, dk, dv, dn, dmask, dslopes)

    def _backward(self, tensors: tuple[Tensor, ...], log_n: Tensor | None, options: Options, of_mask: bool) -> Backward:
        *_, out, dout = tensors
        mask = options.mask.shape if of_mask and options.mask is not None else None
        of_n = None if log_n is None else log_n.stride()
        kind = out.stride(), dout.stride(), of_n, all_aligned(tensors, options), mask
        ready = self._backwards.get(kind)
        if ready is None:
            key = describe(tensors, log_n, options)
            q, k, v, *_ = tensors
            ready = self._backwards[kind] = backward(key, q, k, v, mask)
        return ready


class Backward(NamedTuple):
    """The launches of a backward, in their order, and what allocates its gradients and what the launches share."""

    gradients: tuple[Allocation, ...]  # of dq, dk and dv
    dq: Launch
    of_keys: tuple[Launch, ...]
    dmask: Launch | None
    workspace: Allocation  # of two or, beside a floating mask, three numbers of all rows of all heads
    rows: int  # of all heads, and up to three more
    shares: Allocation  # of each program's share of the gradient of n, (B, H, tiles)


def call_for(q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> PortableCall:
    key = describe((q, k, v), log_n, options)
    return _calls.get(key) or _calls.put(key, PortableCall(key, q, k, v))


# Of the gradient of a mask: some for each SM.
PROGRAMS = 1024

_calls: Recent[KernelKey, PortableCall] = Recent()


def backward(key: KernelKey, q: Tensor, k: Tensor, v: Tensor, mask: Sequence[int] | None = None) -> Backward:
    """`mask` is the shape of a mask that has a gradient."""
    p, (gradients, strides) = key, zip(*[allocation.empty_like(x) for x in (q, k, v)], strict=True)
    dq = launch("dq", p, strides)
    rows = -(-p.heads * padded_rows(p) // 4) * 4  # each of the arrays begins at a multiple of 16 bytes
    return Backward(
        gradients,
        dq,
        tuple([launch(kernel, p, strides) for kernel in configs.kernels_of_keys(p)]),
        None if mask is None else launch_of_dmask(p, mask),
        allocation.empty((rows * (3 if p.float_mask else 2),), torch.float32, p.device),
        rows,
        allocation.empty((p.batch, p.heads, dq.programs // (p.batch * p.heads)), torch.float32, p.device),
    )


def launch(kernel: str, key: KernelKey, results: Sequence[Strides], config: Config | None = None) -> Launch:
    """Return the launch of one of the kernels of `configs`; `config` replaces that of the table.

    `results` are the strides of out, or of dq, dk and dv.
    """
    p, config = key, config or configs.find(kernel, key)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    tile_e, tile_v = configs.tiles_of_widths(p)
    # Behind padding on the left a mask begins anywhere.
    of_mask = config.descriptors and configs.widest(p) <= 128 and p.mask_fits_descriptors and not p.padding[2]
    constants = {
        "GROUPS": p.heads // p.heads_kv, "WIDTH": p.width, "WIDTH_V": p.width_v, "TILE_E": tile_e, "TILE_V": tile_v,
        "LINEAR": p.linear, "FLOAT_MASK": p.float_mask, "PRECISION": "tf32" if p.tf32 else "ieee",
        "TILE_Q": config.tile_q, "TILE_K": config.tile_k, "DESCRIPTORS": config.descriptors,
        "MASK_DESCRIPTOR": of_mask,
    }  # fmt: skip
    numbers: tuple[Any, ...] = (
        p.heads, p.len_q, p.len_k, *p.window, p.scale, p.softcap, *_dropout(p),
    )  # fmt: skip
    lengths = p.varlen or any(p.padding)  # sequences have their own
    extras = p.strides_mask, None if p.strides_mask is None or lengths else p.len_k, p.strides_slopes
    programs_of_queries = p.batch * p.heads * -(-p.len_q // config.tile_q)
    if kernel == "forward":
        numbers = *p.strides, *results, *extras, p.stride_n, *numbers
        return Launch(forward_kernel, programs_of_queries, p.device, numbers, constants, options, config.descriptors)
    (q, k, v, out, dout), (dq, dk, dv) = p.strides, results
    numbers = padded_rows(p), *numbers
    if kernel == "dq":
        numbers = q, k, v, out, dout, dq, *extras, p.stride_n, *numbers
        return Launch(dq_kernel, programs_of_queries, p.device, numbers, constants, options, config.descriptors)
    programs_of_keys = p.batch * p.heads_kv * -(-p.len_k // config.tile_k)
    numbers = q, k, v, dout, dk, dv, *extras, *numbers
    constants |= {"DK": "dk" in kernel, "DV": "dv" in kernel}
    return Launch(dkdv_kernel, programs_of_keys, p.device, numbers, constants, options, config.descriptors)


def launch_of_dmask(key: KernelKey, sizes: Sequence[int], config: Config | None = None) -> Launch:
    """Return the launch that computes the gradient of a mask of these sizes."""
    p, config = key, config or configs.find("dmask", key)
    # Descriptors are made of all batches here.
    descriptors = config.descriptors and not any(p.padding) and all([strides[0] > 0 for strides in p.strides])
    (batches, heads, rows, keys), (tile_e, tile_v) = sizes, configs.tiles_of_widths(p)
    constants = {
        "GROUPS": p.heads // p.heads_kv, "WIDTH": p.width, "WIDTH_V": p.width_v, "TILE_E": tile_e, "TILE_V": tile_v,
        "PRECISION": "tf32" if p.tf32 else "ieee", "TILE_Q": config.tile_q, "TILE_K": config.tile_k,
        "ROWS": rows > 1, "KEYS": keys > 1, "DESCRIPTORS": descriptors,
    }  # fmt: skip
    tiles_q = -(-p.len_q // config.tile_q) if rows > 1 else 1
    tiles_k = -(-p.len_k // config.tile_k) if keys > 1 else 1
    # A program takes several tiles, since its first loads take long, but not so many that some SMs have nothing to do.
    span = max(1, batches * heads * tiles_q * tiles_k // PROGRAMS)
    numbers = (
        *p.strides[:3], p.strides[4], dense_strides(sizes, range(4)), p.strides_mask, p.strides_slopes, tuple(sizes),
        span, padded_rows(p), p.heads, p.batch, p.len_q, p.len_k, *p.window, p.scale, p.softcap, *_dropout(p),
    )  # fmt: skip
    programs = batches * heads * tiles_q * -(-tiles_k // span)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Launch(dmask_kernel, programs, p.device, numbers, constants, options, descriptors)


def _dropout(key: KernelKey) -> tuple[int, float]:
    """Return the 31-bit threshold below which a random number drops a weight, and the factor of the others."""
    return min(int(key.dropout_p * 2**31), 2**31 - 1), 1 / (1 - key.dropout_p)


def log_n_of(grads: Grads, saved: Saved) -> Tensor | None:
    """Return log n if the kernels compute its gradient; None for that of n itself, and for neither."""
    return saved.log_n if grads.of_n == "log n" and isinstance(saved.log_n, Tensor) else None


def shares_of_n(log_n: Tensor | None, allocate: Allocation) -> Tensor:
    """Return memory for the gradient of n: of each row if there is one log n a row, or the share of each program."""
    return torch.empty_like(log_n) if log_n is not None and log_n.dim() > 1 else allocate()


def gradient_of_n(shares: Tensor, log_n: Tensor | None) -> Tensor:
    """Return the gradient from what the kernels stored in `shares_of_n`."""
    if log_n is not None and log_n.dim() > 1:
        return shares
    return shares.sum((0, 2))


def _extras(rng_state: Tensor | None, options: Options) -> tuple[Tensor | None, ...]:
    mask = options.mask
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return (
        mask, options.alibi_slopes, rng_state, options.cu_seqlens_q, options.cu_seqlens_k, options.seqused_q,
        options.seqused_k, options.leftpad_k,
    )  # fmt: skip


def padded_rows(key: KernelKey) -> int:
    """Return the number of rows of the backward's own `(H, rows)` tensors."""
    return key.rows + key.batch * int(ROW_PADDING.value)
