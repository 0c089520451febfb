"""A contender: what it computes, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.workloads import PASSES, Inputs, Workload

# How n is given: "0" and "1" are numbers, "per head" is `sinks_of`, one learned logit for each head.
KINDS_OF_N = ("0", "1", "per head")


class Passes(NamedTuple):
    """Both passes of one workload, ready to run. `backward` takes what `forward` returned, any number of times."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, repr=False)
class Contender:
    """One line of a table.

    Attributes:
        name: what the tables call it.
        n: which of KINDS_OF_N it computes.
        prepare: makes its passes. What a user would do once, outside of the training step, is done here. `forward`
            returns what is shaped like `dout`, `backward` dq, dk and dv.
        why_not: the reason why it does not take part in a workload, such as a library that is not installed.
        measures: the passes that it has: a library built without a backward has "forward" alone.
        backend: which backend of attn_n serves the workload, with gradients or without.
        apart: it is measured in rounds of its own, because what it leaves behind in caches and heap slows the others.
    """

    name: str
    n: str
    prepare: Callable[[Inputs], Passes]
    why_not: Callable[[Workload], str | None] = lambda workload: None
    measures: tuple[str, ...] = PASSES
    backend: Callable[[Workload, bool], str | None] = lambda workload, gradients: None
    ours: bool = False
    apart: bool = False

    def __repr__(self) -> str:
        """Returns the name in characters that -k takes: `attn_n n=1` is `attn_n-n1`."""
        return self.name.replace(" ", "-").replace("=", "")

    def why_absent(self, workload: Workload, measure: str) -> str | None:
        """Returns the reason why it takes no part in a pass of a workload; None if it does."""
        return self.why_not(workload) or (None if measure in self.measures else f"has no {measure} pass")


# Takes q, k, v and n: None for n = 0, or the logits `(H,)` of the sinks, zeros for n = 1.
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def by_autograd(attend: Callable[[Inputs], Attend], n: str, token_first: bool = False) -> Callable[[Inputs], Passes]:
    """Makes `prepare` of a contender from `attend(inputs)`, the attention of one workload, by autograd.

    With `token_first` it takes and returns `(B, L, H, E)`, contiguous, as FlashAttention does.
    """

    def prepare(inputs: Inputs) -> Passes:
        turned = token_first and not inputs.workload.sequences
        q, k, v = inputs.q, inputs.k, inputs.v
        dout = inputs.dout
        if turned:
            q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))
            dout = dout.transpose(1, 2).contiguous()
        function = attend(inputs)
        sinks = None if n == "0" else sinks_of(inputs.workload, n)
        leaves = (q, k, v) if sinks is None or not sinks.requires_grad else (q, k, v, sinks)

        def forward() -> Tensor:
            return function(q, k, v, sinks)

        def backward(out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dq, dk, dv, *_ = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            return dq, dk, dv

        if not turned:
            return Passes(forward, backward)
        return Passes(
            lambda: forward().transpose(1, 2),
            lambda out: tuple(dx.transpose(1, 2) for dx in backward(out.transpose(1, 2))),  # type: ignore[arg-type, return-value]
        )

    return prepare


def sinks_of(workload: Workload, n: str) -> Tensor:
    """Returns the logits `(H,)` of the sinks in the dtype of the workload: zeros for n = 1, learned ones "per head"."""
    if n == "1":
        return torch.zeros(workload.heads, dtype=workload.dtype, device=workload.device)
    spread = torch.linspace(-1.0, 1.0, workload.heads, dtype=torch.float32, device=workload.device)
    return spread.to(workload.dtype).requires_grad_()


def too_large_for_quadratic(workload: Workload) -> str | None:
    """Returns the reason why an attention that materialises its logits does not take part, or None."""
    size = workload.batch * workload.heads * workload.length * workload.len_k * workload.dtype.itemsize
    limit = 6e8 if workload.device == "cpu" else 2.5e9
    return f"quadratic: each intermediate takes {size / 1e9:.1f} GB" if size > limit else None
