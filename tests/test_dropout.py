"""Dropout on the weights: with an identity for v, out shows which weights are dropped; the others are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_n import flash_attention_n
from tests.cases import INTERPRETED, why_not_usable
from tests.oracle import attention_n
from tests.places import on_gpu

PLACES = ["cpu", *on_gpu(("cuda",))]
BACKENDS = {
    "cpu": ["reference", *(["triton"] if INTERPRETED else [])],
    "cuda": ["reference", "sdpa:flash", "triton", *([] if why_not_usable("flash_attn:2") else ["flash_attn:2"])],
}
P, LENGTH = 0.4, 64


def inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (torch.randn(2, 3, LENGTH, LENGTH, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.eye(LENGTH, device=device, dtype=dtype).expand(2, 3, -1, -1).clone().requires_grad_()
    return q, k, v


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("n", [0.0, 8.0])
def test_dropout(device: str, n: float) -> None:
    for backend in BACKENDS[device]:
        half = backend != "reference"
        q, k, v = inputs(device, torch.float16 if half else torch.float32)
        tolerance = 3e-3 if half else 1e-5

        def attend() -> tuple[Tensor, Tensor]:
            torch.manual_seed(5)
            return flash_attention_n(q, k, v, sm_n=n, dropout_p=P, return_lse=True, backend=backend)  # noqa: B023

        out, lse = attend()
        keep = (out != 0).double() / (1 - P)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        expected, expected_lse = attention_n(*exact, n=n, keep=keep)
        assert abs((keep == 0).double().mean().item() - P) < 0.02
        assert torch.allclose(out.double(), expected, atol=tolerance)
        assert torch.allclose(lse.double(), expected_lse, atol=1e-3), "n and the denominator are not dropped"

        dout = torch.randn_like(out)
        gradients = torch.autograd.grad((out * dout).sum() + lse.sum(), (q, k, v))
        wanted = torch.autograd.grad((expected * dout.double()).sum() + expected_lse.sum(), exact)
        for got, want in zip(gradients, wanted, strict=True):
            assert torch.allclose(got.double(), want, atol=10 * tolerance)
        again, _ = attend()
        assert torch.equal(out, again), "the same seed drops the same weights"
        assert not torch.equal(out, flash_attention_n(q, k, v, sm_n=n, dropout_p=P, backend=backend))


def test_no_dropout_on_the_fused_cpu_kernel(ran: list[str]) -> None:
    q, k, v = inputs("cpu", torch.float32)
    flash_attention_n(q, k, v, sm_n=1.0, dropout_p=0.1)
    assert ran == ["attend reference"]
