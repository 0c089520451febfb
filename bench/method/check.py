"""Checks a contender against float64 before it is timed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bench.contenders.base import Passes, sinks_of
from bench.workloads import Inputs, Workload, make_inputs
from tests.compare import error, tolerance
from tests.oracle import attention_n

# Attention works head by head. Where float64 of all heads would take minutes or more memory than there is, the first
# and the last KV head of the first and the last batch are checked.
_ALL_HEADS_UP_TO = 1024
# Beyond this length the logits in float64 do not fit: some rows of out and dq are checked, and no dk and dv, which need
# all rows.
_ALL_ROWS_UP_TO = 16384
_SOME_ROWS = 512
# Several float64 tensors of so many logits fit a GPU. The query heads of a KV head are computed in turns of this size.
_LOGITS_AT_ONCE = 1 << 29

Results = Mapping[str, Tensor]


def what_is_wrong(passes: Passes, n: str, inputs: Inputs, backward: bool = True) -> str | None:
    """Says which results are further from float64 than FlashAttention's rule allows; None if all are right."""
    workload = inputs.workload
    exact, allowed = _reference(workload, n, backward)
    out = passes.forward()
    results = {"out": out.detach()}
    if backward:
        results |= dict(zip(("dq", "dk", "dv"), passes.backward(out), strict=True))
    wrong, like = [], {"out": inputs.dout, "dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
    for name, result in results.items():
        if result.shape != like[name].shape:
            wrong.append(f"{name} has shape {tuple(result.shape)}")
        elif name in exact:
            distance = error(_checked(result, name, workload), exact[name])
            if not distance <= allowed[name]:
                wrong.append(f"{name} by {distance:.1e}, allowed {allowed[name]:.1e}")
    return "; ".join(wrong) or None


@functools.lru_cache(maxsize=6)  # three kinds of n, with and without gradients
def _reference(workload: Workload, n: str, backward: bool) -> tuple[Results, Mapping[str, float]]:
    """Returns the results in float64, and how far from them each may be."""
    inputs = make_inputs(workload)
    exact, plain = (_plain_attention(inputs, n, dtype, backward) for dtype in (torch.float64, workload.dtype))
    return exact, {name: tolerance(name, exact[name], plain[name], workload.dtype) for name in exact}


class _Part(NamedTuple):
    """One piece of the check: indices into the tensors of queries and of keys, and the heads of the queries."""

    queries: tuple[slice | int, ...]
    keys: tuple[slice | int, ...]
    heads: slice


def _parts(workload: Workload) -> Iterator[_Part]:
    groups = workload.heads // workload.num_heads_kv
    starts = [0, *itertools.accumulate(workload.sequences)]
    few = workload.length * workload.len_k > _ALL_HEADS_UP_TO**2
    for head in _ends(workload.num_heads_kv) if few else range(workload.num_heads_kv):
        heads = slice(head * groups, (head + 1) * groups)
        if workload.sequences:
            for b in _ends(len(workload.sequences)):
                tokens = slice(starts[b], starts[b + 1])
                yield _Part((tokens, heads), (tokens, slice(head, head + 1)), heads)
            continue
        for b in _ends(workload.batch):
            for rows in _rows(workload):
                seen = slice(0, rows.stop + workload.len_k - workload.length if workload.causal else workload.len_k)
                yield _Part((b, heads, rows), (b, slice(head, head + 1), seen), heads)


def _ends(count: int) -> tuple[int, ...]:
    return (0,) if count == 1 else (0, count - 1)


def _rows(workload: Workload) -> tuple[slice, ...]:
    length = workload.length
    if length * workload.len_k <= _ALL_ROWS_UP_TO**2:
        return (slice(0, length),)
    some = min(_SOME_ROWS, length)
    return slice(0, some), slice(length - some, length)


def _all_rows(workload: Workload) -> bool:
    return len(_rows(workload)) == 1


def _checked(x: Tensor, name: str, workload: Workload) -> Tensor:
    """Concatenates the checked parts of a result."""
    parts = (part.keys if name in ("dk", "dv") else part.queries for part in _parts(workload))
    return torch.cat([x[part].flatten() for part in parts])


def _plain_attention(inputs: Inputs, n: str, dtype: torch.dtype, backward: bool) -> dict[str, Tensor]:
    workload, results = inputs.workload, dict[str, list[Tensor]]()
    sinks = None if n == "0" else sinks_of(workload, n).detach().to(torch.promote_types(dtype, torch.float32))
    window = None if workload.window is None else (workload.window, None)
    for part in _parts(workload):
        q, dout = (_one(x[part.queries], workload).detach().to(dtype) for x in (inputs.q, inputs.dout))
        k, v = (_one(x[part.keys], workload).detach().to(dtype) for x in (inputs.k, inputs.v))
        of_heads = None if sinks is None else sinks[part.heads]
        mask = None if inputs.mask is None else inputs.mask[part.queries[-1], part.keys[-1]]
        attend = functools.partial(attention_n, causal=workload.causal, mask=mask, window=window)
        found = _by_turns(attend, q, k, v, of_heads, dout if backward else None)
        for name, x in found.items():
            if _all_rows(workload) or name not in ("dk", "dv"):
                results.setdefault(name, []).append((x[0].transpose(0, 1) if workload.sequences else x[0]).flatten())
    return {name: torch.cat(parts) for name, parts in results.items()}


def _by_turns(
    attend: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    dout: Tensor | None,
) -> dict[str, Tensor]:
    """Returns out, and with dout also dq, dk and dv, computing as many query heads at a time as memory allows."""
    heads = max(1, _LOGITS_AT_ONCE // (q.shape[2] * k.shape[2]))
    k, v = (x.requires_grad_(dout is not None) for x in (k, v))
    outs, gradients = [], []
    for start in range(0, q.shape[1], heads):
        turn = slice(start, start + heads)
        some_q = q[:, turn].requires_grad_(dout is not None)
        out, _ = attend(some_q, k, v, sinks=None if sinks is None else sinks[turn])
        outs.append(out.detach())
        if dout is not None:
            gradients.append(torch.autograd.grad(out, (some_q, k, v), dout[:, turn]))
    if dout is None:
        return {"out": torch.cat(outs, 1)}
    dqs, dks, dvs = zip(*gradients, strict=True)
    return {"out": torch.cat(outs, 1), "dq": torch.cat(dqs, 1), "dk": sum(dks[1:], dks[0]), "dv": sum(dvs[1:], dvs[0])}


def _one(x: Tensor, workload: Workload) -> Tensor:
    """Shapes a part as a batch of one, (1, H, L, E)."""
    return (x.transpose(0, 1) if workload.sequences else x)[None]
