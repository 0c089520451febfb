"""The kernels for Hopper: the table of cases at their widths, odd shapes, random ones, and the same bits each time."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

pytest.importorskip("triton")

import attn_n
from attn_n import flash_attention_n
from attn_n.backends.triton.hopper import HopperKernels
from tests import compare
from tests.cases import CASES, HOPPER, Case, make, must_serve
from tests.test_registry import gpu_call

WIDTHS = (64, 128, 256)
HALF = (torch.bfloat16, torch.float16)

on_hopper = pytest.mark.skipif(not HOPPER, reason="no GPU of compute capability 9.0")


def at_width(case: Case, width: int) -> Case:
    return dataclasses.replace(case, size=width, size_v=width)


SERVED = [
    case
    for case in CASES
    if not case.features & {"mask", "alibi", "packed"} and case.layout != "transposed" and abs(case.shift) < 40
]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_cases(case: Case, width: int, dtype: torch.dtype, ran: list[str]) -> None:
    case = at_width(case, width)
    assert must_serve("triton:hopper", "cuda", dtype, case, lse_grad=True)
    inputs = make(case, dtype, "cuda")
    excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
    assert max(excess.values()) <= 1, excess
    assert set(ran) == {"forward triton:hopper", "backward triton:hopper"}


# Around tiles of 128 and 192 queries and of 64 and 128 keys; longer than what one round of all programs does.
LENGTHS = [(1, 1), (63, 65), (128, 128), (129, 127), (192, 384), (193, 1000), (1000, 193), (777, 4500), (4500, 4400)]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("len_q", "len_k"), LENGTHS)
def test_lengths(len_q: int, len_k: int, width: int) -> None:
    case = Case("", batch=2, heads_q=4, heads_kv=2, len_q=len_q, len_k=len_k, size=width, size_v=width, n="per head")
    window = {"window": (len_k // 3, 40)}
    for changes in ({}, {"causal": True}, window, {"layout": "tokens first", "causal": True, "softcap": 3.0}):
        inputs = make(dataclasses.replace(case, **changes), torch.bfloat16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (changes, excess)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    """A thousand in all are `for seed in range(100)`; each seed is ten."""
    pick = random.Random(seed)
    for _ in range(10):
        heads_kv, len_q, len_k = pick.randint(1, 3), pick.randint(1, 700), pick.randint(1, 700)
        window = pick.choice(
            [None, (pick.randint(0, 300), pick.randint(0, 300)), (None, 9), (pick.randint(0, 90), None)]
        )
        width = pick.choice(WIDTHS)
        case = Case(
            "", batch=pick.randint(1, 3), heads_q=heads_kv * pick.choice([1, 2, 5]), heads_kv=heads_kv, len_q=len_q,
            len_k=len_k, size=width, size_v=width, causal=pick.random() < 0.4, window=window,
            softcap=pick.choice([None, None, 5.0]), n=pick.choice([0.0, 1.0, 3.7, "per head"]),
            layout=pick.choice(["heads first", "tokens first", "expanded"]),
        )  # fmt: skip
        inputs = make(case, pick.choice(HALF), "cuda", seed)
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (case, excess)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_a_hundred_times(width: int, causal: bool) -> None:
    q, k, v = (torch.randn(2, 4, 1500, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    outs = [flash_attention_n(q, k, v, causal, sm_n=1.0, return_lse=True, backend="triton:hopper") for _ in range(100)]
    assert all(torch.equal(a, b) for found in outs[1:] for a, b in zip(found, outs[0], strict=True))


@pytest.mark.gpu
@on_hopper
def test_what_tma_cannot_address(ran: list[str]) -> None:
    """An odd beginning is served by the portable kernels, odd strides are refused."""
    flat = torch.randn(1 + 2 * 64 * 64, device="cuda", dtype=torch.bfloat16)
    k = v = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    odd, even = (flat[first:][: 2 * 64 * 64].view(1, 2, 64, 64) for first in (1, 0))
    outs = [
        flash_attention_n(q, k, v, sm_n=1.0, backend=f"triton:{member}")
        for q in (odd, even) for member in ("hopper", "portable")
    ]  # fmt: skip
    assert torch.equal(outs[0], outs[1])
    assert torch.allclose(outs[2], outs[3], atol=1e-2)
    assert ran == ["forward triton:hopper", "forward triton:portable"] * 2
    with pytest.raises(attn_n.UnsupportedError, match="multiples of 16 bytes"):
        flash_attention_n(torch.randn(1, 2, 64, 68).cuda().bfloat16()[..., :64], k, v, backend="triton:hopper")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"window_left": 5, "softcap": 3.0, "n_kind": "per head", "return_lse": True}, None),
        ({"capability": (9, 0), "dtype": torch.float32}, "computes in float16 and bfloat16, not in float32"),
        ({"capability": (8, 0)}, "runs on compute capability 9.0"),
        ({"capability": (10, 0)}, "runs on compute capability 9.0"),
        ({"v_shape": (2, 8, 256, 128)}, "takes heads of 64, 128, 256 with E = Ev, got 64, 128"),
        ({"varlen": True}, "no packed sequences"),
        ({"alibi": True}, "no attn_mask, alibi_slopes or dropout"),
        ({"k_stride": (0, 0, 64, 1)}, "reads strides that are multiples of 16 bytes, and nothing expanded"),
    ],
    ids=str,
)  # fmt: skip
def test_why_not(changes: dict[str, object], reason: str | None) -> None:
    found = HopperKernels().why_not(gpu_call(**changes))
    assert (found is None) if reason is None else str(found).startswith(reason)


def test_another_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_n.backends.triton import BACKEND, hopper

    monkeypatch.setattr(hopper.triton, "__version__", "3.9.0")
    assert HopperKernels().why_not(gpu_call()) == "was tested on Triton 3.6, found 3.9.0"
    assert BACKEND.serving(gpu_call()) == "portable"
