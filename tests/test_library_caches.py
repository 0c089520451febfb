"""FlashAttention 2, 3 and 4 over KV caches that they read in place, with stand-ins for their functions on a CPU.

A stand-in has the signature and the limits of the library's function, checks what it is given, and computes in float64.
Those of 3 and 4 multiply whole tiles where the library loads these by TMA, so that NaN there reaches the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_n
from attn_n import flash_attention_n
from attn_n.backends import registry
from attn_n.backends.adapt import padding
from attn_n.backends.adapt.in_place import InPlaceFlash, Places
from attn_n.backends.flash_attn import version_2, version_3, version_4
from attn_n.backends.flash_attn.version_2 import FlashAttention2
from attn_n.backends.flash_attn.version_3 import FlashAttention3
from attn_n.backends.flash_attn.version_4 import FlashAttention4
from attn_n.call import AttentionCall, Options
from attn_n.dispatch import over_cache
from tests.calls import gpu_call
from tests.cases import why_not_usable
from tests.test_adapt import Flash
from tests.test_kvcache import CASES, Case, int32, make, replayed

PAGES_OF_256 = [
    Case("blocks of 256", most=512, block=256, lengths=(250, 0, 70, 307)),
    Case("blocks of 256, window", most=512, block=256, lengths=(300, 0, 70, 507), queries=3, new=3, window=(100, 1)),
    Case("as long as a tile", most=128, lengths=(100, 0, 17, 126), queries=2, new=2, n="sinks"),
    Case("blocks of whole tiles, many queries", most=512, block=256, lengths=(250, 0, 70, 307), queries=80, new=80),
]
ALL = CASES + PAGES_OF_256


def reason(version: int, case: Case) -> str | None:
    """Return why a version does not read the cache of a case in place; None if it does."""
    if version == 2:
        if case.block % 256:
            return "takes blocks of a multiple of 256 keys"
        return "has no cache_leftpad together" if case.block and case.leftpad else None
    if case.alibi:
        return "has no alibi_slopes"
    if version == 3:
        return None
    if case.leftpad:
        return "has no cache_leftpad"
    return "loads blocks of 128 keys whole" if (case.block or case.most) == 128 else None


def attend(
    q: Tensor, k: Tensor, v: Tensor, used: Tensor, leftpad: Tensor | None, of_sequence: Callable[[int, Tensor], Any],
    most: int, scale: float, window: tuple[int | None, int | None], softcap: float = 0.0, slopes: Tensor | None = None,
    tile: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out `(B, L, Hq, E)` and lse `(B, Hq, L)`; `of_sequence` says at which indices the rows of sequence b lie.

    Keys are loaded by tiles, and all rows of a tile meet their weights.
    """
    batch, length, heads, _ = q.shape
    out, lse = torch.full(q.shape, math.nan), torch.full((batch, heads, length), math.nan)
    for b in range(batch):
        begin, end = 0 if leftpad is None else int(leftpad[b]), int(used[b])
        assert 0 <= begin <= end <= most
        rows = torch.arange(begin, min(-(-end // tile) * tile, most))
        index = of_sequence(b, rows)
        keys, values = (x[index].double().repeat_interleave(heads // x.shape[2], 1).transpose(0, 1) for x in (k, v))
        logits = q[b].double().transpose(0, 1) @ keys.mT * scale
        logits = softcap * (logits / softcap).tanh() if softcap else logits
        behind = torch.arange(length)[:, None] + end - length - rows
        if slopes is not None:
            logits = logits - slopes[b].double()[:, None, None] * behind.abs()
        left, right = window
        hidden = (rows >= end).expand(length, -1)
        hidden = hidden | (behind > left) if left is not None else hidden
        hidden = hidden | (-behind > right) if right is not None else hidden
        logits = logits.masked_fill(hidden, -math.inf)  # of whatever lies beyond, as all of them do
        lse[b] = logits.logsumexp(-1)
        weights = (logits - lse[b][..., None].double()).exp().nan_to_num(0.0)
        out[b] = (weights @ values).transpose(0, 1)
    return out, lse


def in_table(table: Tensor, block: int) -> Callable[[int, Tensor], Any]:
    return lambda b, rows: (table[b].long()[rows // block], rows % block)


def dense(*tensors: Tensor | None) -> None:
    for x in tensors:
        assert x is None or (x.dtype == torch.int32 and x.stride(-1) == 1)


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None, block_table: Tensor | None, softmax_scale: float, causal: bool,
    window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None, num_splits: int,
    return_softmax_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashAttention 2: a side of -1 is the longest length beside another one; rows without keys have lse = inf."""
    assert return_softmax_lse
    assert num_splits <= 128
    assert q.shape[3] == k_cache.shape[3] == v_cache.shape[3]
    assert q.shape[3] % 8 == 0
    assert all(x.stride(3) == 1 for x in (q, k_cache, v_cache))
    dense(cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    block = k_cache.shape[1]
    if block_table is not None:
        assert block % 256 == 0
        assert cache_batch_idx is None is cache_leftpad
        most, place = block * block_table.shape[1], in_table(block_table, block)
    else:
        assert cache_batch_idx is not None or k_cache.shape[0] == q.shape[0]
        most, place = block, lambda b, rows: (b if cache_batch_idx is None else int(cache_batch_idx[b]), rows)
    sides: tuple[int | None, int | None] = (None, 0) if causal else (None, None)
    if window_size != (-1, -1):
        assert not causal
        left, right = (most if side == -1 else side for side in window_size)
        sides = left, right
    arguments = cache_seqlens, cache_leftpad, place, most, softmax_scale, sides, softcap
    assert alibi_slopes is None or not causal  # under causal=True it adds something else
    out, lse = attend(q, k_cache, v_cache, *arguments, alibi_slopes)
    return out, lse.masked_fill(lse == -math.inf, math.inf)


def fwd(
    q: Tensor, k: Tensor, v: Tensor, *, seqused_k: Tensor, page_table: Tensor, leftpad_k: Tensor | None,
    num_splits: int, softmax_scale: float, is_causal: bool, window_size_left: int, window_size_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    """FlashAttention 3: pages of whole tiles are loaded by TMA for many queries, unless there is a leftpad_k."""
    assert num_splits <= 256
    dense(seqused_k, page_table, leftpad_k)
    assert page_table.shape[0] == q.shape[0]
    block = k.shape[1]
    many = q.shape[1] * q.shape[2] // k.shape[2] > 128
    tile = 128 if leftpad_k is None and many and block % 128 == 0 else 1
    left, right = (None if side == -1 else side for side in (window_size_left, window_size_right))
    sides = left, 0 if is_causal else right
    most, place = block * page_table.shape[1], in_table(page_table, block)
    out, lse = attend(q, k, v, seqused_k, leftpad_k, place, most, softmax_scale, sides, softcap, tile=tile)
    return out, lse, None, None


def flash_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, seqused_k: Tensor, page_table: Tensor, num_splits: int,
    softmax_scale: float, softcap: float, window_size_left: int | None, window_size_right: int | None,
    cu_seqlens_q: None, cu_seqlens_k: None, max_seqlen_q: None, max_seqlen_k: None,
) -> tuple[Tensor, Tensor, None, None, None]:  # fmt: skip
    """FlashAttention 4 on Hopper: pages that are tiles are loaded by TMA, and keys are not split."""
    assert return_lse
    assert num_splits == 1
    dense(seqused_k, page_table)
    block = k.shape[1]
    most, place, sides = block * page_table.shape[1], in_table(page_table, block), (window_size_left, window_size_right)
    tile = 128 if block == 128 else 1
    out, lse = attend(q, k, v, seqused_k, None, place, most, softmax_scale, sides, softcap, tile=tile)
    return out, lse, None, None, None


class Two(FlashAttention2):
    name, devices, dtypes, capability = "stand-in 2", ("cpu",), (torch.float32,), None


class Three(FlashAttention3):
    name, devices, dtypes = "stand-in 3", ("cpu",), (torch.float32,)

    def why_not(self, call: AttentionCall) -> str | None:
        return self.why_not_in_place(call) if call.cached else None


class Four(FlashAttention4):
    name, devices, dtypes = "stand-in 4", ("cpu",), (torch.float32,)

    def why_not(self, call: AttentionCall) -> str | None:
        return self.why_not_in_place(call) if call.cached else None


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Put the stand-ins in place of the libraries, where these are not tested themselves."""
    if request.node.get_closest_marker("gpu"):
        return
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for version in (version_2, version_3, version_4):
        monkeypatch.setattr(version, "why_not_cache", lambda: None)
        monkeypatch.setattr(version, "why_not_usable", lambda: None)
    monkeypatch.setattr(version_2, "_module", lambda: SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache))
    monkeypatch.setattr(version_3, "left_out", lambda feature: None)
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(fwd=fwd), raising=False)
    tile = SimpleNamespace(n_block_size=128)
    module = SimpleNamespace(_flash_attn_fwd=flash_attn_fwd, _tile_size_fwd_sm90=lambda *_: tile)
    monkeypatch.setattr(version_4, "_module", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for backend in (Two(), Three(), Four()):
        attn_n.register_backend(backend)


def not_copied(*_: object) -> Tensor:
    raise AssertionError("the cache was copied")


# A contiguous cache with one length is a batch as any other, for the functions that have always served those.
ONE_LENGTH = [case for case in ALL if not isinstance(case.lengths, tuple)]
SERVED = [
    (version, case) for version in (2, 3, 4) for case in ALL if reason(version, case) is None and case not in ONE_LENGTH
]


@pytest.mark.parametrize(("version", "case"), SERVED, ids=str)
def test_against_float64(version: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_cache, "gather", not_copied)
    call = make(case)
    out, lse = call.run(f"stand-in {version}")
    truth, truth_lse = call.exact()
    assert torch.allclose(out.double(), truth, atol=1e-5)
    assert torch.allclose(lse.double(), truth_lse, atol=1e-5)


def cache_call(case: Case, **changes: object) -> AttentionCall:
    """Return the description of a case's call, paged or with rows of its own, on an H100."""
    shape = (60 if case.block else 4, 2, case.block or case.most, 64)
    fields = {
        "q_shape": (4, 4, case.queries, 64), "q_stride": (256, 64, 64, 1), "k_shape": shape, "v_shape": shape,
        "needs_grad": False, "seqused": True, "leftpad": bool(case.leftpad), "alibi": case.alibi, "cache": True,
        "block_table": case.most // case.block if case.block else 0, "window_right": 0 if case.causal else None,
    }  # fmt: skip
    return gpu_call(**{**fields, **changes})


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_why_not(version: int, case: Case) -> None:
    backend, expected = (
        {2: FlashAttention2(), 3: FlashAttention3(), 4: FlashAttention4()}[version],
        reason(version, case),
    )
    found = backend.refusal(cache_call(case))
    assert found is None if expected is None else str(found).startswith(expected), found


ONE = CASES[0]


@pytest.mark.parametrize(
    ("versions", "changes", "said"),
    [
        ((2, 3, 4), {"cache_dtype": torch.float8_e4m3fn}, "reads a KV cache in the dtype of q, not float8_e4m3fn"),
        ((2, 3, 4), {"v_shape": (4, 2, 16, 32)}, "one head size for keys and values, a multiple of 8, got 64 and 32"),
        ((2, 3, 4), {"q_shape": (4, 4, 1, 60), "k_shape": (4, 2, 16, 60), "v_shape": (4, 2, 16, 60)}, "got 60 and 60"),
        ((2, 3, 4), {"v_stride": (2048, 1024, 1, 16)}, r"got values with strides (2048, 1024, 1, 16)"),
        ((2, 3, 4), {"k_stride": (2048, 1024, 65, 1)}, "dense rows on 16-byte boundaries, got keys with strides"),
        (
            (2,),
            {"q_shape": (4, 4, 18, 64), "window_left": 3, "window_right": None},
            "open to the right only for L <= S",
        ),
    ],
    ids=str,
)
def test_what_no_version_reads(versions: tuple[int, ...], changes: dict[str, Any], said: str) -> None:
    for version in versions:
        backend = {2: FlashAttention2(), 3: FlashAttention3(), 4: FlashAttention4()}[version]
        assert said in str(backend.refusal(cache_call(ONE, **changes)))


def test_a_build_without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "this build of FlashAttention 3 (1.0) was made without pagedkv"
    monkeypatch.setattr(version_3, "left_out", lambda feature: said if feature == "PAGEDKV" else None)
    assert FlashAttention3().refusal(cache_call(ONE)) == said


class Both(Flash, InPlaceFlash):
    """The stand-in of FlashAttention 2 for batches and varlen sequences, which reads keys in place too."""

    honours = (*Flash.honours, "seqused", "leftpad")

    def __init__(self) -> None:
        super().__init__(takes_dlse=False, backward_multiple=8)
        self.in_place = 0

    def kernel_in_place(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, options: Options
    ) -> tuple[Tensor, Tensor]:
        self.in_place += 1
        sides = options.window_left, options.window_right
        used, leftpad = places.used, places.leftpad
        return attend(q, k, v, used, leftpad, lambda b, rows: (b, rows), k.shape[1], options.scale, sides)


@pytest.mark.parametrize(
    ("lengths", "size", "in_place"),
    [
        ({"seqused_k": int32(9, 0, 5)}, 8, 1),
        ({"seqused_k": int32(9, 3, 5), "leftpad_k": int32(2, 7, 5)}, 8, 1),
        ({"leftpad_k": int32(2, 0, 9)}, 8, 1),
        ({"seqused_k": int32(9, 0, 5)}, 12, 0),
        ({"seqused_q": int32(4, 0, 3), "seqused_k": int32(9, 0, 5)}, 8, 0),
    ],
    ids=str,
)
def test_a_padded_batch_is_packed_only_if_it_has_to_be(lengths: dict[str, Tensor], size: int, in_place: int) -> None:
    """The forward reads keys in place, and the backward packs them: it would load what lies beyond."""
    backend = Both()
    attn_n.register_backend(backend)
    q, k, v = (torch.randn(3, heads, length, size) for heads, length in ((4, 4), (2, 9), (2, 9)))
    for b in range(3):
        end, begin = (int(lengths[name][b]) if name in lengths else 0 for name in ("seqused_k", "leftpad_k"))
        for x in (k, v):
            x[b, :, end if "seqused_k" in lengths else 9 :], x[b, :, :begin] = math.nan, math.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    dout, found = torch.randn(3, 4, 4, size), []
    for name in (backend.name, "reference"):
        out, lse = flash_attention_n(*inputs, True, sm_n=2.0, return_lse=True, backend=name, **lengths)
        found.append((out, lse, *torch.autograd.grad(out, inputs, dout)))
    assert backend.in_place == in_place
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


LIBRARIES = [
    pytest.param(
        version,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                why_not_usable(f"flash_attn:{version}") is not None, reason=f"{why_not_usable(f'flash_attn:{version}')}"
            ),
        ],
    )
    for version in (2, 3, 4)
]
ON_GPU = [
    *ALL,
    Case("heads of 64", size=64, most=2000, lengths=(1999, 0, 70, 1207), tokens_first=True, n="sinks"),
    Case("heads of 128", size=128, most=1000, lengths=(996, 0, 70, 707), queries=4, new=4, n="sinks"),
    Case("small blocks", size=128, most=2000, block=16, lengths=(1999, 0, 70, 1207), n="sinks"),
    Case("many queries", size=64, most=1024, block=128, lengths=(824, 0, 70, 707), queries=200, new=200),
    Case("large blocks", size=128, most=1024, block=256, lengths=(1000, 0, 70, 707), tokens_first=True, n="sinks"),
    Case("rows of large blocks", size=64, most=1000, lengths=(999, 0, 70, 707), rows=(5, 0, 3, 1), splits=3),
]  # fmt: skip


@pytest.mark.parametrize("version", LIBRARIES)
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_the_library(version: int, case: Case, monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    """A cache that a library reads in place is not copied; others are served from a copy, and right."""
    backend, call = f"flash_attn:{version}", make(case, torch.bfloat16, "cuda")
    expected = reason(version, case)
    if version != 2 and case.alibi:
        with pytest.raises(attn_n.UnsupportedError, match="alibi"):
            call.run(backend)
        return
    if expected is None:
        monkeypatch.setattr(over_cache, "gather", not_copied)
        monkeypatch.setattr(padding, "forward_packed", not_copied)
    out, lse = call.run(backend)
    assert ran == [f"forward {backend}"]
    truth, truth_lse = call.exact()
    assert torch.allclose(out.double().cpu(), truth, atol=2e-2)
    assert torch.allclose(lse.double().cpu(), truth_lse, atol=2e-2)


@pytest.mark.parametrize("version", LIBRARIES)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[10]], ids=str)
def test_a_cuda_graph_of_the_library(version: int, case: Case) -> None:
    replayed(case, f"flash_attn:{version}")
