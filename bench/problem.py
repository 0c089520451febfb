"""What is computed in a benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Self-attention of one shape: L = S = length, E = Ev = width."""

    length: int
    causal: bool = False
    batch: int = 1
    heads: int = 8
    width: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"L{self.length}-{'causal' if self.causal else 'full'}"


class Inputs(NamedTuple):
    """The tensors of a problem, all `(batch, heads, length, width)`; q, k and v require gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    causal: bool


def make_inputs(problem: Problem) -> Inputs:
    """Random normal tensors, the same for each call with the same problem.

    The means of q and k differ by so much that the logits lie around -log(length): all keys together weigh about as
    much as n = 1, and a contender that drops n is far off at any length and in any dtype.
    """
    generator = torch.Generator(problem.device).manual_seed(0)
    shape = problem.batch, problem.heads, problem.length, problem.width
    q, k, v, dout = (
        torch.randn(shape, generator=generator, dtype=problem.dtype, device=problem.device) for _ in range(4)
    )
    # In place: a copy would raise the resident peak that bench.memory starts from.
    mean = math.sqrt(math.log(problem.length) / math.sqrt(problem.width))
    q.add_(mean)
    k.sub_(mean)
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, problem.causal)
