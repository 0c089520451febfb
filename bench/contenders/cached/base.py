"""Contenders that read a KV cache, without gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from bench.contenders.base import Contender, Passes
from bench.workloads import Inputs, Workload
from bench.workloads.decoding import MEASURES

# Makes the call that is timed, which returns `(B, Hq, L, E)`.
Decode = Callable[[Inputs], Callable[[], Tensor]]


def decoder(name: str, n: str, decode: Decode, why_not: Callable[[Workload], str | None]) -> Contender:
    return Contender(name, n, lambda inputs: Passes(decode(inputs), _no_backward), why_not, MEASURES)


def over_contiguous(contender: Contender) -> Contender:
    """Lets a contender that knows no cache decode from a contiguous one, whose keys are its keys."""

    def why_not(workload: Workload) -> str | None:
        return "contiguous caches alone" if workload.block else contender.why_not(workload)

    return dataclasses.replace(contender, why_not=why_not, measures=MEASURES)


def token_first(x: Tensor) -> Tensor:
    """Returns a tensor or a cache as it lies in memory: `(B, S, H, E)`, or `(blocks, block, H, E)`."""
    return x.transpose(1, 2)


def _no_backward(out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("decoding has no backward pass")
