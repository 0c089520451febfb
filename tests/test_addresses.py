"""Our kernels address offsets of 2^31 elements and more in every stride; the memory is mapped and hardly touched.

A product that has overflowed 32 bits would address other mapped memory, which is zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from attn_n import flash_attention_n_varlen
from attn_n.backends.triton import portable
from attn_n.backends.triton.kernel_key import describe
from attn_n.call import Options, Request, canonical
from attn_n.sink import fused, rescale
from tests import compare
from tests.calls import gpu_call
from tests.cases import INTERPRETED, Case, make, why_not_usable
from tests.places import PLACES, on_gpu

FAR = 2**30  # the stride fits 32 bits, and twice the stride does not


def far_apart(x: Tensor, dim: int, distance: int = FAR) -> Tensor:
    """Return x with its elements far apart in one dimension, in the middle of mapped memory, which is zero on a GPU."""
    strides = list(x.contiguous().stride())
    strides[dim] = distance
    before = 2**31
    elements = before + sum(step * (size - 1) for step, size in zip(strides, x.shape, strict=True)) + 4096
    new = torch.empty if x.device.type == "cpu" else torch.zeros  # the pages of a CPU are zero when first touched
    try:
        memory = new(elements, dtype=x.dtype, device=x.device)
    except RuntimeError as error:  # too little virtual memory, or GPU memory
        pytest.skip(str(error).splitlines()[0])
    return memory.as_strided(x.shape, strides, before).copy_(x)


def check(inputs: Any) -> None:
    excess = compare.excess(inputs, compare.library(inputs, "triton:portable"))
    assert max(excess.values()) <= 1, excess


CASE = Case("", batch=1, heads_q=3, heads_kv=3, len_q=5, len_k=6)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_masks(device: str, dim: int) -> None:
    """A bool mask `(1, 64, 8192, 8192)` is large enough."""
    inputs = make(CASE, torch.float32, device)
    inputs.mask = far_apart(torch.rand(1, 3, 5, 6, device=device) > 0.4, dim)
    check(inputs)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_inputs(device: str, dim: int, name: str) -> None:
    inputs = make(dataclasses.replace(CASE, size=3, size_v=3), torch.float16, device)
    setattr(inputs, name, far_apart(getattr(inputs, name).detach(), dim).requires_grad_())
    check(inputs)


@pytest.mark.parametrize("device", PLACES)
def test_numbers_of_heads(device: str) -> None:
    inputs = make(dataclasses.replace(CASE, alibi="per head", n="sinks", sinks=(0.0, -1.0, 1.0)), torch.float32, device)
    assert inputs.alibi_slopes is not None
    assert inputs.sinks is not None
    inputs.alibi_slopes = far_apart(inputs.alibi_slopes, 0)
    check(inputs)
    inputs.alibi_slopes = inputs.alibi_slopes.clone()
    inputs.sinks = far_apart(inputs.sinks.detach(), 0).requires_grad_()
    check(inputs)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_sink(device: str, dim: int) -> None:
    out = torch.randn(1, 3, 4, 3, device=device, dtype=torch.float16)
    lse, log_n = torch.randn(1, 3, 4, device=device), torch.tensor([0.0, 1.0, -1.0], device=device)
    far = far_apart(out, dim)
    exact = rescale.gradient_of_n(out.double(), None, out.double(), lse.double(), log_n.double(), False)
    got = fused.gradient_of_n(far, None, out, lse, log_n)
    assert torch.allclose(got.double(), exact, rtol=1e-5, atol=1e-5)
    exact = out.double()
    rescale.scale_(exact, lse.double(), log_n.double(), False)
    fused.add_sink_(far, lse, log_n)
    assert torch.allclose(far.double(), exact, rtol=1e-3, atol=1e-7)


def test_the_longest_sequence_is_overstated() -> None:
    """max_seqlen may be so large that its tiles or programs cannot be counted in 32 bits."""
    q, starts, most = torch.randn(9, 2, 16, requires_grad=True), torch.tensor([0, 4, 9], dtype=torch.int32), 2**31 - 1
    options = Options(0.25, most, most, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=most, max_seqlen_k=most)
    key = describe((q, q, q), None, options)
    assert (key.len_q, key.len_k, key.window) == (9, 9, (9, 9))
    if INTERPRETED:
        results = []
        for backend, longest in (("triton:portable", most), ("reference", 5)):
            out = flash_attention_n_varlen(
                q, q, q, starts, starts, longest, longest, sm_n=1.0, window=(most, most), backend=backend
            )
            results.append((out, *torch.autograd.grad(out.square().sum(), q)))
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*results, strict=True))


WIDE = [
    *(pytest.param("cpu", name) for name in ("reference", "sdpa:cpu", "triton:portable")),
    *on_gpu(
        *(
            ("cuda", name)
            for name in (
                "sdpa:flash",
                "triton:portable",
                "triton:hopper",
                "flash_attn:2",
                "flash_attn:3",
                "flash_attn:4",
            )
        )
    ),
]


@pytest.mark.parametrize(("device", "backend"), WIDE)
@pytest.mark.parametrize("window", [(2**32, 2**33), (2**32 + 2, None), (None, 2**31)], ids=str)
def test_a_window_of_varlen_sequences(device: str, backend: str, window: tuple[int | None, int | None]) -> None:
    """Libraries take a window in 32 bits, and 2^32 truncated to these is an empty window."""
    if why_not_usable(backend):
        pytest.skip(f"{backend}: {why_not_usable(backend)}")
    starts = torch.tensor([0, 40, 90], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(90, 2, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    packing = q, k, v, starts, starts, 50, 50
    call = canonical.varlen(*packing, request(window)).call
    assert (call.window_left, call.window_right) == tuple(None if side is None else 50 for side in window)
    out = flash_attention_n_varlen(*packing, sm_n=1.0, window=window, backend=backend)
    expected = flash_attention_n_varlen(*packing, sm_n=1.0, backend="reference")
    assert torch.allclose(out, expected, atol=2e-2)


def request(window: tuple[int | None, int | None]) -> Request:
    return Request(False, None, None, None, None, window, None, None, 0.0, False, None)


def test_a_length_within_a_tile_of_32_bits() -> None:
    for length, reason in ((2**31 - 200, "counts rows tile by tile in 32 bits"), (2**31 - 300, None), (2**31, None)):
        call = gpu_call(k_shape=(1, 1, length, 64), v_shape=(1, 1, length, 64))
        found = portable.PortableKernels().why_not(call)
        assert found is None if reason is None else reason in str(found)
