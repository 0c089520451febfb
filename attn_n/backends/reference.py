"""The reference: the formula as a sequence of differentiable PyTorch operations.

Exact for every n >= 0, on every device, for every argument, and differentiable any number of times, also at n = 0. It
materialises the logits and therefore takes memory proportional to L * S.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_n.backends.adapt import one_by_one, padding
from attn_n.backends.adapt.dense_bias import dense_bias
from attn_n.backends.base import Backend
from attn_n.call import Options
from attn_n.sink.weight import as_tensor, weight_of_n


class Reference(Backend):
    name = "reference"
    summary = "the formula as a sequence of differentiable PyTorch operations"
    honours = (
        "causal", "window", "negative window", "softcap", "dropout", "mask", "mask gradient", "alibi", "alibi gradient",
        "varlen", "lse gradient", "n a row", "seqused", "leftpad",
    )  # fmt: skip
    applies_n = True
    differentiates = True
    compares_lengths = True

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
        # The scale, and n below, multiply a tensor: torch.compile makes such numbers inputs of the graph.
        q, k, v, options = q.to(compute) * options.scale, k.to(compute), v.to(compute), options.replaced(scale=1.0)
        if options.padded:
            out, lse = _attend_padded(q, k, v, n, n_is_logit, options, return_lse)
        elif options.cu_seqlens_q is None:
            out, lse = _attend(q, k, v, n, n_is_logit, options, return_lse)
        else:
            out, lse = _attend_varlen(q, k, v, n, n_is_logit, options, return_lse)
        return out.to(dtype), lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, n: float | Tensor | None, n_is_logit: bool, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute one batch in the dtype of q (B, Hq, L, E), k (B, Hkv, S, E) and v (B, Hkv, S, Ev)."""
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1  # there may be no heads at all
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q @ k.mT * options.scale
    if options.softcap is not None:
        logits = options.softcap * (logits / options.softcap).tanh()
    bias = dense_bias(options, q.shape[2], k.shape[2], (0, q.shape[2]), (0, k.shape[2]), q.dtype, q.device)
    if bias is not None:
        logits = logits + bias
    # The result does not depend on what is subtracted, except by overflow: hence that needs no gradient.
    log_n = _log_n(q, n, n_is_logit)
    row_max = log_n.detach().expand(*logits.shape[:-1], 1)
    if logits.shape[-1]:
        row_max = torch.maximum(row_max, logits.detach().amax(-1, keepdim=True))
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)  # in a row without visible keys at n = 0
    weights = (logits - row_max).exp()
    if n is not None and not n_is_logit:
        of_n = weight_of_n(n[:, None, None] if isinstance(n, Tensor) and n.dim() else n, row_max)
    else:
        of_n = (log_n - row_max).exp()
    row_sum = weights.sum(-1, keepdim=True) + of_n
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1.0)
    out = F.dropout(weights / row_sum, options.dropout_p) @ v if options.dropout_p else weights / row_sum @ v
    return out, (row_max + row_sum.log()).masked_fill(empty, -math.inf).squeeze(-1) if return_lse else None


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, n: float | Tensor | None, n_is_logit: bool, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute a batch without the rows that do not exist: neither values nor gradients are read there."""
    of_q = padding.exists(q, options.seqused_q)
    of_k = padding.exists(k, options.seqused_k, options.leftpad_k)
    q, k, v = q.where(of_q, 0.0), k.where(of_k, 0.0), v.where(of_k, 0.0)
    out, lse = _attend(q, k, v, n, n_is_logit, options, return_lse)
    if lse is not None:
        lse = lse.where(of_q[..., 0], lse.detach())
    return out.where(of_q, 0.0), lse


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, n: float | Tensor | None, n_is_logit: bool, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute each sequence of varlen (T, H, E) tensors as a batch of one."""
    outs, lses = [q.new_zeros((0, q.shape[1], v.shape[2]))], [q.new_zeros((0, q.shape[1]))]
    for queries, keys, alone in one_by_one.each_sequence(options, q.shape[0], k.shape[0]):
        one_q, one_k, one_v = (
            one_by_one.batch_of_one(q, queries),
            one_by_one.batch_of_one(k, keys),
            one_by_one.batch_of_one(v, keys),
        )
        of_sequence = n
        if isinstance(n, Tensor) and n.dim() > 1:  # (T, Hq)
            of_sequence = (n if n.shape[0] == 1 else n[queries]).t()[None]
        out, lse = _attend(one_q, one_k, one_v, of_sequence, n_is_logit, alone, return_lse)
        outs.append(out[0].transpose(0, 1))
        if lse is not None:
            lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses) if return_lse else None


def _log_n(q: Tensor, n: float | Tensor | None, n_is_logit: bool) -> Tensor:
    """Return log n so that it broadcasts to (B, Hq, L, 1); if n is not a logit, without its gradient."""
    if n is None:
        return q.new_full((1,), -math.inf)
    if not isinstance(n, Tensor):
        return q.new_zeros(1) + (n if n_is_logit else as_tensor(n, q.device).log())
    n = n[..., None] if n.dim() > 1 else n.reshape(-1, 1, 1)
    if n_is_logit:
        return n.to(q.dtype)
    return n.detach().to(torch.promote_types(n.dtype, q.dtype)).log().to(q.dtype)


BACKEND = Reference()
