"""The torch operators attn_n::forward and attn_n::backward, and the autograd function over them.

Host cost of a call with gradients: `torch.library.custom_op` with `register_autograd` about 69 us, an operator of a
`torch.library.Library` under a plain `autograd.Function` about 31 us, a bare function under it about 10 us. Hence an
eager call runs the function itself, and the operator, which is the same function, is for whoever watches operators.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_n import fold, registry
from attn_n.backends.base import empty_in_order, lies_in_order
from attn_n.call import Options

_OPTIONS = (
    "float scale, SymInt? window_left, SymInt? window_right, float? softcap, float dropout_p, Tensor? mask,"
    " Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
)

PLAIN = (Tensor, torch.nn.Parameter)

_library: Any = torch.library.Library("attn_n", "DEF")
_library.define(
    f"forward(Tensor q, Tensor k, Tensor v, Tensor? log_n_tensor, float? log_n, str backend, {_OPTIONS})"
    " -> (Tensor out, Tensor lse, Tensor rng_state)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? rng_state,"
    f" Tensor? log_n_tensor, bool rows_may_be_empty, bool needs_n_grad, bool n_is_logit, str backend, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dn)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class How(NamedTuple):
    """What runs, and what for.

    Attributes:
        n_is_logit: a tensor n holds log n.
        log_n: n as a number; None if it is a tensor, or 0.
        lse_wanted: otherwise the lse that is returned may lack n.
        watched: what the function of that name says.
    """

    backend: str
    n_is_logit: bool
    log_n: float | None
    lse_wanted: bool
    watched: bool


def attend(
    q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, how: How, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """(out, lse) of canonical tensors by a backend with a forward and a backward; n is `()` or `(Hq,)`."""
    if needs_grad:
        if how.watched:
            q, k, v, options = _distinct(q, k, v, options)
        attended: tuple[Tensor, Tensor] = _Attention.apply(q, k, v, n, options, how)  # type: ignore[no-untyped-call]
        return attended
    out, lse, *_ = _forward(q, k, v, None if n is None else _log_per_head(q, n, how), options, how)
    return out, lse


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_n_tensor: Tensor | None, options: Options, how: How
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    backend, _, log_n, lse_wanted, watched = how
    if watched:
        out, lse, rng_state = torch.ops.attn_n.forward(q, k, v, log_n_tensor, log_n, backend, *options)
        return out, lse, rng_state, False
    return _eager_forward(q, k, v, log_n_tensor, log_n, backend, options, lse_wanted)


def watched(x: Tensor) -> bool:
    """Whether somebody watches operators: a compiler, a tensor subclass (fake tensors), a mode (checkpoints)."""
    if torch.compiler.is_compiling():
        return True
    return type(x) not in PLAIN or torch._C._len_torch_dispatch_stack() > 0


def _distinct(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, Options]:
    """Views in place of repetitions (self-attention of one tensor), of which torch.compile takes none."""
    if k is q:
        k = k.view_as(k)
    if v is q or v is k:
        v = v.view_as(v)
    if options.cu_seqlens_k is not None and options.cu_seqlens_k is options.cu_seqlens_q:
        options = options.replaced(cu_seqlens_k=options.cu_seqlens_k.view_as(options.cu_seqlens_k))
    return q, k, v, options


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, how: How
    ) -> tuple[Tensor, Tensor]:
        log_n_tensor = None if n is None else _log_per_head(q, n, how)
        out, lse, rng_state, lse_lacks_n = _forward(q, k, v, log_n_tensor, options, how)
        mask, slopes = options.mask, options.alibi_slopes
        starts_q, starts_k = options.cu_seqlens_q, options.cu_seqlens_k
        if mask is None and slopes is None and starts_q is None:
            ctx.save_for_backward(q, k, v, out, lse, rng_state, log_n_tensor)
            ctx.options = options
        else:
            ctx.save_for_backward(q, k, v, out, lse, rng_state, log_n_tensor, mask, slopes, starts_q, starts_k)
            ctx.options = options.replaced(mask=None, alibi_slopes=None, cu_seqlens_q=None, cu_seqlens_k=None)
        ctx.rest = how, lse_lacks_n, None if n is None else n.shape
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dout, dlse = grads
        if dout is None and dlse is None:
            return (None,) * 6
        q, k, v, out, lse, rng_state, log_n_tensor, *tensors = ctx.saved_tensors
        options, (how, lse_lacks_n, n_shape) = ctx.options, ctx.rest
        if tensors:
            mask, slopes, starts_q, starts_k = tensors
            options = options.replaced(mask=mask, alibi_slopes=slopes, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
        if dout is None:
            dout = torch.zeros_like(out)
        if lse_lacks_n:
            n = how.log_n if log_n_tensor is None else log_n_tensor
            lse = fold.with_n(lse, n, options.cu_seqlens_q is not None)
        needs_n_grad = ctx.needs_input_grad[3]
        rows_may_be_empty = how.log_n is None and _rows_may_be_empty(q, k, options)
        arguments = (
            dout, dlse, q, k, v, out, lse, rng_state, log_n_tensor, rows_may_be_empty, needs_n_grad,
            how.n_is_logit, how.backend,
        )  # fmt: skip
        if torch.is_grad_enabled():
            dq, dk, dv, dn = _Backward.apply(*arguments, options)  # type: ignore[no-untyped-call]
        elif watched(q):
            dq, dk, dv, dn = torch.ops.attn_n.backward(*arguments, *options)
        else:
            dq, dk, dv, dn = _eager_backward(*arguments, options)
        if not needs_n_grad:
            dn = None
        elif len(n_shape) == 0:
            dn = dn.sum()
        needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
        return dq if needs_q else None, dk if needs_k else None, dv if needs_v else None, dn, None, None


class _Backward(torch.autograd.Function):
    """The backward of a call under create_graph=True: it can be computed, but not differentiated once more."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.backend = arguments[-2]
        return _eager_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise registry.UnsupportedError(
            f"backend {ctx.backend!r} has no double backward: its gradients cannot be differentiated again.\n"
            "To do: use backend='reference', which is differentiable any number of times."
        )


