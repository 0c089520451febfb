"""The two passes of a call of canonical tensors: the backend, n behind it, and what no backend is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_n.backends import registry
from attn_n.backends.adapt import padding
from attn_n.backends.base import Backend, Prepared
from attn_n.call import AttentionCall, Grads, Options, Saved, describe
from attn_n.call.errors import UnsupportedError
from attn_n.sink import rescale

ANY_BACKEND = ""  # in place of a name: the choice is made when the operator runs
_choose: Callable[[AttentionCall], Backend]


def choose_by(choose: Callable[[AttentionCall], Backend]) -> None:
    """What chooses then. It is handed in from above: the operators know backends, and not how one is chosen."""
    global _choose
    _choose = choose


class Needed(NamedTuple):
    """Which gradients are asked for beyond dq, dk and dv."""

    n: bool = False
    mask: bool = False
    slopes: bool = False


# dq, dk, dv, dn, dmask and dslopes.
Found = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def forward(
    options: Options, lse_wanted: bool, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, n_is_logit: bool,
    log_n: float | None, numbers: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """out, lse (unless it is wanted maybe still without n), and the state of dropout."""
    if numbers is not None:
        log_n, options = with_numbers(numbers, log_n, options)
    log_of_n = log_n if n is None else log_of(q, n, n_is_logit)
    if q.numel() == 0 or k.numel() == 0:
        out, lse = _nothing_to_see(q, v)
        return out, lse if log_of_n is None else rescale.add_to_lse(lse, log_of_n, options.varlen), None
    chosen = chosen_now(backend, q, k, v, n, options)
    if chosen.differentiates:
        with torch.no_grad():
            out, attended_lse = chosen.attend(q, k, v, log_of_n, True, options, True)
        assert attended_lse is not None
        return out, attended_lse, None
    return forward_by(chosen, chosen.applies_n, q, k, v, log_of_n, options, lse_wanted)


def forward_by(
    passes: Prepared, applies_n: bool, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options,
    lse_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    if log_n is None or applies_n:
        return passes.forward(q, k, v, log_n, options)
    out, lse, rng_state = passes.forward(q, k, v, None, options)
    return out, rescale.add_sink_(out, lse, log_n, options.varlen, lse_wanted), rng_state


def backward(
    options: Options, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rng_state: Tensor | None, n: Tensor | None, n_is_logit: bool, rows_may_be_empty: bool, needs_n_grad: bool,
    needs_mask_grad: bool, needs_slopes_grad: bool, numbers: Tensor | None, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As many tensors as `Found` has; those that are not asked for are empty."""
    if numbers is not None:
        _, options = with_numbers(numbers, None, options)
    needed = Needed(needs_n_grad, needs_mask_grad, needs_slopes_grad)
    if q.numel() == 0 or k.numel() == 0:
        dn = lse.new_empty(0)
        if needed.n:
            log_n = log_of(q, n, True) if n is not None and n_is_logit else None
            dn = gradient_of_n(options, dout, dlse, out, lse, n, log_n)
        of_options = zip((options.mask, options.alibi_slopes), needed[1:], strict=True)
        zeros = [lse.new_empty(0) if x is None or not needs_it else x.new_zeros(x.shape) for x, needs_it in of_options]
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dn, *zeros
    chosen = chosen_now(backend, q, k, v, n, options)
    if chosen.differentiates:
        raise UnsupportedError(
            f"an exported program that was compiled cannot be differentiated by {chosen.name}, which is chosen here.\n"
            "To do: name a backend that has a backward, by use_backend or ATTN_N_BACKEND."
        )
    saved = Saved(q, k, v, out, lse, None, rng_state)
    found = backward_by(chosen, dout, dlse, saved, n, n_is_logit, rows_may_be_empty, needed, options)
    return tuple([lse.new_empty(0) if x is None else x for x in found])


