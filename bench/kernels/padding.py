"""Measures what padding costs: python -m bench.kernels.padding OUT.json, on a GPU.

A training step, forward and backward, of a right-padded batch (`seqused_q` and `seqused_k`, lengths between L / 4 and
L) is timed in turns with the same sequences as varlen ones, and with a batch of full sequences, whose time is scaled by
the operations. First the padded results are compared with float64, and have to be zero where no rows exist.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attn_n import flash_attention_n, flash_attention_n_varlen
from bench.kernels import lines
from bench.method import interleaved
from bench.method.clocks import CudaClock, Run
from bench.workloads import Workload, make_inputs
from tests.oracle import attention_n

BATCH, HEADS, LENGTH = 8, 16, 4096
WIDTHS = 64, 128
BACKENDS = "triton:hopper", "triton:portable"
NAMES = "out", "dq", "dk", "dv"


def lengths() -> list[int]:
    pick = random.Random(0)
    return [pick.randint(LENGTH // 4, LENGTH) for _ in range(BATCH)]


def of_sequences(tensors: list[Tensor], used: list[int]) -> list[Tensor]:
    """Returns the rows in use, one sequence behind the other: `(T, H, E)` for `(B, H, L, E)`."""
    return [torch.cat([x[b, :, :end].transpose(0, 1) for b, end in enumerate(used)]) for x in tensors]


def errors(results: list[Tensor], tensors: list[Tensor], used: list[int]) -> dict[str, float]:
    """Returns the errors of out, dq, dk and dv relative to float64, computed head by head, in the rows in use."""
    sums = torch.zeros(4, 2, dtype=torch.float64, device="cuda")
    for b, end in enumerate(used):
        if any(bool(x[b, :, end:].any()) for x in results):  # NaN counts as well
            raise RuntimeError(f"rows beyond {end} of batch {b} are not zero")
        for h in range(HEADS):
            q, k, v, dout = (x.detach()[b : b + 1, h : h + 1, :end].double() for x in tensors)
            inputs = [x.requires_grad_() for x in (q, k, v)]
            out, _ = attention_n(*inputs, 1.0, causal=True)
            exact = (out.detach(), *torch.autograd.grad(out, inputs, dout))
            for i, (found, truth) in enumerate(zip(results, exact, strict=True)):
                off = found[b : b + 1, h : h + 1, :end].double() - truth
                sums[i] += torch.stack([off.square().sum(), truth.square().sum()])
    return {name: float(f"{(off / of).sqrt():.1e}") for name, (off, of) in zip(NAMES, sums, strict=True)}


def measure(width: int, backend: str, clock: CudaClock) -> dict[str, Any]:
    used = lengths()
    workload = Workload(LENGTH, True, BATCH, HEADS, width, dtype=torch.bfloat16, device="cuda")
    of_used = Workload(sum(used), True, 1, HEADS, width, sequences=tuple(used), dtype=torch.bfloat16, device="cuda")
    dense = list(make_inputs(workload)[:4])
    packed = [x.detach().requires_grad_() for x in of_sequences(dense, used)]
    in_use = torch.tensor(used, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, *used], device="cuda").cumsum(0).to(torch.int32)

    def padded() -> list[Tensor]:
        q, k, v, dout = dense
        out = flash_attention_n(q, k, v, True, sm_n=1.0, seqused_q=in_use, seqused_k=in_use, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    def varlen() -> object:
        q, k, v, dout = packed
        longest = max(used)
        out = flash_attention_n_varlen(q, k, v, starts, starts, longest, longest, True, sm_n=1.0, backend=backend)
        return torch.autograd.grad(out, (q, k, v), dout)

    def full() -> object:
        q, k, v, dout = dense
        return torch.autograd.grad(flash_attention_n(q, k, v, True, sm_n=1.0, backend=backend), (q, k, v), dout)

    line: dict[str, Any] = {"E": width, "backend": backend, "error": errors(padded(), dense, used)}
    runs: dict[str, Run] = {"padded": padded, "varlen": varlen, "full": full}
    seconds = interleaved.medians(runs, clock)
    seconds["full, scaled"] = seconds["full"] * of_used.flops("both") / workload.flops("both")
    line["ms"] = {name: round(1e3 * time, 3) for name, time in seconds.items()}
    line["speed over"] = {name: round(seconds[name] / seconds["padded"], 3) for name in ("varlen", "full, scaled")}
    return line


def measured(clock: CudaClock) -> Iterator[dict[str, Any]]:
    for width in WIDTHS:
        for backend in BACKENDS:
            yield measure(width, backend, clock)


if __name__ == "__main__":
    lines.main(__doc__, measured, lengths=lengths())
