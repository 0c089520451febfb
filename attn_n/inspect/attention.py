"""What the heads of an attention call do, row by row, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_n.backends.adapt import one_by_one
from attn_n.backends.adapt.dense_bias import dense_bias
from attn_n.cache.layout import Layout, gather
from attn_n.call import Options, autocast
from attn_n.call.canonical import Canonical
from attn_n.inspect.moments import wide
from attn_n.sink.weight import as_tensor

LOGITS = 1 << 22  # that are in memory at once, or those of one row of all heads


@dataclass(frozen=True)
class Heads:
    """What each head of a layer did, one number a head: means over the rows (queries) that see a key.

    Attributes:
        calls: how often the layer attended.
        rows: how many rows were counted.
        to_nothing: the weight that goes to no key, `n / (n + sum_j exp(s_ij))`.
        entropy: of the weights, that of nothing among them, in nats.
        first_token: the weight on the first key of the sequence: the first one that exists, or that a mask shows to any
            row.
    """

    calls: int
    rows: list[int]
    to_nothing: list[float]
    entropy: list[float]
    first_token: list[float]


class HeadSums:
    """Sums over the rows of all calls that were added. They stay on the device, and nothing waits for that."""

    def __init__(self) -> None:
        self._calls = 0
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, call: Canonical) -> None:
        self._calls += 1
        with autocast.suspended(call.q.device.type):
            for q, k, log_n, options in _batches(call):
                for found in _sums_of_parts(q, k, log_n, options):
                    self._sums = found if self._sums is None else self._sums + found

    def heads(self) -> Heads | None:
        """Return the means so far, None if no row saw a key. This waits for the device."""
        if self._sums is None or not self._sums[0].any():
            return None
        rows, *sums = self._sums.tolist()
        means = [[x / count if count else math.nan for x, count in zip(each, rows, strict=True)] for each in sums]
        return Heads(self._calls, [int(count) for count in rows], *means)


def _batches(call: Canonical) -> Iterator[tuple[Tensor, Tensor, Tensor, Options]]:
    """Yield q `(B, Hq, L, E)`, k `(B, Hkv, S, E)`, log n (`()`, `(Hq,)` or as `(B, Hq, L)`), and their options."""
    q, k, options = call.q.detach(), call.k.detach(), call.options
    log_n = _log_n(call)
    if options.varlen:
        for queries, keys, alone in one_by_one.each_sequence(options, q.shape[0], k.shape[0]):
            of_one = log_n
            if log_n.dim() == 2:  # (T or 1, Hq or 1)
                of_one = (log_n if log_n.shape[0] == 1 else log_n[queries]).t()[None]
            yield one_by_one.batch_of_one(q, queries), one_by_one.batch_of_one(k, keys), of_one, alone
        return
    if options.block_table is not None or options.cache_batch_idx is not None:
        layout = Layout(q.shape[0], k.shape[2], options.block_table, options.cache_batch_idx)
        k = gather(k, layout, options.seqused_k)
    if k.dtype != q.dtype:  # float8
        k = k.float() if options.k_descale is None else k.float() * options.k_descale[:, :, None, None]
    yield q, k, log_n, options


def _log_n(call: Canonical) -> Tensor:
    """Return log n in the dtype of the logits: `()`, `(Hq,)`, or one a row."""
    compute = torch.promote_types(call.q.dtype, torch.float32)
    if not isinstance(call.n, Tensor):
        return as_tensor(call.n or 0.0, call.q.device).log().to(compute)
    n = call.n.detach()
    return n.to(compute) if call.n_is_logit else n.to(torch.promote_types(n.dtype, compute)).log().to(compute)


def _sums_of_parts(q: Tensor, k: Tensor, log_n: Tensor, options: Options) -> Iterator[Tensor]:
    """Yield the sums `(4, Hq)` of rows, to_nothing, entropy and first_token, of as many rows as fit into memory."""
    batch, heads, len_q, _ = q.shape
    len_k = k.shape[2]
    if not (batch and heads and len_q and len_k):
        return
    first = _first_keys(options, batch, q.device)
    batches = max(1, LOGITS // (heads * len_q * len_k))
    rows = max(1, LOGITS // (min(batches, batch) * heads * len_k))
    for b in range(0, batch, batches):
        some = slice(b, b + batches)
        of_some = _of_batches(options, some)
        for begin in range(0, len_q, rows):
            span = (begin, min(begin + rows, len_q))
            of_rows = _rows(log_n, some, slice(*span))
            logits = _logits(q[some, :, slice(*span)], k[some], of_some, len_q, span)
            yield _sums(logits, of_rows, first[some] if first.shape[0] > 1 else first)


def _logits(q: Tensor, k: Tensor, options: Options, len_q: int, rows: tuple[int, int]) -> Tensor:
    """Return the logits `(B, Hq, rows, S)` of some rows, -inf where a key is hidden."""
    compute = torch.promote_types(q.dtype, torch.float32)
    of_groups = q.to(compute).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    logits: Tensor = (of_groups @ k.to(compute).mT * options.scale).view(*q.shape[:3], k.shape[2])
    if options.softcap is not None:
        logits = options.softcap * (logits / options.softcap).tanh()
    bias = dense_bias(options, len_q, k.shape[2], rows, (0, k.shape[2]), compute, q.device)
    # What does not exist may be NaN, which no number hides.
    return logits if bias is None else (logits + bias).masked_fill(bias == -math.inf, -math.inf)


def _sums(logits: Tensor, log_n: Tensor, first: Tensor) -> Tensor:
    """Return the sums `(4, Hq)` of logits `(B, Hq, rows, S)`; `first` is `(B or 1, Hq or 1)`, an index of keys."""
    log_n = log_n.to(logits.dtype).expand(logits.shape[:3])[..., None]
    row_max = torch.maximum(logits.amax(-1, keepdim=True), log_n)
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    sees = (logits > -math.inf).any(-1)
    weights, nothing = (logits - row_max).exp(), (log_n - row_max).exp()
    total = (weights.sum(-1, keepdim=True) + nothing).masked_fill(~sees[..., None], 1.0)
    weights, nothing = weights / total, (nothing / total)[..., 0]
    entropy = torch.special.entr(weights).sum(-1) + torch.special.entr(nothing)
    on_first = weights.gather(-1, first[:, :, None, None].expand(*logits.shape[:3], 1))[..., 0]
    of_rows = torch.stack([torch.ones_like(nothing), nothing, entropy, on_first]).to(wide(logits.device))
    return of_rows.masked_fill(~sees, 0.0).sum((1, 3))


def _first_keys(options: Options, batch: int, device: torch.device) -> Tensor:
    """Return the index of the first key of each sequence, `(B or 1, Hq or 1)`."""
    first = torch.zeros(1, 1, dtype=torch.long, device=device)
    if options.mask is not None:
        visible = options.mask if options.mask.dtype == torch.bool else options.mask > -math.inf
        first = visible.any(2).to(torch.uint8).argmax(-1)
    return first if options.leftpad_k is None else torch.maximum(first, options.leftpad_k.long()[:, None])


def _of_batches(options: Options, some: slice) -> Options:
    """Return the options of some of the batches."""
    names = "mask", "alibi_slopes", "seqused_q", "seqused_k", "leftpad_k"
    given = {name: getattr(options, name) for name in names}
    return options.replaced(**{k: x if x is None or x.shape[0] == 1 else x[some] for k, x in given.items()})


def _rows(log_n: Tensor, some: slice, rows: slice) -> Tensor:
    """Return log n of some batches and rows; it broadcasts to `(B, Hq, rows)`."""
    if log_n.dim() < 3:
        return log_n[:, None] if log_n.dim() else log_n
    log_n = log_n if log_n.shape[0] == 1 else log_n[some]
    return log_n if log_n.shape[2] == 1 else log_n[:, :, rows]
