"""Ulysses: ranks exchange tokens for heads, attend to the whole sequence with their heads, and exchange back."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from attn_n.call import Request, canonical
from attn_n.distributed import requests
from attn_n.distributed.all_to_all import Heads, to_heads, to_tokens
from attn_n.distributed.groups import Ranks, ranks_of
from attn_n.functional import flash_attention_n, flash_attention_n_varlen


def ulysses_attention_n(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    sm_n: float | Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    total_length: int | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attn_n.flash_attention_n` of a sequence of which each rank holds the tokens that `shard` gives it.

    An all-to-all gives each rank all tokens of `Hq / R` query heads, and of the KV heads that these need, so that it
    attends as a single GPU does; another one gives it all heads of its tokens back. With fewer KV heads than ranks,
    several ranks get the same one. The number of ranks R has to divide Hq.

    The arguments, the result, the gradients and the errors are those of `ring_attention_n`.

    The method is that of "DeepSpeed Ulysses" (S. A. Jacobs et al., 2023).
    """
    requests.no_others("ulysses_attention_n", unknown)
    requests.plain(q=q, k=k, v=v, sm_n=sm_n, sinks=sinks)
    requests.same_tokens(q, k, v, -2)
    request = Request(causal, sm_scale, sm_n, sinks, None, window, softcap, None, 0.0, return_lse, backend)
    ranks = ranks_of(group)
    call = canonical.batch(q, k, v, request)
    total = requests.total_of(q, -2, total_length, ranks)
    exchanged = _to_heads(call.q, call.k, call.v, call.n, call, total, ranks)
    found = flash_attention_n(*exchanged.qkv, causal, return_lse=return_lse, **exchanged.keywords(request))
    out, lse = found if isinstance(found, tuple) else (found, None)
    out = to_tokens(out, exchanged.heads, total, ranks)
    lse = None if lse is None else to_tokens(lse[..., None], exchanged.heads, total, ranks)[..., 0]
    if q.dim() != 4:
        out, lse = out.reshape(*q.shape[:-1], v.shape[-1]), None if lse is None else lse.reshape(q.shape[:-1])
    return out if lse is None else (out, lse)


def ulysses_attention_n_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    sm_n: float | Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ulysses_attention_n` of packed sequences, of whose tokens each rank holds those that `shard(x, 0)` gives it.

    The arguments, the result, the gradients and the errors are those of `ring_attention_n_varlen`.
    """
    requests.no_others("ulysses_attention_n_varlen", unknown)
    requests.plain(q=q, k=k, v=v, sm_n=sm_n, sinks=sinks)
    requests.same_tokens(q, k, v, 0)
    request = Request(causal, sm_scale, sm_n, sinks, None, window, softcap, None, 0.0, return_lse, backend)
    ranks = ranks_of(group)
    call = requests.varlen(q, k, v, request)
    starts = requests.boundaries(cu_seqlens, q, ranks)
    cu, longest = cu_seqlens.to(q.device), max((stop - start for start, stop in pairwise(starts)), default=0)
    exchanged = _to_heads(*requests.as_batch(call), call, starts[-1], ranks)
    packed_q, packed_k, packed_v = (x[0].transpose(0, 1) for x in exchanged.qkv)
    keywords = exchanged.keywords(request)
    if keywords["sinks"] is not None and keywords["sinks"].dim() > 1:
        keywords["sinks"] = keywords["sinks"][0].T
    found = flash_attention_n_varlen(
        packed_q, packed_k, packed_v, cu, cu, longest, longest, causal, return_lse=return_lse, **keywords
    )
    out, lse = found if isinstance(found, tuple) else (found, None)
    out = to_tokens(out.transpose(0, 1)[None], exchanged.heads, starts[-1], ranks)[0].transpose(0, 1)
    if lse is None:
        return out
    return out, to_tokens(lse.T[None, ..., None], exchanged.heads, starts[-1], ranks)[0, ..., 0].T


class _Exchanged(NamedTuple):
    """All tokens of this rank's heads, `(B, h, L, E)`, and n of these heads: see `canonical.Canonical`."""

    qkv: tuple[Tensor, Tensor, Tensor]
    n: float | Tensor | None
    n_is_logit: bool
    scale: float
    heads: Heads

    def keywords(self, request: Request) -> dict[str, Any]:
        return {
            "sm_scale": self.scale, "sm_n": None if self.n_is_logit else self.n,
            "sinks": self.n if self.n_is_logit else None, "window": request.window, "softcap": request.softcap,
            "backend": request.backend,
        }  # fmt: skip


def _to_heads(
    q: Tensor, k: Tensor, v: Tensor, n: float | Tensor | None, call: canonical.Canonical, total: int, ranks: Ranks
) -> _Exchanged:
    heads, heads_kv = q.shape[1], k.shape[1]
    if heads % ranks.size:
        raise ValueError(
            f"q: expected a number of heads that the {ranks.size} ranks divide, got {heads}: use ring_attention_n"
        )
    each, group = heads // ranks.size, heads // heads_kv
    shared = math.gcd(each, group)  # query heads that have one KV head, on every rank
    firsts = range(0, heads, each)
    of_q = Heads(tuple([tuple(range(first, first + each)) for first in firsts]), heads)
    of_kv = Heads(
        tuple([tuple([head // group for head in range(first, first + each, shared)]) for first in firsts]), heads_kv
    )
    if isinstance(n, Tensor) and n.dim() > 1:  # expanded: a rank with one token cannot tell 1 from all
        n = to_heads(n.expand(-1, *q.shape[1:3])[..., None], of_q, total, ranks)[..., 0]
    elif isinstance(n, Tensor) and n.dim() == 1:
        n = n[firsts[ranks.rank] : firsts[ranks.rank] + each]
    qkv = to_heads(q, of_q, total, ranks), to_heads(k, of_kv, total, ranks), to_heads(v, of_kv, total, ranks)
    return _Exchanged(qkv, n, call.n_is_logit, call.options.scale, of_q)
