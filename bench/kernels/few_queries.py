"""Measures few queries over many keys, by backend: python -m bench.kernels.few_queries OUT.json, on a GPU.

The order of backends for such calls (`attn_n.dispatch.order`) is made from this. 32 query heads, causal, bfloat16,
without gradients, device time with a cold L2. Each result is first compared with float64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_n import flash_attention_n
from attn_n.call.errors import UnsupportedError
from bench.contenders.library import one_line
from bench.kernels import lines
from bench.method import interleaved
from bench.method.clocks import CudaClock, Run
from tests.oracle import attention_n

HEADS, WIDTHS = 32, (64, 128)
BACKENDS = "triton:decode", "triton:hopper", "triton:portable", "flash_attn:3", "flash_attn:4", "sdpa:flash"
MOST_OFF = 0.02  # of the norm


class Shape(NamedTuple):
    batch: int
    heads_kv: int
    queries: int
    keys: int


SHAPES = tuple(
    Shape(*each)
    for each in (
        (1, 8, 1, 512), (32, 8, 1, 512), (32, 8, 1, 2048), (1, 32, 1, 4096), (64, 32, 1, 1024), (32, 8, 4, 2048),
        (32, 32, 4, 4096), (32, 1, 4, 16384), (1, 8, 16, 4096), (1, 8, 16, 65536), (8, 8, 16, 8192), (8, 32, 16, 8192),
        (32, 8, 16, 2048), (1, 1, 16, 16384), (1, 8, 64, 4096), (1, 8, 64, 65536), (8, 8, 64, 8192), (1, 32, 64, 8192),
        (8, 32, 64, 8192), (1, 1, 64, 16384),
    )
)  # fmt: skip


def exact(q: Tensor, k: Tensor, v: Tensor, n: float) -> Tensor:
    """Returns attention in float64, computed by KV heads."""
    parts = []
    for head, of_head in enumerate(q.chunk(k.shape[1], 1)):
        some = [x.double() for x in (of_head, k[:, head, None], v[:, head, None])]
        parts.append(attention_n(*some, n, causal=True)[0])
    return torch.cat(parts, 1)


def measure(width: int, shape: Shape, n: float, clock: CudaClock) -> dict[str, Any]:
    torch.manual_seed(0)
    q = torch.randn(shape.batch, HEADS, shape.queries, width, device="cuda", dtype=torch.bfloat16)
    k, v = (
        torch.randn(shape.batch, shape.heads_kv, shape.keys, width, device="cuda", dtype=torch.bfloat16) for _ in "kv"
    )
    runs, truth = dict[str, Run](), exact(q, k, v, n)
    line: dict[str, Any] = {"E": width, **shape._asdict(), "n": n, "not timed": {}}
    for name in BACKENDS:
        run = functools.partial(flash_attention_n, q, k, v, True, sm_n=n, backend=name)
        try:
            error = ((run().double() - truth).norm() / truth.norm()).item()
        except UnsupportedError as reason:
            line["not timed"][name] = one_line(reason)
            continue
        if error > MOST_OFF:
            line["not timed"][name] = f"wrong: off by {error:.2g}"
        else:
            runs[name] = run
    line["us"] = {name: round(1e6 * time, 1) for name, time in interleaved.medians(runs, clock).items()}
    return line


def measured(clock: CudaClock) -> Iterator[dict[str, Any]]:
    for width in WIDTHS:
        for shape in SHAPES:
            for n in (0.0, 1.0):
                yield measure(width, shape, n, clock)


if __name__ == "__main__":
    lines.main(__doc__, measured)
