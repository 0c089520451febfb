"""The kernels for Hopper: the table of cases at their widths, odd shapes, random ones, and the same bits each time."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import attn_n
from attn_n import flash_attention_n, flash_attention_n_varlen
from attn_n.backends.triton import BACKEND, hopper
from attn_n.backends.triton.hopper import HopperKernels, configs
from attn_n.backends.triton.hopper.configs import BACKWARD, FORWARD, Config
from attn_n.backends.triton.problem import describe
from attn_n.call import Options
from tests import compare
from tests.cases import CASES, HOPPER, INTERPRETED, Case, make, must_serve
from tests.test_registry import gpu_call, packed

WIDTHS = (64, 128, 256)
HALF = (torch.bfloat16, torch.float16)

PLACES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled for the GPU here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_hopper = pytest.mark.skipif(not HOPPER, reason="no GPU of compute capability 9.0")


def at_width(case: Case, width: int) -> Case:
    return dataclasses.replace(case, size=width, size_v=width)


SERVED = [
    case
    for case in CASES
    if not case.features & {"mask", "alibi"} and case.layout != "transposed" and abs(case.shift) < 40
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


@pytest.fixture
def fresh_launches() -> Iterator[None]:
    """Calls that look the same share a launch, and with it what a test has changed in `configs`."""
    from attn_n.backends.triton.hopper import prepare  # of a tested release of Gluon alone

    def forget() -> None:
        prepare.prepared.cache_clear()
        prepare.prepared_backward.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("fresh_launches")
@pytest.mark.parametrize(("width", "row"), [(width, row) for width, rows in FORWARD.items() for row in rows], ids=str)
def test_every_row(width: int, row: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each configuration of the forward, on short calls and on more work than runs at once."""
    monkeypatch.setattr(configs, "find", lambda problem: row)
    cases = (
        Case("", batch=1, heads_q=4, heads_kv=2, len_q=150, len_k=170, window=(90, 10), n="per head"),
        Case("", batch=2, heads_q=40, heads_kv=40, len_q=700, len_k=700, causal=True),
        Case("", batch=2, heads_q=40, heads_kv=8, len_q=333, len_k=720, softcap=5.0, layout="tokens first"),
    )
    for case in cases:
        inputs = make(at_width(case, width), torch.bfloat16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (case, excess)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_growing_maxima(causal: bool, width: int, dtype: torch.dtype) -> None:
    """Logits that rise towards the first keys, which come last, by 0 to 200: of neighbouring rows some are rescaled."""
    case = Case("", batch=1, heads_q=2, heads_kv=2, len_q=1100, len_k=1500, size=width, size_v=width, causal=causal)
    inputs = make(case, dtype, "cuda")
    rises = torch.tensor([0.0, 2.0, 8.0, 40.0, 200.0], device="cuda")
    with torch.no_grad():
        inputs.q[..., 0] = rises[torch.arange(case.len_q, device="cuda") % 5] * width**0.5 / 16
        inputs.k[..., 0] = torch.linspace(16, 0, case.len_k, device="cuda")
    excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
    assert max(excess.values()) <= 1, excess


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("fresh_launches")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_parts_of_a_key_head(heads: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dK and dV as sums over programs that take 1, 2 or 4 of 8 query heads each."""
    monkeypatch.setattr(configs, "heads_of_item", lambda problem, processors: heads)
    usual = Case("", batch=2, heads_q=16, heads_kv=2, len_q=333, len_k=420, n="per head")
    lengths = {"lengths_q": (0, 70, 0, 200, 9, 0), "lengths_k": (50, 0, 0, 333, 9, 0)}
    cases = (
        {"layout": "tokens first"}, {"causal": True}, {"window": (60, 9)}, {"causal": True, "softcap": 3.0}, lengths,
        lengths | {"causal": True}, {"len_q": 1, "len_k": 1}, {"len_q": 900, "len_k": 40},
    )  # fmt: skip
    for changes in cases:
        inputs = make(at_width(dataclasses.replace(usual, **changes), width), torch.bfloat16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (changes, excess)


# Of one sequence of 16,384 tokens with two key heads, on 132 processors.
@pytest.mark.parametrize(
    ("changes", "groups", "heads"),
    [
        ({}, 8, 8),
        ({"right": 0}, 1, 1),
        ({"right": 0}, 4, 4),
        ({"right": 0}, 8, 2),
        ({"right": 0}, 6, 2),
        ({"right": 0}, 7, 1),
        ({"right": 0, "width": 64}, 8, 8),
        ({"right": 0, "width": 64}, 16, 4),
        ({"right": 0, "width": 256}, 4, 2),
        ({"right": 0, "left": 500}, 8, 8),
        ({"right": 0, "left": 4000}, 8, 2),
        ({"right": 0, "packed": True, "batch": 64, "len_q": 300}, 8, 8),
        ({"right": 0, "packed": True, "batch": 64, "len_q": 3000}, 8, 2),
        ({"heads_kv": 1, "keys": 4096}, 8, 2),
        ({"heads_kv": 2, "keys": 4096}, 8, 4),
        ({"heads_kv": 2, "keys": 4096, "right": 0}, 8, 2),
        ({"len_q": 1}, 64, 64),
    ],
    ids=str,
)
def test_query_heads_of_a_program(changes: dict[str, object], groups: int, heads: int) -> None:
    q = torch.empty(1, 2, 16384, 128, device="meta", dtype=torch.bfloat16)
    usual = describe((q,) * 8, None, Options(0.1))._replace(heads_kv=2)
    problem = usual._replace(**changes)
    problem = problem._replace(heads=groups * problem.heads_kv)
    assert configs.heads_of_item(problem, 132) == heads


@pytest.mark.skipif(not hopper.tested(), reason="Gluon changes between releases of Triton, and this one is not tested")
@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({}, False),
        ({"right": 0}, True),
        ({"left": 4000, "right": 0}, True),
        ({"left": 4000}, False),
        ({"right": 0, "len_q": 512, "len_k": 512}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", WIDTHS)
def test_who_takes_tiles_by_a_counter(width: int, changes: dict[str, object], counted: bool) -> None:
    from attn_n.backends.triton.hopper.prepare import prepared

    q = torch.empty(1, 16, 16384, width, device="meta", dtype=torch.bfloat16)
    problem = describe((q,) * 4, None, Options(0.1))._replace(**changes)
    assert configs.find(problem).counted == counted
    assert prepared(problem).table == counted


def ragged(count: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths as real text has them: many short ones, a few long ones."""
    pick = random.Random(seed)
    weights = [pick.lognormvariate(0.0, 1.0) for _ in range(count)]
    return tuple(int(count * mean * weight / sum(weights)) for weight in weights)


PACKINGS = {
    "around tiles": ((63, 64, 65, 1, 127, 128, 129, 191, 192, 193), (65, 64, 63, 129, 1, 128, 127, 193, 192, 191)),
    "empty": ((0, 70, 0, 200, 9, 0), (50, 0, 0, 333, 9, 0)),
    "few queries": ((1, 2, 3, 4), (900, 1, 300, 129)),
    "few keys": ((900, 1, 300, 129), (1, 2, 3, 4)),
    "tiny": ((3, 0, 1, 7, 20) * 60, (3, 5, 1, 7, 9) * 60),
    "log-normal": (ragged(64, 1000), ragged(64, 1000)),
    "one": ((1500,), (1500,)),
}


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_packings(packing: str, width: int, ran: list[str]) -> None:
    queries, keys = PACKINGS[packing]
    many = sum(queries) > 10000
    case = Case(
        "", heads_q=4, heads_kv=2, lengths_q=queries, lengths_k=keys, size=width, size_v=width, n="per head",
    )  # fmt: skip
    for changes in ({"causal": True},) if many else ({}, {"causal": True}, {"window": (40, 9)}, {"softcap": 3.0}):
        inputs = make(dataclasses.replace(case, **changes), torch.bfloat16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (changes, excess)
    assert set(ran) == {"forward triton:hopper", "backward triton:hopper"}


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_neighbours_see_nothing_of_each_other(width: int, causal: bool) -> None:
    """One sequence full of NaN leaves the others as they were, bit for bit; so do rows of NaN beyond all of them."""
    lengths = [100, 77, 64, 5, 300, 128]
    starts, rows = boundaries(lengths, "cuda"), sum(lengths)
    whole = [torch.randn(rows + 200, 4, width, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

    def results(poisoned: slice) -> list[torch.Tensor]:
        given = [x.clone() for x in whole]
        for x in given:
            x[poisoned] = math.nan
        q, k, v, dout = (x[:rows] for x in given)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        left = [torch.full_like(q, math.nan) for _ in range(8)]  # for what is allocated next and should be written
        del left
        out, lse = flash_attention_n_varlen(
            *inputs, starts, starts, 300, 300, causal, sm_n=1.0, return_lse=True, backend="triton:hopper"
        )
        return [out, lse, *torch.autograd.grad(out, inputs, dout)]

    clean = results(slice(rows, None))
    assert all(bool(x.isfinite().all()) for x in clean)
    for b in range(len(lengths)):
        begin, end = sum(lengths[:b]), sum(lengths[: b + 1])
        poisoned = results(slice(begin, end))
        for name, found, expected in zip(("out", "lse", "dq", "dk", "dv"), poisoned, clean, strict=True):
            assert bool(found[begin:end].isnan().any()), name
            if name != "dq":  # whose sum over tiles of keys is in no fixed order
                assert torch.equal(found[:begin], expected[:begin]), name
                assert torch.equal(found[end:], expected[end:]), name
            else:
                assert torch.allclose(found[:begin], expected[:begin], rtol=2e-2, atol=1e-2)
                assert torch.allclose(found[end:], expected[end:], rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_slices(width: int) -> None:
    """q, k and v side by side in one tensor, where rows are far apart; boundaries that are no array of their own."""
    lengths = [300, 17, 0, 129]
    starts = boundaries(lengths, "cuda")
    spread = torch.stack([starts, starts + 1], 1)[:, 0]
    together = torch.randn(sum(lengths), 3, 4, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = []
    for qkv, cu in ((together.unbind(1), spread), ([x.contiguous() for x in together.unbind(1)], starts)):
        out = flash_attention_n_varlen(*qkv, cu, cu, 300, 300, True, sm_n=1.0, backend="triton:hopper")
        found.append((out, *torch.autograd.grad(out, together, torch.ones_like(out))))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=2e-2, atol=1e-2)


def packed_at_random(pick: random.Random, case: Case, most: int, longest: int) -> Case:
    """So many sequences at most, some of them empty, and one of the lengths of the case."""
    count = pick.randint(1, most)
    lengths_q, lengths_k = (tuple(pick.choice([0, 1, pick.randint(1, longest)]) for _ in range(count)) for _ in "qk")
    packed = {"lengths_q": (*lengths_q, case.len_q), "lengths_k": (*lengths_k, case.len_k), "layout": "heads first"}
    return dataclasses.replace(case, **packed)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    """Ten of every kind of call; each kind is compiled for itself, which takes most of the time."""
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
            layout=pick.choice(["heads first", "tokens first", "expanded over the batch"]),
        )  # fmt: skip
        if pick.random() < 0.3:
            case = packed_at_random(pick, case, 12, 500)
        inputs = make(case, pick.choice(HALF), "cuda", seed)
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (case, excess)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_shapes(part: int) -> None:
    """Of few kinds of calls, so that little is compiled."""
    for seed in range(100 * part, 100 * part + 100):
        pick = random.Random(10_000 + seed)
        kind = pick.choice(["full", "causal", "window", "packed"])
        heads_kv, width = pick.randint(1, 4), pick.choice(WIDTHS)
        case = Case(
            "", batch=pick.randint(1, 4), heads_q=2 * heads_kv, heads_kv=heads_kv, len_q=pick.randint(1, 1800),
            len_k=pick.randint(1, 2200), size=width, size_v=width, n="per head", causal=kind in ("causal", "packed"),
            window=(90, 20) if kind == "window" else None,
        )  # fmt: skip
        if kind == "packed":
            case = packed_at_random(pick, case, 14, 600)
        inputs = make(case, torch.bfloat16, "cuda", seed)
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (case, excess)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_a_hundred_times(width: int, causal: bool) -> None:
    """All but dq, whose sum is in no fixed order."""
    q, k, v = (torch.randn(2, 4, 1500, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    dout, first = torch.randn_like(q), None
    for _ in range(100):
        out, lse = flash_attention_n(q, k, v, causal, sm_n=1.0, return_lse=True, backend="triton:hopper")
        _dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        found = (out, lse, dk, dv)
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", WIDTHS)
def test_deterministic_algorithms(width: int) -> None:
    q, k, v = (torch.randn(1, 4, 4000, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    dout = torch.randn_like(q)

    def gradients(member: str) -> tuple[torch.Tensor, ...]:
        out = flash_attention_n(q, k, v, sm_n=1.0, backend=f"triton:{member}")
        return torch.autograd.grad(out, (q, k, v), dout)

    try:
        torch.use_deterministic_algorithms(True)
        first = gradients("hopper")
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(gradients("hopper"), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    # The switch changes what runs.
    assert not all(torch.equal(gradients("hopper")[0], first[0]) for _ in range(5))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layout", ["sum", "over heads", "rows apart", "columns apart", "odd rows", "odd beginning"])
def test_gradients_of_out_in_any_layout(layout: str, width: int, ran: list[str]) -> None:
    q, k, v = (torch.randn(2, 3, 300, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    dout = {
        "sum": lambda: torch.ones((), device="cuda", dtype=torch.bfloat16).expand(q.shape),
        "over heads": lambda: torch.randn_like(q[:, :1]).expand(q.shape),
        "rows apart": lambda: torch.randn(300, 2, 3, 2 * width).cuda().bfloat16()[..., :width].permute(1, 2, 0, 3),
        "columns apart": lambda: torch.randn_like(q.mT.contiguous()).mT,
        "odd rows": lambda: torch.randn(2, 3, 300, width + 3).cuda().bfloat16()[..., :width],
        "odd beginning": lambda: torch.randn(1 + q.numel()).cuda().bfloat16()[1:].view(q.shape),
    }[layout]()
    found = []
    for given in (dout, dout.clone(memory_format=torch.contiguous_format)):
        out = flash_attention_n(q, k, v, True, sm_n=1.0, backend="triton:hopper")
        found.append(torch.autograd.grad(out, (q, k, v), given))
    (dq, *same), (other_dq, *others) = found
    assert all(torch.equal(a, b) for a, b in zip(same, others, strict=True))
    assert torch.allclose(dq, other_dq, rtol=2e-2, atol=1e-2)
    assert ran == ["forward triton:hopper", "backward triton:hopper"] * 2


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


# Of queries and of keys, for whose sums the last pass serves too.
TILES = sorted({(width, tile) for width, tiles in BACKWARD.items() for tile in tiles})


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(("width", "tile_q"), TILES)
def test_the_passes_around_the_backward(width: int, tile_q: int, device: str) -> None:
    """150 queries in each head: what they leave in whole tiles of rows, and dq out of those."""
    from attn_n.backends.triton.hopper.backward_passes import postprocess_kernel, preprocess_kernel

    batch, heads, length, tiles = 2, 3, 150, -(-150 // tile_q)
    out, dout = (torch.randn(batch, heads, length, width, device=device).half() for _ in "od")
    lse, dlse = (torch.randn(batch, heads, length, device=device) for _ in "ld")
    log_n, programs = torch.randn(heads, device=device), batch * heads * tiles
    stats = torch.full((2 * programs * tile_q + 1,), math.nan, device=device)
    dq_sum, shares = stats.new_full((programs * tile_q, width), math.nan), stats.new_full((programs,), math.nan)
    preprocess_kernel[(programs,)](
        out, dout, lse, dlse, stats, dq_sum, log_n, shares, None, out.stride(), dout.stride(), None, 1, heads, length,
        width, tile_q,
    )  # fmt: skip
    delta = (out.double() * dout.double()).sum(-1) - dlse
    lse_log2, minus_delta = stats[:-1].view(2, batch, heads, tiles * tile_q).double()
    assert torch.allclose(lse_log2[..., :length], lse.double() / math.log(2), atol=1e-5)
    assert torch.allclose(minus_delta[..., :length], -delta, atol=1e-3)
    assert bool((lse_log2[..., length:] == math.inf).all())
    assert not minus_delta[..., length:].any()
    assert not dq_sum.any()
    assert stats[-1:].view(torch.int32).item() == 0
    dn = -(torch.exp(log_n.double()[:, None] - lse) * delta).sum(-1)
    assert torch.allclose(shares.view(batch, heads, tiles).sum(-1).double(), dn, rtol=1e-3, atol=1e-3)

    exact = torch.randn(programs, tile_q, width, device=device)
    dq = torch.full_like(out, math.nan)
    postprocess_kernel[(programs,)](
        as_accumulators_lie(exact), dq, None, dq.stride(), None, heads, length, 0.5, width, tile_q
    )
    assert torch.equal(dq, (exact.view(batch, heads, -1, width)[:, :, :length] * 0.5).half())


def as_accumulators_lie(tiles: torch.Tensor) -> torch.Tensor:
    """Rows of `(tiles, rows, width)` in the order of the accumulators of wgmma, 64 x 64 numbers at a time."""
    # Where each bit of a place leads, rows and columns.
    bits = [(0, 1), (8, 0), (0, 2), (0, 4), (1, 0), (2, 0), (4, 0), (16, 0), (32, 0), (0, 8), (0, 16), (0, 32)]
    places = torch.arange(64 * 64)
    row, column = (sum(((places >> i) & 1) * bit[side] for i, bit in enumerate(bits)) for side in (0, 1))
    count, rows, width = tiles.shape
    blocks = tiles.view(count, rows // 64, 64, width // 64, 64).transpose(2, 3).reshape(-1, 64, 64)
    return blocks[:, row, column].contiguous()


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(("width", "tile_q"), TILES)
def test_the_passes_of_packed_sequences(width: int, tile_q: int, device: str) -> None:
    """Each sequence begins with a tile, and what lies in the others reaches none of its rows, be it NaN."""
    from attn_n.backends.triton.hopper.backward_passes import postprocess_kernel, preprocess_kernel

    lengths, heads = [5, 0, 150, 64, 1, 0, 128, 70, 0], 3
    starts = boundaries(lengths, device)
    rows, batch = sum(lengths), len(lengths)
    tiles, strides = rows // tile_q + batch, (0, width, heads * width, 1)
    out, dout = (torch.randn(rows, heads, width, device=device).half() for _ in "od")
    lse, dlse = (torch.randn(rows, heads, device=device) for _ in "ld")
    out[5:155] = math.nan
    stats = torch.full((2 * heads * tiles * tile_q + 1,), math.nan, device=device)
    dq_sum, shares = stats.new_full((heads * tiles * tile_q, width), math.nan), stats.new_full((heads * tiles,), 7.0)
    preprocess_kernel[(heads * tiles,)](
        out, dout, lse, dlse, stats, dq_sum, None, shares, starts, strides, strides, batch, None, heads,
        tiles * tile_q, width, tile_q,
    )  # fmt: skip
    exact = torch.randn(heads * tiles, tile_q, width, device=device)
    dq = torch.full_like(out, math.nan)
    postprocess_kernel[(heads * tiles,)](
        as_accumulators_lie(exact), dq, starts, strides, batch, heads, tiles * tile_q, 0.5, width, tile_q
    )
    delta = (out.double() * dout.double()).sum(-1) - dlse
    lse_log2, minus_delta = stats[:-1].view(2, heads, tiles * tile_q).double()
    first, taken = 0, torch.zeros(tiles * tile_q, dtype=torch.bool, device=device)
    for b, length in enumerate(lengths):
        at = (first // tile_q + b) * tile_q
        here, there = slice(first, first + length), slice(at, at + length)
        assert torch.allclose(lse_log2[:, there], lse[here].T.double() / math.log(2), atol=1e-5)
        assert torch.allclose(minus_delta[:, there], -delta[here].T, atol=1e-3, equal_nan=True)
        assert torch.equal(dq[here], (exact.view(heads, -1, width)[:, there] * 0.5).half().transpose(0, 1))
        assert not taken[there].any()
        taken[there], first = True, first + length
    assert bool((lse_log2[:, ~taken] == math.inf).all())
    assert not minus_delta[:, ~taken].any()
    assert not dq_sum.any()
    assert stats[-1:].view(torch.int32).item() == 0
    dn = -(torch.exp(-lse.double()) * delta).sum(0)
    assert bool(dn.isnan().all())  # of all heads: that of a sequence of NaN is NaN
    assert torch.equal(shares.view(heads, tiles).sum(-1).isnan(), dn.isnan())
    assert int(shares.isnan().sum()) == heads * -(-150 // tile_q)


def boundaries(lengths: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("batch", [1, 5, 130, 1100])
def test_the_order_of_packed_tiles(batch: int, device: str) -> None:
    """Each tile once, those of sequences with many keys first; of more than 1,024 sequences so in each 1,024."""
    from attn_n.backends.triton.hopper.schedule import HEADER, schedule_kernel

    pick, tile = random.Random(batch), 64
    lengths, keys = ([pick.choice([0, 1, 64, pick.randint(0, 300)]) for _ in range(batch)] for _ in "qk")
    most = sum(lengths) // tile + batch
    table = torch.full((HEADER.value + 2 * most,), -1, dtype=torch.int32, device=device)
    schedule_kernel[(-(-batch // 128),)](table, boundaries(lengths, device), boundaries(keys, device), batch, tile)
    expected: list[tuple[int, int]] = []
    for group in range(0, batch, 1024):
        for b in sorted(range(group, min(group + 1024, batch)), key=lambda b: -keys[b]):
            expected += [(b, len(expected))] * -(-lengths[b] // tile)
    counter, tiles, *found = table.tolist()
    assert (counter, tiles) == (0, len(expected))
    assert found[: 2 * tiles] == [number for pair in expected for number in pair]
    assert found[2 * tiles :] == [-1] * 2 * (most - tiles)


@pytest.mark.skipif(not hopper.tested(), reason="Gluon changes between releases of Triton, and this one is not tested")
@pytest.mark.parametrize("width", WIDTHS)
def test_variants_of_the_packed_forward_ahead_of_time(width: int) -> None:
    """The same for windows, softcap, and keys with boundaries of their own; numbers compile nothing."""
    code = f"""
import torch
from attn_n.call import Options
from bench.ahead_of_time import compiled, packed, resources
def kernel(same, **options):
    return compiled("sm_90", "hopper forward", {width}, None, torch.bfloat16, packed(Options(**options), same))
for found in (
    kernel(True, scale=0.1), kernel(False, scale=0.1, window_right=0),
    kernel(False, scale=0.1, window_left=9, window_right=5), kernel(True, scale=0.1, window_right=0, softcap=3.0),
):
    said = resources(found, "sm_90")
    assert said.spills <= 100 and not said.warnings, said
assert kernel(False, scale=0.1, window_left=9) is kernel(False, scale=1.0, window_left=16)
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "0"}, check=True)


@pytest.mark.skipif(not hopper.tested(), reason="Gluon changes between releases of Triton, and this one is not tested")
@pytest.mark.parametrize("width", BACKWARD)
def test_variants_of_the_backward_ahead_of_time(width: int) -> None:
    """Windows, softcap and float16 spill little, no product waits for another, and numbers compile nothing.

    At E = 128 the next S and dP cost a dozen loads a step of what is spilled, and are worth more (+1 to 4 %).
    """
    code = f"""
import torch
from attn_n.backends.triton.hopper import configs
from attn_n.call import Options
from bench.ahead_of_time import compiled, packed, resources
def kernel(length, dtype=torch.bfloat16, **options):
    return compiled("sm_90", "hopper backward main", {width}, None, dtype, Options(**options), length)
def of_packed(kernel, **options):
    options = packed(Options(0.1, **options))
    return compiled("sm_90", "hopper backward " + kernel, {width}, None, torch.bfloat16, options)
def shared():
    configs.heads_of_item = lambda problem, processors: min(2, problem.heads // problem.heads_kv)
    for options in (Options(0.1), packed(Options(0.1, window_right=0, softcap=3.0))):
        yield compiled("sm_90", "hopper backward main", {width}, None, torch.bfloat16, options, groups=8)
for found in (
    of_packed("order"), of_packed("main"), of_packed("main", window_left=9, window_right=5, softcap=3.0),
    kernel(256, scale=0.1), kernel(256, torch.float16, scale=0.1), kernel(256, scale=0.1, softcap=3.0),
    kernel(256, scale=0.1, window_left=9), kernel(256, scale=0.1, window_left=9, window_right=5, softcap=3.0),
    *shared(),
):
    said = resources(found, "sm_90")
    assert said.spills <= {450 if width == 128 else 300} and not said.warnings, said
assert kernel(256, scale=0.1, window_left=9) is kernel(1, scale=1.0, window_left=16)
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "0"}, check=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"window_left": 5, "softcap": 3.0, "n_kind": "per head", "return_lse": True}, None),
        ({"capability": (9, 0), "dtype": torch.float32}, "computes in float16 and bfloat16, not in float32"),
        ({"capability": (8, 0)}, "runs on compute capability 9.0"),
        ({"capability": (10, 0)}, "runs on compute capability 9.0"),
        ({"v_shape": (2, 8, 256, 128)}, "takes heads of 64, 128, 256 with E = Ev, got 64, 128"),
        (packed, None),
        (packed | {"k_stride": (512, 0, 1)}, "reads strides that are multiples of 16 bytes, and nothing expanded"),
        (packed | {"v_stride": (516, 64, 1)}, "reads strides that are multiples of 16 bytes, and nothing expanded"),
        (packed | {"alibi": True}, "no attn_mask, alibi_slopes or dropout"),
        ({"alibi": True}, "no attn_mask, alibi_slopes or dropout"),
        ({"k_stride": (0, 0, 64, 1)}, "reads strides that are multiples of 16 bytes, and nothing expanded"),
    ],
    ids=str,
)  # fmt: skip
def test_why_not(changes: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "tested", lambda: True)  # whatever the Triton here
    found = HopperKernels().why_not(gpu_call(**changes))
    assert (found is None) if reason is None else str(found).startswith(reason)


def test_private_names_of_gluon_are_in_one_file() -> None:
    """Those that another release of Triton may call otherwise: an attribute with an underscore, a renamed function."""
    for path in Path(configs.__file__).parent.glob("*.py"):
        found = re.findall(r"libtriton|_core\b|_semantic|\w\._[a-z]\w*|\.async_\w+|block_type", path.read_text())
        assert bool(found) == (path.name == "gluon_compat.py"), (path.name, found)


def test_another_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper.triton, "__version__", "3.9.0")
    assert HopperKernels().why_not(gpu_call()) == "was tested on Triton 3.6, found 3.9.0"
    assert BACKEND.serving(gpu_call()) == "portable"
