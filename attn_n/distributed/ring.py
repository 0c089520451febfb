"""Ring attention: the keys and values of the ranks pass by the queries of each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from attn_n.autograd import passes
from attn_n.call import Options, Request, autocast, canonical
from attn_n.call.errors import UnsupportedError
from attn_n.dispatch.forced import forced
from attn_n.distributed import requests
from attn_n.distributed.blocks import Attention, Rows, Sum, of
from attn_n.distributed.exchange import Exchange, meet
from attn_n.distributed.groups import Ranks, ranks_of
from attn_n.distributed.layout import Span
from attn_n.distributed.schedule import Problem, keys_needed, parts
from attn_n.sink import rescale


def ring_attention_n(
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

    In step s a rank attends to the keys of the rank that is s before it, while those of the next step travel. Each part
    is computed at n = 0, the parts are merged by their lse, and n is applied once. Only keys that some query of a rank
    sees are sent to it, straight from their owner, and in the backward their gradients go straight back.

    All ranks of the group call it, and its backward, in the same order and with the same arguments, but for the tokens.

    Args:
        q: `(N, ..., Hq, L_r, E)`, the L_r tokens of this rank.
        k, v: `(N, ..., Hkv, L_r, E)` and `(N, ..., Hkv, L_r, Ev)`, of the same tokens, with `Hq % Hkv == 0`.
        sm_n: a tensor is the same one on all ranks. A rank's gradient of it is that of its own rows: the sum over the
            ranks is the gradient, as DistributedDataParallel and FSDP add up that of any parameter.
        sinks: so too, `(Hq,)`; or one a row, of the rows of this rank, `(N, ..., Hq, L_r)` with 1 for any size.
        group: the ranks that share the sequence: a process group, a DeviceMesh with one dimension, or None for all.
        total_length: the length of the whole sequence. None says that each rank holds as many tokens.

    The other arguments are those of `flash_attention_n`; `causal` and `window` are of positions in the whole sequence.

    Returns:
        `out` `(N, ..., Hq, L_r, Ev)` of these tokens; or `(out, lse)`.

    Raises:
        TypeError, ValueError, UnsupportedError: as `flash_attention_n`. UnsupportedError for `attn_mask`, `dropout_p`,
            `alibi_slopes`, `seqused_q`, `seqused_k` and `leftpad_k`.
        RuntimeError: from torch.distributed: there is no group, or another rank has died or has not come within the
            timeout of the group.

    The method is that of "Ring Attention with Blockwise Transformers" (H. Liu et al., 2023), and the order of tokens
    that of context parallelism in "The Llama 3 Herd of Models" (2024).
    """
    requests.no_others("ring_attention_n", unknown)
    requests.plain(q=q, k=k, v=v, sm_n=sm_n, sinks=sinks)
    requests.same_tokens(q, k, v, -2)
    request = Request(causal, sm_scale, sm_n, sinks, None, window, softcap, None, 0.0, return_lse, backend)
    ranks = ranks_of(group)
    call = canonical.batch(q, k, v, request)
    total = requests.total_of(q, -2, total_length, ranks)
    problem = Problem((0, total), False, ranks.size, *canonical.window(request))
    out, lse = _attend(call, call.q, call.k, call.v, call.n, request, problem, ranks)
    if q.dim() != 4:
        out, lse = out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])
    return (out, lse) if return_lse else out


