"""Whether a contender is right, which is asked before it is timed."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from bench.contenders import Contender
from bench.problem import Inputs, Problem, make_inputs
from tests.compare import error, tolerance
from tests.oracle import attention_n

# Attention works head by head: where the float64 of all heads would take minutes, the first and the last one stand
# for the others.
_ALL_HEADS_UP_TO = 1024
_RESULTS = ("out", "dq", "dk", "dv")


def what_is_wrong(contender: Contender, inputs: Inputs, problem: Problem) -> str | None:
    """How far from float64 the results are, if further than FlashAttention's rule allows; None if all are right."""
    exact, allowed = _reference(problem, contender.n)
    try:
        passes = contender.prepare(inputs, contender.n)
        out = passes.forward()
        results = out, *passes.backward(out)
    except Exception as failure:  # of one contender; the others are timed all the same
        return f"{contender.name} fails at {problem}: {type(failure).__name__}: {failure}"
    wrong = []
    for name, result in zip(_RESULTS, results, strict=True):
        if result.shape != inputs.q.shape:
            wrong.append(f"{name} has shape {tuple(result.shape)}")
            continue
        distance = error(_checked_heads(result.detach(), problem), exact[name])
        if distance > allowed[name]:
            wrong.append(f"{name} by {distance:.1e}, allowed {allowed[name]:.1e}")
    return f"{contender.name} is wrong at {problem}: {'; '.join(wrong)}" if wrong else None


@functools.lru_cache(maxsize=2)
def _reference(problem: Problem, n: float) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
    """The results in float64, and how far from them each may be."""
    q, k, v, dout, causal = make_inputs(problem)
    tensors = [_checked_heads(x.detach(), problem) for x in (q, k, v, dout)]
    exact, plain = (_by_head(tensors, causal, n, dtype) for dtype in (torch.float64, problem.dtype))
    return exact, {name: tolerance(name, exact[name], plain[name], problem.dtype) for name in _RESULTS}


def _checked_heads(x: Tensor, problem: Problem) -> Tensor:
    return x if problem.length <= _ALL_HEADS_UP_TO else x[:, :: max(1, problem.heads - 1)]


def _by_head(tensors: list[Tensor], causal: bool, n: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Plain attention and its gradients, a head at a time for the sake of memory."""
    heads = []
    for head in range(tensors[0].shape[1]):
        *leaves, dout = (x[:, head : head + 1].to(dtype) for x in tensors)
        q, k, v = (x.requires_grad_() for x in leaves)
        out, _ = attention_n(q, k, v, n, causal=causal)
        heads.append((out.detach(), *torch.autograd.grad(out, (q, k, v), dout)))
    return {name: torch.cat(parts, 1) for name, parts in zip(_RESULTS, zip(*heads, strict=True), strict=True)}
