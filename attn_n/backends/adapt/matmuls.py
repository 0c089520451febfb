"""Attention of a block of queries by matmuls, for logits that no kernel of a library computes: those with a softcap.

The block has all keys that its queries see, and its logits are in memory. All is computed in the dtype of lse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_n.call import Gradients, Saved


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Return out and lse of q `(B, Hq, rows, E)`, k `(B, Hkv, keys, E)` and v; a row without keys has 0 and -inf."""
    logits, _ = _logits(q, k, bias, scale, softcap)
    weights, lse = _softmax(logits)
    return _of_heads(weights @ v.to(weights.dtype), q).to(q.dtype), _of_heads(lse, q).squeeze(-1)


def backward(dout: Tensor, saved: Saved, bias: Tensor | None, scale: float, softcap: float) -> Gradients:
    """Return dq, and dk and dv of each KV head, given out and lse with n inside; lse is inf for rows without keys."""
    q, k, v, out, lse, *_ = saved
    logits, tanh = _logits(q, k, bias, scale, softcap)
    weights, own_lse = _softmax(logits)
    dout_rows, out_rows, lse_rows = (_of_kv_heads(x.to(lse.dtype), k) for x in (dout, out, lse[..., None]))
    # The share of the keys in the denominator, the rest of which is n. Not exp(logits - lse): a float32 lse that is
    # large, as in a row masked by finite numbers, has lost the logarithm of the sum.
    weights *= (own_lse - lse_rows).clamp(max=0.0).exp_()
    delta = (dout_rows * out_rows).sum(-1, keepdim=True)
    dv = weights.mT @ dout_rows
    ds = (dout_rows @ v.to(weights.dtype).mT).sub_(delta).mul_(weights)
    ds *= (1 - tanh.square()).mul_(scale)
    dq = ds @ k.to(ds.dtype)
    dk = ds.mT @ _of_kv_heads(q.to(ds.dtype), k)
    return Gradients(_of_heads(dq, q), dk, dv)


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Return the logits `(B, Hkv, heads of the group * rows, keys)`, and the tanh in them."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    tanh = (_of_kv_heads(q.to(dtype), k) @ k.to(dtype).mT).mul_(scale / softcap).tanh_()
    logits = tanh * softcap
    if bias is not None:
        logits = logits + _of_kv_heads(bias.expand(q.shape[0], q.shape[1], q.shape[2], -1), k)
    return logits, tanh


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights and lse `(..., 1)`."""
    row_max = logits.amax(-1, keepdim=True)
    hidden = row_max == -math.inf
    weights = logits.sub_(row_max.masked_fill(hidden, 0.0)).exp_()
    row_sum = weights.sum(-1, keepdim=True)
    return weights.div_(row_sum.masked_fill(hidden, 1.0)), row_max + row_sum.log()


def _of_kv_heads(x: Tensor, k: Tensor) -> Tensor:
    """Reshape `(B, Hq, rows, ...)` to `(B, Hkv, heads of the group * rows, ...)`."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[-1])


def _of_heads(x: Tensor, q: Tensor) -> Tensor:
    return x.reshape(*q.shape[:3], x.shape[-1])