def ring_attention_n_varlen(
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
    """`ring_attention_n` of packed sequences, of whose tokens each rank holds those that `shard(x, 0)` gives it.

    The whole pack is divided, wherever its sequences begin. The balance under a causal mask is that of one sequence; of
    many short ones no rank has more pairs than its tokens make, and little is sent.

    Args:
        q: `(T_r, Hq, E)`; k: `(T_r, Hkv, E)`; v: `(T_r, Hkv, Ev)`: the T_r tokens of this rank.
        cu_seqlens: `(N + 1,)`, int32, of all T tokens: sequence b holds those from `cu_seqlens[b]` on, before
            `cu_seqlens[b + 1]`. It is read on the host: on the CPU that is free, elsewhere it waits for the device.
        sinks: `(Hq,)`, or one a row of this rank: `(T_r, Hq)` with 1 for any size.

    The other arguments are those of `ring_attention_n`.

    Returns:
        `out` `(T_r, Hq, Ev)`; or `(out, lse)` with lse `(T_r, Hq)`.
    """
    requests.no_others("ring_attention_n_varlen", unknown)
    requests.plain(q=q, k=k, v=v, sm_n=sm_n, sinks=sinks)
    requests.same_tokens(q, k, v, 0)
    request = Request(causal, sm_scale, sm_n, sinks, None, window, softcap, None, 0.0, return_lse, backend)
    ranks = ranks_of(group)
    call = requests.varlen(q, k, v, request)
    starts = requests.boundaries(cu_seqlens, q, ranks)
    problem = Problem(starts, True, ranks.size, *canonical.window(request))
    out, lse = _attend(call, *requests.as_batch(call), request, problem, ranks)
    out, lse = out[0].transpose(0, 1), lse[0].T
    return (out, lse) if return_lse else out


class _Call(NamedTuple):
    """What the two passes need beside tensors. `n_is_logit` and `log_n` are those of a `PreparedCall`."""

    attention: Attention
    problem: Problem
    ranks: Ranks
    n_is_logit: bool
    log_n: float | None


def _attend(
    canonical_call: canonical.Canonical, q: Tensor, k: Tensor, v: Tensor, n: float | Tensor | None, request: Request,
    problem: Problem, ranks: Ranks,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out and lse of tensors `(B, H, L_r, E)`."""
    described, options = canonical_call.call, canonical_call.options
    if described.transform is not None:
        raise UnsupportedError(
            f"ring attention does not serve {described.transform}: it has an explicit backward alone"
        )
    attention = Attention(
        options.scale, options.softcap, forced(request.backend)[0], described.needs_grad, described.return_lse
    )
    log_n = math.log(n) if isinstance(n, float) else None
    call = _Call(attention, problem, ranks, canonical_call.n_is_logit, log_n)
    meet(ranks, q.device)
    with autocast.suspended(q.device.type):
        attended: tuple[Tensor, Tensor] = _Ring.apply(  # type: ignore[no-untyped-call]
            q, k, v, n if isinstance(n, Tensor) else None, call
        )
    return attended


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        rows = Rows(q, v.shape[-1])
        for source, (keys, values), offset in _passing_by(call, k, v):
            for part in parts(call.problem, call.ranks.rank, source):
                seen = part.keys.shifted(-offset)
                out, lse = call.attention.forward(part, of(q, part.rows), of(keys, seen), of(values, seen))
                rows.merge(part.rows, out, lse)
                del out, lse
        out, lse = rows.merged()
        del rows
        log_n = call.log_n if n is None else passes.log_of(q, n, call.n_is_logit)
        if log_n is not None and q.numel():
            lse = rescale.add_sink_(out, lse, log_n, varlen=False, lse_wanted=True)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, n)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse, n = ctx.saved_tensors
        call: _Call = ctx.call
        if dout is None:
            dout = torch.zeros_like(out)
        with autocast.suspended(q.device.type):
            dq, dk, dv = _gradients(call, dout, dlse, q, k, v, out, lse)
            dn = None
            if n is not None and ctx.needs_input_grad[3]:
                log_n = passes.log_of(q, n, True) if call.n_is_logit else None
                dn = passes.gradient_of_n(Options(call.attention.scale), dout, dlse, out, lse, n, log_n)
        return dq, dk, dv, dn, None


def _gradients(
    call: _Call, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    ranks, problem = call.ranks, call.problem
    of_sources = {source: parts(problem, ranks.rank, source) for source in range(ranks.size)}
    dq = Sum(q, sum(map(len, of_sources.values())))
    dk, dv = (Sum(x, len(of_sources[ranks.rank]) + ranks.size - 1) for x in (k, v))
    returning: Exchange | None = None
    returned = Span(0, 0)

    def add_returned() -> None:
        if returning is not None:
            for gradient, part in zip((dk, dv), returning.received(), strict=True):
                gradient.add(returned, part)

    for source, (keys, values), offset in _passing_by(call, k, v):
        own = source == ranks.rank
        dkeys, dvalues = (dk, dv) if own else (Sum(x, len(of_sources[source])) for x in (keys, values))
        for part in of_sources[source]:
            seen, rows = part.keys.shifted(-offset), part.rows
            found = call.attention.backward(
                part, of(dout, rows), None if dlse is None else of(dlse, rows), of(q, rows), of(keys, seen),
                of(values, seen), of(out, rows), of(lse, rows).contiguous(),
            )  # fmt: skip
            for gradient, span, x in zip((dq, dkeys, dvalues), (rows, seen, seen), found, strict=True):
                gradient.add(span, x)
            del found, x
        add_returned()
        if not own:
            # The gradients of these keys go back to their owner, and those of own keys come from who has had them.
            user = (2 * ranks.rank - source) % ranks.size
            returned = keys_needed(problem, user, ranks.rank)
            expected = [x.new_empty((*x.shape[:2], returned.length, x.shape[3])) for x in (k, v)]
            sent = [x.result().contiguous() for x in (dkeys, dvalues)]
            returning = Exchange(ranks, source, sent, user, expected)
    add_returned()
    return dq.result(), dk.result(), dv.result()


def _passing_by(call: _Call, k: Tensor, v: Tensor) -> Any:
    """Yield each rank, from this one on backwards, with the keys and values of it that this rank needs.

    With them comes the number of keys of that rank before these. Those of the next rank are under way meanwhile.
    """
    ranks, problem = call.ranks, call.problem
    held: Sequence[Tensor] = (k, v)
    offset = 0
    for step in range(ranks.size):
        source = (ranks.rank - step) % ranks.size
        under_way = None
        if step + 1 < ranks.size:
            user, after = (ranks.rank + step + 1) % ranks.size, (source - 1) % ranks.size
            sent = [of(x, keys_needed(problem, user, ranks.rank)).contiguous() for x in (k, v)]
            needed = keys_needed(problem, ranks.rank, after)
            expected = [x.new_empty((*x.shape[:2], needed.length, x.shape[3])) for x in (k, v)]
            under_way = Exchange(ranks, user, sent, after, expected)
        yield source, held, offset
        if under_way is not None:
            held, offset = under_way.received(), needed.start
