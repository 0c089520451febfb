"""The reference: PyTorch's public SDPA with one more key, whose value is zero and whose logit is log n.

Exact for every n >= 0, on every device, for every argument, and differentiable any number of times. It materialises
the logits and therefore takes memory proportional to L * S.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_n import packed
from attn_n.backends.base import Backend
from attn_n.bias import dense_bias
from attn_n.call import AttentionCall, Options
from attn_n.fold import bounded_exp


class Reference(Backend):
    name = "reference"
    summary = "PyTorch SDPA with an appended key of zero value and logit log n"
    applies_n = True
    differentiates = True

    def why_not(self, call: AttentionCall) -> str | None:
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        n: float | Tensor | None,
        n_is_logit: bool,
        options: Options,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = q.dtype
        # Half precision is computed in float32 and rounded once: log n in bfloat16 would be off by up to 10 %.
        compute = torch.promote_types(dtype, torch.float32)
        # The scale as a factor of a tensor, and below n alike: there torch.compile takes a number as an input.
        q, k, v, options = q.to(compute) * options.scale, k.to(compute), v.to(compute), options.replaced(scale=1.0)
        if isinstance(n, Tensor):
            n = n.to(compute)
        if options.cu_seqlens_q is None:
            out, lse = _attend(q, k, v, n, n_is_logit, options, return_lse)
        else:
            out, lse = _attend_packed(q, k, v, n, n_is_logit, options, return_lse)
        return out.to(dtype), lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, n: float | Tensor | None, n_is_logit: bool, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """One batch, in the dtype it is computed in: q (B, Hq, L, E), k (B, Hkv, S, E), v (B, Hkv, S, Ev)."""
    zero_n = _zero_n_to_differentiate(n, n_is_logit)
    log_n = _log_n(q, n, n_is_logit)
    bias = dense_bias(options, q.shape[2], k.shape[2], (0, q.shape[2]), (0, k.shape[2]), q.dtype, q.device)
    if bias is None:
        bias = q.new_zeros((1, 1, 1, 1))
    bias = bias.expand(*torch.broadcast_shapes(bias.shape, (1, log_n.shape[0], q.shape[2], k.shape[2])))
    logits = None
    if options.softcap is not None or return_lse or zero_n is not None:
        logits = _append(_scores(q, k, options) + bias, log_n)
    sink = k.new_zeros((*k.shape[:2], 1, k.shape[3]))
    keys, values = torch.cat([k, sink], 2), F.pad(v, (0, 0, 0, 1))
    if options.softcap is None:
        queries, mask = q, _append(bias, log_n)
    else:  # SDPA has no softcap: the capped logits go in as the mask of a zero product
        assert logits is not None
        queries, mask = torch.zeros_like(q), logits
    # Only where there are groups: with no heads at all, PyTorch 2.11 divides by zero.
    groups = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            queries, keys, values, mask, options.dropout_p, scale=options.scale, **groups
        )
    lse = None if logits is None else _logsumexp(logits)
    if zero_n is not None and lse is not None:
        out, lse = _differentiate_at_zero(out, lse, zero_n)
    return out, lse if return_lse else None


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, n: float | Tensor | None, n_is_logit: bool, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Each sequence of packed (T, H, E) tensors as a batch of one."""
    outs, lses = [q.new_zeros((0, q.shape[1], v.shape[2]))], [q.new_zeros((0, q.shape[1]))]
    for queries, keys, alone in packed.sequences(options, q.shape[0], k.shape[0]):
        one_q, one_k, one_v = (
            packed.batch_of_one(q, queries),
            packed.batch_of_one(k, keys),
            packed.batch_of_one(v, keys),
        )
        out, lse = _attend(one_q, one_k, one_v, n, n_is_logit, alone, return_lse)
        outs.append(out[0].transpose(0, 1))
        if lse is not None:
            lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses) if return_lse else None


def _scores(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """Scaled and capped logits (B, Hq, L, S), before masks."""
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * options.scale
    return scores if options.softcap is None else options.softcap * (scores / options.softcap).tanh()


def _append(logits: Tensor, log_n: Tensor) -> Tensor:
    """The key of logit log n behind the others: (B, H, L, S) and (H or 1,) give (B, H, L, S + 1)."""
    return torch.cat([logits, log_n[:, None, None].expand(*logits.shape[:-1], 1)], -1)


def _log_n(q: Tensor, n: float | Tensor | None, n_is_logit: bool) -> Tensor:
    """log n as (Hq,) or (1,); the gradient of a zero n is left to `_differentiate_at_zero`."""
    if isinstance(n, Tensor):
        n = n.reshape(-1)
        return n if n_is_logit else torch.where(n > 0, torch.where(n > 0, n, 1.0).log(), -math.inf)
    if n is None:
        return q.new_full((1,), -math.inf)
    number = q.new_ones(1) * n
    return number if n_is_logit else number.log()


def _logsumexp(logits: Tensor) -> Tensor:
    """log sum exp over the keys, with -inf and a zero gradient where all of them are -inf."""
    # Not by torch.logsumexp: its gradient exp(logits - lse) lacks what the rounding of a large lse has lost.
    top = logits.detach().amax(-1, keepdim=True)
    hidden = top == -math.inf
    total = (logits - top.masked_fill(hidden, 0.0)).exp().sum(-1, keepdim=True)
    return (top + total.masked_fill(hidden, 1.0).log()).squeeze(-1)


def _zero_n_to_differentiate(n: float | Tensor | None, n_is_logit: bool) -> Tensor | None:
    """n minus itself where it is zero, a carrier of its gradient; None where n is no differentiable number."""
    if not isinstance(n, Tensor) or n_is_logit or not n.requires_grad or not torch.is_grad_enabled():
        return None
    return (n - n.detach()).masked_fill(n != 0, 0.0).reshape(-1)


def _differentiate_at_zero(out: Tensor, lse: Tensor, zero_n: Tensor) -> tuple[Tensor, Tensor]:
    """The first order in n at n = 0, where log n is -inf: d out = -out exp(-lse) dn, d lse = exp(-lse) dn."""
    hidden = lse == -math.inf
    step = zero_n[:, None] * bounded_exp(-lse.masked_fill(hidden, 0.0)).masked_fill(hidden, 0.0)
    return out - out * step[..., None], lse + step


BACKEND = Reference()
