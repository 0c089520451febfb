"""Every backend is compared with float64 on every case, in every dtype."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

import attn_n
from tests import compare
from tests.cases import CASES, DTYPES, Case, make, must_serve, why_not_usable
from tests.places import on_gpu

# With logits around 46 a half-precision baseline has no digits left, and its error would allow anything.
COMBINATIONS = [
    pytest.param(dtype, case, id=f"{str(dtype).removeprefix('torch.')}-{case}")
    for dtype in DTYPES
    for case in CASES
    if abs(case.shift) < 40 or dtype in (torch.float64, torch.float32)
]
REPRESENTATIVES = ("causal", "GQA", "float mask", "varlen, causal, n=0")
PLACES = [
    pytest.param("cpu", "reference"),
    pytest.param("cpu", "sdpa:cpu"),
    pytest.param("cpu", "triton:portable"),
    *on_gpu(
        *(
            ("cuda", name)
            for name in (
                "reference", "sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "triton:portable", "triton:hopper",
                "flash_attn:2", "flash_attn:3", "flash_attn:4", "xformers:flash", "xformers:cutlass",
            )
        )
    ),
]  # fmt: skip


def _calls() -> Iterator[object]:
    for lse_grad, place, one in itertools.product((True, False), PLACES, COMBINATIONS):
        # A missing gradient of lse is one branch of our kernels, float32 in any dtype: under the slow interpreter
        # bfloat16 covers it.
        if lse_grad or place.values != ("cpu", "triton:portable") or one.values[0] in (torch.bfloat16, torch.float64):
            name = f"{'lse' if lse_grad else 'no lse'}-{'-'.join(place.values)}-{one.id}"
            again = [pytest.mark.slow] if _interpreted_again(lse_grad, *place.values, *one.values) else []
            yield pytest.param(lse_grad, *place.values, *one.values, id=name, marks=[*place.marks, *again])


def _interpreted_again(lse_grad: bool, device: str, backend: str, dtype: torch.dtype, case: Case) -> bool:
    """Return True for what others represent: float16 runs the code of bfloat16, and a missing dlse is one branch.

    Of bfloat16 and float32 every second case has the one, and its neighbours the other.
    """
    if (device, backend) != ("cpu", "triton:portable") or dtype == torch.float64 or case.name in REPRESENTATIVES:
        return False
    in_float32 = abs(case.shift) >= 40 or CASES.index(case) % 2 == 0
    return not lse_grad or dtype != (torch.float32 if in_float32 else torch.bfloat16)


@pytest.mark.parametrize(("lse_grad", "device", "backend", "dtype", "case"), list(_calls()))
def test_against_float64(
    lse_grad: bool, device: str, backend: str, dtype: torch.dtype, case: Case, ran: list[str]
) -> None:
    if why_not_usable(backend):
        pytest.skip(f"{backend}: {why_not_usable(backend)}")
    inputs = make(case, dtype, device)
    if not must_serve(backend, device, dtype, case, lse_grad):
        with pytest.raises(attn_n.UnsupportedError, match=backend):
            compare.library(inputs, backend, lse_grad)
        assert ran == []
        return
    got = compare.library(inputs, backend, lse_grad)
    assert set(ran) == (
        {f"attend {backend}"} if backend == "reference" else {f"forward {backend}", f"backward {backend}"}
    )
    excess = compare.excess(inputs, got, lse_grad)
    assert max(excess.values()) <= 1, {name: f"{value:.2f} x the allowed error" for name, value in excess.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "case"), COMBINATIONS)
def test_the_forward_alone(dtype: torch.dtype, case: Case, ran: list[str]) -> None:
    """The forward alone is right too: most builds of FlashAttention 3 have no backward."""
    backend = "flash_attn:3"
    if why_not_usable(backend):
        pytest.skip(f"{backend}: {why_not_usable(backend)}")
    inputs = make(case, dtype, "cuda")
    if not must_serve(backend, "cuda", dtype, case, lse_grad=True, grad=False):
        with pytest.raises(attn_n.UnsupportedError, match=backend):
            compare.forward_of_library(inputs, backend)
        return
    got = compare.forward_of_library(inputs, backend)
    assert ran == [f"forward {backend}"]
    excess = compare.excess(inputs, got)
    assert max(excess.values()) <= 1, {name: f"{value:.2f} x the allowed error" for name, value in excess.items()}


@pytest.mark.parametrize(("dtype", "case"), [one for one in COMBINATIONS if one.values[1].n != 0.0])
def test_the_cases_see_n(dtype: torch.dtype, case: Case) -> None:
    """A library that ignores n exceeds the tolerance by far, in out and in lse."""
    inputs = make(case, dtype, "cpu")
    ignored, exact = (compare.oracle(inputs, torch.float64, ignore_n=ignore) for ignore in (True, False))
    plain, plain_wide = compare.oracle(inputs, dtype), compare.oracle(inputs, torch.float32)
    for name, computed in (("out", plain), ("lse", plain_wide)):
        allowed = compare.tolerance(name, exact[name], computed[name], dtype)
        assert compare.error(ignored[name], exact[name]) > 2 * allowed, name
