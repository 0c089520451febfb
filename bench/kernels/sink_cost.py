"""Measures what n costs behind the kernels of other libraries: python -m bench.kernels.sink_cost OUT.json, on a GPU.

First it times the sink's own kernels: the rescaling of `out` and the gradient of n, each over a device copy of `out`.
Then it times whole calls at S = 8192, E = 128: each backend that does not apply n itself, with n = 1 over n = 0,
forward and backward at logits where n weighs as much as all keys, and forward at normal logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from attn_n import UnsupportedError, flash_attention_n
from attn_n.backends import registry
from attn_n.backends.base import Family
from attn_n.sink import fused
from bench.kernels import lines
from bench.method import interleaved
from bench.method.clocks import CudaClock, Run
from bench.workloads import Inputs, Workload, make_inputs

TOKENS, HIDDEN, LENGTH = 16384, 2048, 8192


def measured(clock: CudaClock) -> Iterator[dict[str, Any]]:
    yield from _alone(clock)
    yield from _behind_kernels(clock)


def _alone(clock: CudaClock) -> Iterator[dict[str, Any]]:
    for width in (64, 128, 256):
        for layout in ("heads first", "tokens first", "packed"):
            yield _one_layout(width, layout, clock)


def _one_layout(width: int, layout: str, clock: CudaClock) -> dict[str, Any]:
    heads, batch = HIDDEN // width, TOKENS // LENGTH
    shape = (TOKENS, heads) if layout == "packed" else (batch, heads, LENGTH)
    packed = layout == "packed"
    # The libraries lay the lse out heads first, for packed sequences too.
    lse = torch.randn(heads, TOKENS, device="cuda").T if packed else torch.randn(shape, device="cuda")

    def like_out() -> torch.Tensor:
        x = torch.randn(*shape, width, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "tokens first" else x

    out, dout = like_out(), like_out()
    copy, per_head = torch.empty_like(out), torch.zeros(heads, device="cuda")
    runs: dict[str, Run] = {
        "copy": lambda: copy.copy_(out),
        "rescaling, n = 1": lambda: fused.add_sink_(out, lse, 0.0),
        "rescaling, n per head": lambda: fused.add_sink_(out, lse, per_head),
        "gradient of n": lambda: fused.gradient_of_n(dout, None, out, lse, per_head),
    }
    seconds = interleaved.medians(runs, clock)
    ratios = {name: round(seconds[name] / seconds["copy"], 3) for name in runs if name != "copy"}
    return {"E": width, "out": layout, "copy, us": round(seconds["copy"] * 1e6, 1), "over the copy": ratios}


def _behind_kernels(clock: CudaClock) -> Iterator[dict[str, Any]]:
    for causal in (False, True):
        workload = Workload(
            LENGTH, causal, TOKENS // LENGTH, HIDDEN // 128, 128, dtype=torch.bfloat16, device="cuda"
        )  # fmt: skip
        inputs = make_inputs(workload)
        normal = inputs._replace(q=torch.randn_like(inputs.q), k=torch.randn_like(inputs.k))
        for measure, passes, of, logits in (
            ("forward", _forward, inputs, "around -log(S)"),
            ("backward", _backward, inputs, "around -log(S)"),
            ("forward", _forward, normal, "normal"),
        ):
            runs = {(name, n): passes(name, n, of) for name in _kernels() for n in (0.0, 1.0)}
            seconds = interleaved.medians({each: run for each, run in runs.items() if run is not None}, clock)
            for name in dict.fromkeys(name for name, _ in seconds):
                plain, with_n = seconds[name, 0.0], seconds[name, 1.0]
                cost = f"{100 * (with_n / plain - 1):.1f} %"
                yield {
                    "backend": name, "workload": str(workload), "pass": measure, "logits": logits,
                    "n = 0, ms": round(plain * 1e3, 3), "n = 1 costs": cost,
                }  # fmt: skip


def _kernels() -> Iterator[str]:
    """Yields the kernels of other libraries, behind which the sink's own kernels apply n."""
    for name in registry.names():
        backend, _ = registry.find(name)
        if isinstance(backend, Family) and not backend.applies_n:
            yield from (f"{name}:{member}" for member in backend.members if member != "cpu")


def _forward(backend: str, n: float, inputs: Inputs) -> Run | None:
    def run() -> object:
        with torch.no_grad():
            return flash_attention_n(inputs.q, inputs.k, inputs.v, inputs.workload.causal, sm_n=n, backend=backend)

    return run if _serves(run) else None


def _backward(backend: str, n: float, inputs: Inputs) -> Run | None:
    def run() -> object:
        return torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout, retain_graph=True)

    out: Any = None

    def forward() -> None:
        nonlocal out
        out = flash_attention_n(inputs.q, inputs.k, inputs.v, inputs.workload.causal, sm_n=n, backend=backend)

    return run if _serves(forward) else None


def _serves(run: Run) -> bool:
    try:
        run()
    except UnsupportedError:
        return False
    return True


if __name__ == "__main__":
    lines.main(__doc__, measured)
