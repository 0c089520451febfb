"""Small problems, each of which shows some of the mistakes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """The arguments of an attention function, and the gradient of its result."""

    name: str
    q: Tensor  # (B, H, L, E)
    k: Tensor  # (B, H, S, E)
    v: Tensor
    sinks: Tensor  # (H,), float32
    dout: Tensor
    attn_mask: Tensor | None = None  # (B, 1, L, S), bool, True is attended to

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.sinks


def problems(dtype: torch.dtype, device: torch.device) -> list[Problem]:
    """Return them all. Sinks are numbers that bfloat16 holds, so that rounding them changes nothing."""
    return [
        _problem("few keys", (2, 5, 8), [-1.0, 0.5, 2.0, 3.0], dtype, device),
        # The lse is above 8, where bfloat16 has steps of 1/16, and differs from row to row.
        _problem("many keys", (1, 8, 2048), [9.5, 10.0, 11.0, 12.0], dtype, device, scale=1.4),
        _problem("one query of many keys", (2, 1, 2048), [8.0, 9.0, 10.0, 11.0], dtype, device),
        _problem("sinks far from the logits", (1, 5, 8), [100.0, -100.0, 40.0, -40.0], dtype, device),
        _problem("hidden rows", (2, 5, 8), [-1.0, 0.5, 2.0, 3.0], dtype, device, masked=True),
        _problem("hidden rows without sinks", (2, 5, 8), [-math.inf] * 4, dtype, device, masked=True),
    ]


def _problem(
    name: str, sizes: tuple[int, int, int], sinks: list[float], dtype: torch.dtype, device: torch.device,
    scale: float = 1.0, masked: bool = False,
) -> Problem:  # fmt: skip
    batch, len_q, len_k = sizes
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(batch, len(sinks), length, 64, generator=generator) for length in (len_q, len_k, len_k, len_q)
    )
    q = q * scale * torch.linspace(0.8, 1.2, batch * len_q).view(batch, 1, len_q, 1)
    # Values with a mean, so that out is no small rest of large terms; it gives the factor of a row.
    v, dout = v + 1, dout + 1
    mask = None
    if masked:
        mask = torch.rand(batch, 1, len_q, len_k, generator=generator) > 0.4
        mask[:, :, 1] = mask[0, :, 3] = False
        mask = mask.to(device)
    q, k, v, dout = (x.to(device, dtype) for x in (q, k, v, dout))
    return Problem(name, q, k, v, torch.tensor(sinks, device=device), dout, mask)
