"""Who takes part in a benchmark, and how each of them is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import attn_n
from bench.problem import Inputs, Problem


class Passes(NamedTuple):
    """Both directions of one problem, ready to run; `backward` takes what `forward` returned, any number of times."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, repr=False)
class Contender:
    """One line of a table.

    Attributes:
        name: what the tables call it.
        n: the n of the softmax_n that it computes.
        prepare: makes its passes for inputs and n. What a user would do once, outside of the training step, is done
            here. `forward` returns `(batch, heads, length, width)`, `backward` dq, dk and dv.
        why_not: the reason why it does not take part in a problem, such as a library that is not installed.
        details: what to note beside its times.
        apart: it is measured in rounds of its own, because what it leaves behind in caches and heap slows the others.
    """

    name: str
    n: float
    prepare: Callable[[Inputs, float], Passes]
    why_not: Callable[[Problem], str | None] = lambda problem: None
    details: Callable[[Inputs, float], dict[str, str]] = lambda inputs, n: {}
    apart: bool = False

    def __repr__(self) -> str:
        return self.name


def by_autograd(attend: Callable[[Tensor, Tensor, Tensor, bool, float], Tensor]) -> Callable[[Inputs, float], Passes]:
    """`prepare` of a contender that is a differentiable function of q, k, v, causal and n."""

    def prepare(inputs: Inputs, n: float) -> Passes:
        q, k, v, dout, causal = inputs

        def backward(out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            return dq, dk, dv

        return Passes(lambda: attend(q, k, v, causal, n), backward)

    return prepare


def _attn_n(q: Tensor, k: Tensor, v: Tensor, causal: bool, n: float) -> Tensor:
    out = attn_n.flash_attention_n(q, k, v, causal, sm_n=n)
    assert isinstance(out, Tensor)
    return out


def _served_by(inputs: Inputs, n: float) -> dict[str, str]:
    explanation = attn_n.explain(inputs.q, inputs.k, inputs.v, inputs.causal, sm_n=n)
    return {"backend": str(explanation.chosen), "asked by": explanation.asked_by}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, n: float) -> Tensor:
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, n: float) -> Tensor:
    """The definition, one torch operation after the other."""
    logits = (q / q.shape[-1] ** 0.5) @ k.mT
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    top = logits.detach().amax(-1, keepdim=True)
    weights = (logits - top).exp()
    return (weights / (n * (-top).exp() + weights.sum(-1, keepdim=True))) @ v


def _too_large_for_eager(problem: Problem) -> str | None:
    if problem.length <= 4096:
        return None
    size = problem.batch * problem.heads * problem.length**2 * problem.dtype.itemsize
    return f"quadratic: at length {problem.length} each intermediate takes {size / 1e9:.1f} GB"


ATTN_N_PLAIN = Contender("attn_n n=0", 0.0, by_autograd(_attn_n), details=_served_by)
ATTN_N = Contender("attn_n n=1", 1.0, by_autograd(_attn_n), details=_served_by)
SDPA = Contender("torch sdpa n=0", 0.0, by_autograd(_sdpa))
EAGER = Contender("eager softmax_n n=1", 1.0, by_autograd(_eager), _too_large_for_eager, apart=True)

CPU = (ATTN_N_PLAIN, ATTN_N, SDPA, EAGER)