def _log_per_head(q: Tensor, n: Tensor, how: How) -> Tensor:
    """log n as `(Hq,)` in the dtype of the lse."""
    n = n.detach().to(_lse_dtype(q))
    return (n if how.n_is_logit else n.log()).expand(q.shape[1])


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _rows_may_be_empty(q: Tensor, k: Tensor, options: Options) -> bool:
    if options.mask is not None or options.cu_seqlens_q is not None:
        return True
    bounded = options.window_left is not None or options.window_right is not None
    return k.shape[-2] == 0 or (bounded and q.shape[-2] > k.shape[-2])


def _eager_forward(
    q: Tensor, k: Tensor, v: Tensor, log_n_tensor: Tensor | None, log_n: float | None, backend: str, options: Options,
    lse_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor | None, bool]:  # fmt: skip
    """out, lse, the state of dropout, and whether the lse still lacks n, which the backward can add as well."""
    n = log_n if log_n_tensor is None else log_n_tensor
    packed = options.cu_seqlens_q is not None
    if q.numel() == 0 or k.numel() == 0:
        out, lse = _nothing_to_see(q, v)
        return out, lse if n is None else fold.with_n(lse, n, packed), None, False
    chosen = registry.loaded(backend)
    if n is None or chosen.applies_n:
        return *chosen.forward(q, k, v, n, options), False
    out, lse, rng_state = chosen.forward(q, k, v, None, options)
    lse, lacks_n = fold.apply_(out, lse, n, packed, lse_wanted)
    return out, lse, rng_state, lacks_n


