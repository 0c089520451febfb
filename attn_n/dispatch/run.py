"""From a call to its result: the canonical form, the choice of a backend, and the call that is already known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attn_n.autograd import function, passes
from attn_n.autograd.prepared import PreparedCall
from attn_n.backends.base import Backend
from attn_n.call import AttentionCall, Options, Request, autocast, canonical, checks, jagged
from attn_n.dispatch import call_cache, choose, forced, similar
from attn_n.sink.weight import as_tensor

Keep: TypeAlias = Callable[[PreparedCall, AttentionCall], None]

# They are shown every call before it is served, none as one that is known: `attn_n.inspect` while it records.
watchers: list[Callable[[canonical.Canonical], None]] = []


def batch(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention_n`."""
    key = None if watchers else call_cache.key(q, k, v, request)
    known = call_cache.get(key) or call_cache.get_similar(key, q, k, v, request)
    if known is not None:
        return _run_known(known, q, k, v, request, known.options)
    if jagged.is_jagged(q):
        return _run_jagged(q, k, v, request)
    prepared = canonical.batch(q, k, v, request, plain=key is not None and not autocast.enabled(q.device.type))
    return attend(prepared, request, _keeper(key, q, k, v, request) if prepared.as_it_came(q, k, v, request) else None)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    request: Request,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`flash_attention_n_varlen`."""
    packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    key = None if watchers else call_cache.key(q, k, v, request, packing)
    known = call_cache.get(key) or call_cache.get_similar(key, q, k, v, request, packing)
    if known is not None:
        if checks.reads_values(cu_seqlens_q):
            checks.boundaries("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
            checks.boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
        options = known.options._replace(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        return _run_known(known, q, k, v, request, options)
    prepared = canonical.varlen(q, k, v, *packing, request)
    as_it_came = prepared.as_it_came(q, k, v, request) and prepared.options.cu_seqlens_q is cu_seqlens_q
    as_it_came = as_it_came and prepared.options.cu_seqlens_k is cu_seqlens_k
    return attend(prepared, request, _keeper(key, q, k, v, request, packing) if as_it_came else None)


def _run_known(
    known: PreparedCall, q: Tensor, k: Tensor, v: Tensor, request: Request, options: Options
) -> Tensor | tuple[Tensor, Tensor]:
    mask = request.attn_mask
    if mask is not None:
        options = options._replace(mask=canonical.with_dimensions(mask, 4))
    seqused_q, seqused_k, leftpad_k = request.seqused_q, request.seqused_k, request.leftpad_k
    if seqused_q is not None or seqused_k is not None or leftpad_k is not None:
        options = options._replace(seqused_q=seqused_q, seqused_k=seqused_k, leftpad_k=leftpad_k)
        if checks.reads_values(q):
            checks.values_in_use(seqused_q, seqused_k, leftpad_k, q.shape[-2], k.shape[-2])
    return attend_known(known, q, k, v, request, options)


def attend_known(
    known: PreparedCall, q: Tensor, k: Tensor, v: Tensor, request: Request, options: Options
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a call as one of its kind ran; `options` has its tensors."""
    n = request.sm_n if request.sinks is None else request.sinks
    if not isinstance(n, Tensor):
        n = None
    elif checks.reads_values(n):
        checks.values_of_n(n, request.sinks is not None, q)
    if known.under_autocast:
        with autocast.suspended(q.device.type):
            out, lse = function.attend_eagerly(q, k, v, n, options, known)
    elif known.needs_grad:
        out, lse = function.attend_eagerly(q, k, v, n, options, known)
    else:
        out, lse, _ = known.forward(q, k, v, n, options, known.lse_wanted)
    return out if lse is None or not request.return_lse else (out, lse)


def _run_jagged(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Tensor | tuple[Tensor, Tensor]:
    results = attend(canonical.varlen(*jagged.to_varlen(q, k, v), request), request)
    if isinstance(results, Tensor):
        return jagged.nested(results, q)
    out, lse = results
    return jagged.nested(out, q), jagged.nested(lse, q)


def _keeper(
    key: call_cache.Key | None, q: Tensor, k: Tensor, v: Tensor, request: Request, packing: tuple[Any, ...] = ()
) -> Keep | None:
    """Return what keeps a call by its key, and by its kind for other lengths; None if it is not kept."""
    if key is None:
        return None

    def keep(known: PreparedCall, call: AttentionCall) -> None:
        call_cache.put(key, known)
        if similar.covers(call, known.backend, forced.forced(request.backend)[0] is not None):
            call_cache.put_kind(key, q, k, v, request, packing, known)

    return keep


def attend(
    prepared: canonical.Canonical, request: Request, keep: Keep | None = None, chosen: tuple[str, Backend] | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Choose a backend unless one is `chosen`, and run the call; `keep` gets the prepared call."""
    for watcher in watchers:
        watcher(prepared)
    q, k, v, n, n_is_logit, options, call, out_shape = prepared
    name, backend = chosen or choose.choose(call, request.backend)
    lse: Tensor | None
    if backend.differentiates:
        with autocast.suspended(q.device.type):
            out, lse = backend.attend(q, k, v, n, n_is_logit, options, call.return_lse)
    else:
        tensor_n = n if isinstance(n, Tensor) else None
        log_n, numbers, options = _numbers(n, options)
        # With dropout the backward has to run where the forward ran, which an open choice does not promise.
        if torch.compiler.is_exporting() and forced.forced(request.backend)[0] is None and not options.dropout_p:
            name = passes.ANY_BACKEND
        bare, under_autocast = options.without_tensors(), autocast.enabled(q.device.type)
        known = PreparedCall(
            name, bare, n_is_logit, log_n, numbers, call.return_lse, call.needs_grad, call.mask_needs_grad,
            call.alibi_needs_grad, under_autocast,
        )  # fmt: skip
        with autocast.suspended(q.device.type):
            out, lse = function.attend(q, k, v, tensor_n, options, known)
        if keep is not None:
            keep(known, call)
    if out.dim() != len(out_shape) + 1:
        out = out.reshape(*out_shape, out.shape[-1])
        lse = None if lse is None else lse.reshape(out_shape)
    return (out, lse) if call.return_lse and lse is not None else out


def _numbers(n: float | Tensor | None, options: Options) -> tuple[float | None, Tensor | None, Options]:
    """log n of a number n, the `numbers` of a `PreparedCall`, and the options without what these stand for."""
    number = None if isinstance(n, Tensor) else n
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # which imports SymPy

        if not (has_static_value(options.scale) and (number is None or has_static_value(number))):
            # As a factor of a tensor a number becomes an input of the graph, elsewhere a constant.
            cpu = torch.device("cpu")
            log_n = as_tensor(1.0 if number is None else number, cpu).log()
            numbers = torch.stack((log_n, as_tensor(options.scale, cpu)))
            return None if number is None else 0.0, numbers, options.replaced(scale=1.0)
    return None if number is None else math.log(number), None, options
