"""The Triton kernel that writes new rows into a KV cache (under the interpreter on a CPU), against torch."""

from __future__ import annotations

import pytest
import torch

from attn_n.cache import append
from attn_n.cache.fused import FusedAppend
from attn_n.call import CacheRequest
from tests.cases import INTERPRETED
from tests.places import PLACES
from tests.test_kvcache import CASES, Case, make

BY_NAME = {case.name: case for case in CASES}
NEW = [
    *[
        BY_NAME[name]
        for name in (
            "one query", "rows of a larger cache", "tokens first", "paged", "rotary", "rotary, halves, paged",
            "rotary, not causal",
        )
    ],
    Case("more queries than new keys", rotary="interleaved", queries=5, new=2, most=40, block=8, size=12),
    Case("a chunk", rotary="halves", queries=130, new=130, most=150, lengths=(5, 0, 11, 20), size=16),
]  # fmt: skip


def cache_request(case: Case, device: str, float8: bool = False) -> tuple[list[torch.Tensor], CacheRequest, bool]:
    """Return q, both caches, and what is appended to them."""
    call = make(case, torch.float32, device)
    names = "cache_batch_idx", "block_table", "rotary_cos", "rotary_sin"
    given = {name: call.keywords.get(name) for name in names}
    caches, factors = call.caches, [None, None]
    if float8:  # with quotients that it holds exactly: the interpreter's rounding loses carries
        caches = [x.clamp(-4, 4).to(torch.float8_e4m3fn) for x in caches]
        factors = [torch.tensor([[0.5, 0.25]] * 4, device=device), torch.tensor([[2.0, 0.125]] * 4, device=device)]
        call.new = [x.round() for x in call.new]
    lengths = call.keywords["cache_seqlens"]
    interleaved = call.keywords.get("rotary_interleaved", True)
    request = CacheRequest(*call.new, lengths, *given.values(), interleaved, *factors, 0)
    return [call.q, *caches], request, case.causal


def compare(case: Case, device: str, float8: bool = False) -> None:
    (q, *caches), request, bounded = cache_request(case, device, float8)
    before = request.cache_seqlens
    assert isinstance(before, torch.Tensor)
    copies = [x.clone() for x in caches]
    found, used = FusedAppend(q, *caches, request, bounded)(q, *caches, before, request)
    expected, used_too = append.by_torch(bounded, q, *copies, before, request)
    assert torch.equal(used, used_too)
    assert torch.allclose(found, expected, atol=1e-6)
    for mine, theirs in zip(caches, copies, strict=True):
        assert torch.allclose(mine.float(), theirs.float(), atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("case", NEW, ids=str)
def test_against_torch(device: str, case: Case) -> None:
    compare(case, device)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("name", ["rows of a larger cache", "paged"])
def test_float8(device: str, name: str) -> None:
    compare(BY_NAME[name], device, float8=True)


@pytest.mark.parametrize("device", PLACES)
def test_float8_holds_no_infinity(device: str) -> None:
    """What lies beyond the largest number is clamped, and NaN stays NaN (but for the interpreter)."""
    (q, *caches), request, bounded = cache_request(CASES[0], device, float8=True)
    assert request.k is not None
    request.k[0, 0, 0, :3] = torch.tensor([1e6, -1e6, torch.nan])
    FusedAppend(q, *caches, request, bounded)(q, *caches, request.cache_seqlens, request)
    assert caches[0][0, 0, 5, :2].float().tolist() == [448.0, -448.0]
    assert INTERPRETED or caches[0][0, 0, 5, 2].isnan()


def test_who_appends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch does; so it does on a GPU in float64, under torch.compile, and without Triton."""
    (q, *caches), request, bounded = cache_request(CASES[0], "cpu")
    prepared = append.prepare(q, *caches, request, bounded)
    assert getattr(prepared, "func", None) is append.by_torch
    assert append._kernels() is not None
    monkeypatch.setattr(append.importlib, "import_module", lambda _: (_ for _ in ()).throw(ImportError("broken")))
    append._kernels.cache_clear()
    assert append._kernels() is None
    append._kernels.cache_clear()
