"""Measures learned biases: python -m bench.kernels.bias_gradient OUT.json, on a GPU.

A bias is a float `attn_mask` with a gradient, one of each head `(1, H, L, S)` or of each batch `(N, 1, L, S)`. Ours are
beside FlexAttention with the bias in its `score_mod`, and PyTorch's memory-efficient kernel. First the gradient of the
bias is compared with float64; then forward and backward together are timed in turns, and their peak memory beyond the
inputs is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attn_n import flash_attention_n
from bench.kernels import lines
from bench.method import interleaved
from bench.method.clocks import CudaClock
from bench.method.memory import allocated
from tests.oracle import attention_n

LENGTH, WIDTH = 4096, 64
SHAPES = {"(1, H, L, S)": (2, 16, (1, 16)), "(N, 1, L, S)": (4, 8, (4, 1))}  # batch, heads, and those of the bias

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(n: float) -> Attend:
    return lambda q, k, v, bias: flash_attention_n(q, k, v, attn_mask=bias, sm_n=n, backend="triton:portable")


def efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[0], q.shape[1], -1, -1))


def flex() -> Attend:
    functorch_config.donated_buffer = False

    @torch.compile(dynamic=False, fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        of_heads = bias.shape[0] == 1

        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + (bias[0, h, i, j] if of_heads else bias[b, 0, i, j])

        out: Tensor = flex_attention.flex_attention(q, k, v, score_mod=add_bias)
        return out

    return attend


CONTENDERS: dict[str, tuple[float, Callable[[], Attend]]] = {
    "triton:portable n=0": (0.0, lambda: ours(0.0)),
    "triton:portable n=1": (1.0, lambda: ours(1.0)),
    "flex n=0": (0.0, flex),
    "torch sdpa efficient n=0": (0.0, lambda: efficient),
}


def exact_gradient(inputs: list[Tensor], dout: Tensor, n: float) -> Tensor:
    """Returns the gradient of the bias in float64, computed head by head."""
    q, k, v, bias = (x.detach() for x in inputs)
    found = torch.zeros(bias.shape, dtype=torch.float64, device=bias.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            at = min(b, bias.shape[0] - 1), min(h, bias.shape[1] - 1)
            of_head = bias[at].double().requires_grad_()
            one = [x[b : b + 1, h : h + 1].double() for x in (q, k, v, dout)]
            out, _ = attention_n(*one[:3], n, mask=of_head)
            found[at] += torch.autograd.grad(out, of_head, one[3])[0]
    return found


def measure(shape: str, clock: CudaClock) -> dict[str, Any]:
    batch, heads, of_bias = SHAPES[shape]

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    inputs = [normal(batch, heads, LENGTH, WIDTH) for _ in "qkv"] + [normal(*of_bias, LENGTH, LENGTH)]
    inputs, dout = [x.requires_grad_() for x in inputs], normal(batch, heads, LENGTH, WIDTH)
    runs, line = {}, {"bias": shape, "q": [batch, heads, LENGTH, WIDTH], "contenders": {}}
    exact = {n: exact_gradient(inputs, dout, n) for n in (0.0, 1.0)}
    for name, (n, make) in CONTENDERS.items():
        attend = make()

        def both(attend: Attend = attend) -> tuple[Tensor, ...]:
            return torch.autograd.grad(attend(*inputs), inputs, dout)

        try:
            off = float((both()[3].double() - exact[n]).norm() / exact[n].norm())
        except Exception as failure:  # of one contender; the others are timed all the same
            line["contenders"][name] = {"fails": str(failure).splitlines()[0][:200]}
            continue
        line["contenders"][name] = {"error of the bias": float(f"{off:.1e}"), "peak MB": round(allocated(both) / 1e6)}
        runs[name] = both
    del exact
    for name, seconds in interleaved.medians(runs, clock).items():
        line["contenders"][name]["ms"] = round(seconds * 1e3, 3)
    return line


def measured(clock: CudaClock) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    for shape in SHAPES:
        yield measure(shape, clock)


if __name__ == "__main__":
    lines.main(__doc__, measured, indent=1)