def backward_by(
    passes: Prepared, dout: Tensor, dlse: Tensor | None, saved: Saved, n: Tensor | None, n_is_logit: bool,
    rows_may_be_empty: bool, needed: Needed, options: Options,
) -> Found:  # fmt: skip
    # The gradient of a complex loss may have its sign in a flag, which kernels do not see.
    if dout.is_neg() or (dlse is not None and dlse.is_neg()):
        dout, dlse = dout.resolve_neg(), None if dlse is None else dlse.resolve_neg()
    q, k, v, out, lse, _, rng_state = saved
    log_n = log_of(q, n, True) if n is not None and n_is_logit and needed.n else None
    if rows_may_be_empty:
        lse, dlse = rescale.lse_for_backward(lse, dlse)
    if rows_may_be_empty or log_n is not None:
        saved = Saved(q, k, v, out, lse, log_n, rng_state)
    of_n: Any = None if not needed.n else "n" if log_n is None else "log n"
    dq, dk, dv, dn, dmask, dslopes = passes.backward(
        Grads(dout, dlse, of_n, needed.mask, needed.slopes), saved, options
    )
    if needed.n:
        dn = _shaped_as(dn, n) if dn is not None else gradient_of_n(options, dout, dlse, out, lse, n, log_n)
    if dk.shape[1] != k.shape[1] or dv.shape[1] != k.shape[1]:
        dk, dv = _sum_groups(dk, k.shape[1]), _sum_groups(dv, k.shape[1])
    return dq, dk, dv, dn, dmask, dslopes


def gradient_of_n(
    options: Options, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, n: Tensor | None,
    log_n: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of a tensor n in its shape, or, if `log_n` is given, that of log n."""
    dout, dlse = _in_use(options, dout, dlse)
    return _shaped_as(rescale.gradient_of_n(dout, dlse, out, lse, log_n, options.varlen), n)


def chosen_now(name: str, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options) -> Backend:
    """The backend of that name, or that of the automatic order here and now (an exported program runs anywhere)."""
    if name != ANY_BACKEND:
        return registry.loaded(name)
    mask, slopes = [x is not None and x.requires_grad for x in (options.mask, options.alibi_slopes)]
    needs_grad = mask or slopes or any(x is not None and x.requires_grad for x in (q, k, v, n))
    # What one of the two passes does not know is left out: whether a number n is 0, and whether lse has a gradient.
    n_kind = "float" if n is None else "per row" if n.dim() > 1 else "per head"
    call = describe(
        q, k, v, options, n_kind=n_kind, return_lse=needs_grad, needs_grad=needs_grad, mask_needs_grad=mask,
        alibi_needs_grad=slopes,
    )  # fmt: skip
    return _choose(call)


def with_numbers(numbers: Tensor, log_n: float | None, options: Options) -> tuple[float | None, Options]:
    log_of_n, scale = numbers.tolist()
    return None if log_n is None else log_of_n, options.replaced(scale=scale)


def log_of(q: Tensor, n: Tensor, n_is_logit: bool) -> Tensor:
    """log n in the dtype of the lse: `(Hq,)` with a stride of 1, or 0 for a scalar; or one a row, of lse's shape."""
    dtype = lse_dtype(q)
    if n.dim() > 1:
        return n.detach().to(dtype).expand(q.shape[:-1]).contiguous()
    if n.requires_grad:
        n = n.detach()
    if n_is_logit and n.dtype is dtype and n.dim() == 1 and n.is_contiguous():
        return n
    if not n_is_logit:  # a float64 n may be no number of float32, and its logarithm is one
        n = n.to(torch.promote_types(n.dtype, dtype)).log()
    return n.to(dtype).contiguous().expand(q.shape[1])


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def rows_may_be_empty_in(q: Tensor, k: Tensor, options: Options) -> bool:
    if options.mask is not None or options.varlen or options.padded:
        return True
    right = options.window_right
    bounded = options.window_left is not None or right is not None
    return k.shape[-2] == 0 or (right is not None and right < 0) or (bounded and q.shape[-2] > k.shape[-2])


def _in_use(options: Options, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients with zeros in the rows that do not exist, where anything may stand."""
    if options.seqused_q is None:
        return dout, dlse
    exists = padding.exists(dout, options.seqused_q)
    return dout.where(exists, 0.0), None if dlse is None else dlse.where(exists[..., 0], 0.0)


def _shaped_as(dn: Tensor, n: Tensor | None) -> Tensor:
    """The gradient of n per head as that of a scalar, if n is one; that of one a row in the shape of n."""
    return dn if n is None or n.dim() == 1 else dn.sum_to_size(n.shape)


def _nothing_to_see(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention without queries or without keys."""
    lse = torch.full(q.shape[:-1], -math.inf, dtype=lse_dtype(q), device=q.device)
    return q.new_zeros((*q.shape[:-1], v.shape[-1])), lse


def _sum_groups(dx: Tensor, heads_kv: int) -> Tensor:
    """The gradient of k or v per KV head, where the backend returned it per query head."""
    if dx.shape[1] == heads_kv:
        return dx
    return dx.view(dx.shape[0], heads_kv, -1, *dx.shape[2:]).sum(2)
