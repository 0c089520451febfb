"""Helpers for tests of the choice: calls on a GPU by metadata alone, small calls on the CPU, and a tiny backend."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_n import AttentionCall, Backend
from attn_n.call import Options


def gpu_call(**changes: object) -> AttentionCall:
    shape, stride = (2, 8, 256, 64), (131072, 16384, 64, 1)
    fields = {
        "device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "q_shape": shape, "k_shape": shape,
        "v_shape": shape, "q_stride": stride, "k_stride": stride, "v_stride": stride, "needs_grad": True,
    }  # fmt: skip
    return AttentionCall(**{**fields, **changes})  # type: ignore[arg-type]


varlen: dict[str, object] = {"sequences": 2} | {
    f"{x}_{what}": value for x in "qkv" for what, value in (("shape", (500, 8, 64)), ("stride", (512, 64, 1)))
}


def inputs(length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, 2, length, 8) for _ in range(3))
    return q, k, v


class Eager(Backend):
    """A backend of plain attention by torch; `attn_n.sink` applies n."""

    name = "eager"
    honours = ("causal", "window", "softcap", "dropout", "mask", "alibi", "varlen", "lse gradient")

    def why_not(self, call: AttentionCall) -> str | None:
        return "only causal" if not call.causal else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logits = q @ k.mT * options.scale
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        return logits.softmax(-1) @ v, logits.logsumexp(-1), None


def boundaries(lengths: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
