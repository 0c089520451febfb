"""From a call to its result: the canonical form, the choice of a backend, and the call that is already known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_n.autograd import operators
from attn_n.call import Options, Request, autocast, canonical, jagged
from attn_n.dispatch import choose, forced, plans
from attn_n.sink import rescale


def batch(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention_n`."""
    key = plans.key(q, k, v, request)
    plan = plans.find(key)
    if plan is not None:
        out, lse = operators.attend(q, k, v, plans.tensor_n(request), *plan)
        return (out, lse) if request.return_lse else out
    if jagged.is_jagged(q):
        return _run_jagged(q, k, v, request)
    prepared = canonical.batch(q, k, v, request, plain=key is not None)
    as_it_came = prepared.q is q and prepared.k is k and prepared.v is v
    return _run(prepared, request, key if as_it_came else None)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    request: Request,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`flash_attention_n_varlen`."""
    return _run(canonical.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, request), request)


def _run_jagged(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Tensor | tuple[Tensor, Tensor]:
    results = _run(canonical.varlen(*jagged.packed(q, k, v), request), request)
    if isinstance(results, Tensor):
        return jagged.nested(results, q)
    out, lse = results
    return jagged.nested(out, q), jagged.nested(lse, q)


def _run(
    prepared: canonical.Canonical, request: Request, key: plans.Key | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    q, k, v, n, n_is_logit, options, call, out_shape = prepared
    name, backend = choose.choose(call, request.backend)
    lse: Tensor | None
    if backend.differentiates:
        with autocast.suspended(q.device.type):
            out, lse = backend.attend(q, k, v, n, n_is_logit, options, call.return_lse)
    else:
        tensor_n = n if isinstance(n, Tensor) else None
        log_n, numbers, options = _numbers(n, options)
        # With dropout the backward has to run where the forward ran, which an open choice does not promise.
        if torch.compiler.is_exporting() and forced.forced(request.backend)[0] is None and not options.dropout_p:
            name = operators.ANY_BACKEND
        how = operators.How(name, n_is_logit, log_n, numbers, call.return_lse, operators.watched(q))
        with autocast.suspended(q.device.type):
            out, lse = operators.attend(q, k, v, tensor_n, options, how, call.needs_grad)
        if key is not None:
            plans.keep(key, plans.Plan(options, how, call.needs_grad))
    if out.dim() != len(out_shape) + 1:
        out = out.reshape(*out_shape, out.shape[-1])
        lse = None if lse is None else lse.reshape(out_shape)
    return (out, lse) if call.return_lse and lse is not None else out


def _numbers(n: float | Tensor | None, options: Options) -> tuple[float | None, Tensor | None, Options]:
    """log n of a number n, the `numbers` of `operators.How`, and the options without what these stand for."""
    number = None if isinstance(n, Tensor) else n
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # which imports SymPy

        if not (has_static_value(options.scale) and (number is None or has_static_value(number))):
            # As a factor of a tensor a number becomes an input of the graph, elsewhere a constant.
            cpu = torch.device("cpu")
            log_n = rescale.as_tensor(1.0 if number is None else number, cpu).log()
            numbers = torch.stack((log_n, rescale.as_tensor(options.scale, cpu)))
            return None if number is None else 0.0, numbers, options.replaced(scale=1.0)
    return None if number is None else math.log(number), None, options