def _eager_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor | None,
    log_n_tensor: Tensor | None,
    rows_may_be_empty: bool,
    needs_n_grad: bool,
    n_is_logit: bool,
    backend: str,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_n = log_n_tensor if n_is_logit else None
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv, dn = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), lse.new_empty(0)
        if needs_n_grad:
            dn = fold.gradient_of_n(dout, dlse, out, lse, log_n, options.cu_seqlens_q is not None)
        return dq, dk, dv, dn
    # An operator cannot return None: what it returned in its place, and what a bare function did, are one here.
    rng_state = rng_state if options.dropout_p else None
    if rows_may_be_empty:
        lse, dlse = fold.lse_for_backward(lse, dlse)
    chosen = registry.loaded(backend)
    if needs_n_grad:
        dq, dk, dv, dn = chosen.backward_with_n(dout, dlse, q, k, v, out, lse, rng_state, log_n, options)
    else:
        dq, dk, dv = chosen.backward(dout, dlse, q, k, v, out, lse, rng_state, options)
        dn = lse.new_empty(0)
    return dq, _sum_groups(dk, k.shape[1]), _sum_groups(dv, k.shape[1]), dn


def _nothing_to_see(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention without queries or without keys."""
    lse = torch.full(q.shape[:-1], -math.inf, dtype=_lse_dtype(q), device=q.device)
    return q.new_zeros((*q.shape[:-1], v.shape[-1])), lse


def _sum_groups(dx: Tensor, heads_kv: int) -> Tensor:
    """The gradient of k or v per key head, where the backend returned it per query head."""
    if dx.shape[1] == heads_kv:
        return dx
    return dx.view(dx.shape[0], heads_kv, -1, *dx.shape[2:]).sum(2)


def _in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x with the strides that the fake promised to torch.compile; a copy where the backend returned others."""
    return x if lies_in_order(x, order) else empty_in_order(x, x.shape, order).copy_(x)


def _forward_operator(
    q: Tensor, k: Tensor, v: Tensor, log_n_tensor: Tensor | None, log_n: float | None, backend: str, *values: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*values)
    out, lse, rng_state, _ = _eager_forward(q, k, v, log_n_tensor, log_n, backend, options, lse_wanted=True)
    if rng_state is None:
        rng_state = torch.empty(2 if options.dropout_p else 0, dtype=torch.int64, device=q.device)
    chosen = registry.loaded(backend)
    return _in_order(out, chosen.out_order(q)), _in_order(lse, chosen.lse_order(q)), rng_state


def _backward_operator(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rng_state: Tensor | None, log_n_tensor: Tensor | None, rows_may_be_empty: bool, needs_n_grad: bool,
    n_is_logit: bool, backend: str, *values: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = Options(*values)
    dq, dk, dv, dn = _eager_backward(
        dout, dlse, q, k, v, out, lse, rng_state, log_n_tensor, rows_may_be_empty, needs_n_grad, n_is_logit, backend,
        options,
    )  # fmt: skip
    order = registry.loaded(backend).gradient_order
    return _in_order(dq, order(q)), _in_order(dk, order(k)), _in_order(dv, order(v)), dn


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, log_n_tensor: Tensor | None, log_n: float | None, backend: str, *values: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*values)
    chosen = registry.loaded(backend)
    out = empty_in_order(q, (*q.shape[:-1], v.shape[-1]), chosen.out_order(q))
    lse = empty_in_order(q, q.shape[:-1], chosen.lse_order(q)).to(_lse_dtype(q))
    return out, lse, q.new_empty(2 if options.dropout_p else 0, dtype=torch.int64)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rng_state: Tensor | None, log_n_tensor: Tensor | None, rows_may_be_empty: bool, needs_n_grad: bool,
    n_is_logit: bool, backend: str, *values: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    chosen = registry.loaded(backend)
    dq, dk, dv = (empty_in_order(x, x.shape, chosen.gradient_order(x)) for x in (q, k, v))
    return dq, dk, dv, lse.new_empty(q.shape[1] if needs_n_grad else 0)


_library.impl("forward", _forward_operator, "CompositeExplicitAutograd")
_library.impl("backward", _backward_operator, "CompositeExplicitAutograd")
torch.library.register_fake("attn_n::forward", _fake_forward, lib=_library)
torch.library.register_fake("attn_n::backward", _fake_backward, lib=_library)
