"""The small Hopper kernels: those before and after the backward, and the schedule of varlen tiles."""

from __future__ import annotations

import math
import random

import pytest
import torch

pytest.importorskip("triton")

from attn_n.backends.triton.hopper import configs
from attn_n.backends.triton.hopper.configs import BACKWARD, TILE_V, BackwardSpec
from tests.calls import boundaries
from tests.places import PLACES

# The tiles of queries, and those of keys, for whose sums the last kernel is used too; and heads that fill no tile.
TILES = [
    *sorted({(width, TILE_V[width], tile) for width, tiles in BACKWARD.items() for tile in tiles}),
    (80, 112, 64),
    (200, 40, 64),
]


def spec_of(size: int, size_v: int, tile_q: int) -> BackwardSpec:
    widths = configs.widths(size, size_v)
    assert widths is not None
    return BackwardSpec(widths, tile_q, tile_q, 1, 1, False)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(("size", "size_v", "tile_q"), TILES)
def test_the_passes_around_the_backward(size: int, size_v: int, tile_q: int, device: str) -> None:
    """With 150 queries a head, the first kernel fills whole tiles of rows, and the last one makes dq out of such."""
    from attn_n.backends.triton.hopper.backward_passes import postprocess_kernel, preprocess_kernel

    batch, heads, length, tiles = 2, 3, 150, -(-150 // tile_q)
    spec = spec_of(size, size_v, tile_q)
    padded = spec.widths.padded
    out, dout = (torch.randn(batch, heads, length, size_v, device=device).half() for _ in "od")
    lse, dlse = (torch.randn(batch, heads, length, device=device) for _ in "ld")
    log_n, programs = torch.randn(heads, device=device), batch * heads * tiles
    stats = torch.full((2 * programs * tile_q + 1,), math.nan, device=device)
    dq_sum, shares = stats.new_full((programs * tile_q, padded), math.nan), stats.new_full((programs,), math.nan)
    preprocess_kernel[(programs,)](
        out, dout, lse, dlse, stats, dq_sum, log_n, shares, None, None, out.stride(), dout.stride(), None, 1, heads,
        length, spec,
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

    exact = torch.randn(programs, tile_q, padded, device=device)
    dq = torch.full((batch, heads, length, size), math.nan, device=device).half()
    postprocess_kernel[(programs,)](
        as_accumulators_lie(exact), dq, None, None, None, dq.stride(), None, heads, length, 0.5, size, tile_q, spec
    )
    assert torch.equal(dq, (exact.view(batch, heads, -1, padded)[:, :, :length, :size] * 0.5).half())


def as_accumulators_lie(tiles: torch.Tensor) -> torch.Tensor:
    """Return rows `(tiles, rows, width)` in the order of wgmma accumulators, by blocks of 64 x 64 numbers."""
    # The rows and columns that each bit of an index stands for.
    bits = [(0, 1), (8, 0), (0, 2), (0, 4), (1, 0), (2, 0), (4, 0), (16, 0), (32, 0), (0, 8), (0, 16), (0, 32)]
    places = torch.arange(64 * 64)
    row, column = (sum(((places >> i) & 1) * bit[side] for i, bit in enumerate(bits)) for side in (0, 1))
    count, rows, width = tiles.shape
    blocks = tiles.view(count, rows // 64, 64, width // 64, 64).transpose(2, 3).reshape(-1, 64, 64)
    return blocks[:, row, column].contiguous()


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(("size", "size_v", "tile_q"), TILES)
def test_the_passes_of_varlen_sequences(size: int, size_v: int, tile_q: int, device: str) -> None:
    """Each sequence begins with a tile of its own, and NaN in other tiles reaches none of its rows."""
    from attn_n.backends.triton.hopper.backward_passes import postprocess_kernel, preprocess_kernel

    lengths, heads = [5, 0, 150, 64, 1, 0, 128, 70, 0], 3
    starts = boundaries(lengths, device)
    rows, batch = sum(lengths), len(lengths)
    spec, tiles = spec_of(size, size_v, tile_q), rows // tile_q + batch
    padded, strides, strides_q = spec.widths.padded, (0, size_v, heads * size_v, 1), (0, size, heads * size, 1)
    out, dout = (torch.randn(rows, heads, size_v, device=device).half() for _ in "od")
    lse, dlse = (torch.randn(rows, heads, device=device) for _ in "ld")
    out[5:155] = math.nan
    stats = torch.full((2 * heads * tiles * tile_q + 1,), math.nan, device=device)
    dq_sum, shares = stats.new_full((heads * tiles * tile_q, padded), math.nan), stats.new_full((heads * tiles,), 7.0)
    preprocess_kernel[(heads * tiles,)](
        out, dout, lse, dlse, stats, dq_sum, None, shares, starts, None, strides, strides, batch, None, heads,
        tiles * tile_q, spec,
    )  # fmt: skip
    exact = torch.randn(heads * tiles, tile_q, padded, device=device)
    dq = torch.full((rows, heads, size), math.nan, device=device).half()
    postprocess_kernel[(heads * tiles,)](
        as_accumulators_lie(exact), dq, starts, None, None, strides_q, batch, heads, tiles * tile_q, 0.5, size, tile_q,
        spec,
    )  # fmt: skip
    delta = (out.double() * dout.double()).sum(-1) - dlse
    lse_log2, minus_delta = stats[:-1].view(2, heads, tiles * tile_q).double()
    first, taken = 0, torch.zeros(tiles * tile_q, dtype=torch.bool, device=device)
    for b, length in enumerate(lengths):
        at = (first // tile_q + b) * tile_q
        here, there = slice(first, first + length), slice(at, at + length)
        assert torch.allclose(lse_log2[:, there], lse[here].T.double() / math.log(2), atol=1e-5)
        assert torch.allclose(minus_delta[:, there], -delta[here].T, atol=1e-3, equal_nan=True)
        expected = exact.view(heads, -1, padded)[:, there, :size] * 0.5
        assert torch.equal(dq[here], expected.half().transpose(0, 1))
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


@pytest.mark.parametrize("device", PLACES)
def test_the_passes_of_a_padded_batch(device: str) -> None:
    """Rows that do not exist may be NaN, and their part of the results is left as it is, but for dn, which is 0."""
    from attn_n.backends.triton.hopper.backward_passes import postprocess_kernel, preprocess_kernel

    used, leftpad, heads, length, width, tile = (150, 0, 64, 70), (0, 0, 3, 70), 2, 150, 64, 64
    batch, tiles, spec = len(used), 3, spec_of(width, width, tile)
    ends, firsts = (torch.tensor(x, dtype=torch.int32, device=device) for x in (used, leftpad))
    out, dout = (torch.randn(batch, heads, length, width, device=device).half() for _ in "od")
    lse, sinks = (torch.randn(batch, heads, length, device=device) for _ in "ls")
    exists = torch.arange(length, device=device) < ends[:, None, None]  # (batch, 1, length)
    for x in (out, dout):
        x.masked_fill_(~exists[..., None], math.nan)
    lse.masked_fill_(~exists, math.nan)
    programs = batch * heads * tiles
    stats = torch.full((2 * programs * tile + 1,), math.nan, device=device)
    dq_sum, dn = stats.new_full((batch, heads, tiles, tile, width), math.nan), torch.full_like(lse, math.nan)
    preprocess_kernel[(programs,)](
        out, dout, lse, None, stats, dq_sum, sinks, dn, None, ends, out.stride(), dout.stride(), None, None, heads,
        length, spec,
    )  # fmt: skip
    delta = (out.double() * dout.double()).sum(-1).where(exists, 0.0)
    lse_log2, minus_delta = stats[:-1].view(2, batch, heads, tiles * tile)[..., :length].double()
    assert torch.allclose(lse_log2, (lse.double() / math.log(2)).where(exists, math.inf), atol=1e-5)
    assert torch.allclose(minus_delta, -delta, atol=1e-3)
    assert torch.allclose(dn.double(), (-torch.exp(sinks.double() - lse) * delta).where(exists, 0.0), atol=1e-3)
    filled = torch.tensor([[first < end for first in (0, 64, 128)] for end in used], device=device)
    assert torch.equal(dq_sum.isfinite().all(-1).all(-1), filled[:, None].expand(batch, heads, tiles))

    log_n, shares = sinks[0, :, 0].contiguous(), stats.new_full((batch, heads, tiles), math.nan)
    preprocess_kernel[(programs,)](
        out, dout, lse, None, stats, dq_sum, log_n, shares, None, ends, out.stride(), dout.stride(), None, 1, heads,
        length, spec,
    )  # fmt: skip
    of_rows = (-torch.exp(log_n.double()[:, None] - lse) * delta).where(exists, 0.0)
    assert torch.allclose(shares.double().sum((0, 2)), of_rows.sum((0, 2)), rtol=1e-3, atol=1e-3)
    assert torch.equal(shares != 0, filled[:, None].expand(batch, heads, tiles))

    exact = torch.randn(programs, tile, width, device=device)
    dk = torch.full((batch, heads, length, width), -7.0, device=device).half()
    postprocess_kernel[(programs,)](
        as_accumulators_lie(exact), dk, None, ends, firsts, dk.stride(), None, heads, length, 0.5, width, tile, spec
    )
    for b, (end, first) in enumerate(zip(used, leftpad, strict=True)):
        rows = exact.view(batch, heads, -1, width)[b, :, : end - first] * 0.5
        assert torch.equal(dk[b, :, first:end], rows.half())
        assert bool((dk[b, :, :first] == -7).all())
        assert bool((dk[b, :, end:] == -7).all())


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("batch", [1, 5, 130, 1100])
def test_the_order_of_varlen_tiles(batch: int, device: str) -> None:
    """The schedule has each tile once, sequences with many keys first, within each 1,024 sequences."""
    from attn_n.backends.triton.hopper.schedule import HEADER, schedule_kernel

    pick, tile = random.Random(batch), 64
    lengths, keys = ([pick.choice([0, 1, 64, pick.randint(0, 300)]) for _ in range(batch)] for _ in "qk")
    most = sum(lengths) // tile + batch
    table = torch.full((HEADER.value + 2 * most,), -1, dtype=torch.int32, device=device)
    starts = [boundaries(x, device) for x in (lengths, keys)]
    programs = (-(-batch // 128),)
    schedule_kernel[programs](table, starts[0], None, None, starts[1], None, None, batch, None, None, tile)
    expected: list[tuple[int, int]] = []
    for group in range(0, batch, 1024):
        for b in sorted(range(group, min(group + 1024, batch)), key=lambda b: -keys[b]):
            expected += [(b, len(expected))] * -(-lengths[b] // tile)
    counter, tiles, *found = table.tolist()
    assert (counter, tiles) == (0, len(expected))
    assert found[: 2 * tiles] == [number for pair in expected for number in pair]
    assert found[2 * tiles :] == [-1] * 2 * (most - tiles)


@pytest.mark.parametrize("device", PLACES)
def test_the_order_of_tiles_of_a_padded_batch(device: str) -> None:
    """It is that of varlen sequences of the lengths in use; a length that nobody gave is that of all rows."""
    from attn_n.backends.triton.hopper.schedule import HEADER, schedule_kernel

    pick, tile, rows = random.Random(0), 64, 300
    used, first = ([pick.choice([0, 1, 64, rows, pick.randint(0, rows)]) for _ in range(130)] for _ in "qk")
    ends, leftpad = (torch.tensor(x, dtype=torch.int32, device=device) for x in (used, first))
    for of_queries, of_keys, lengths_q, lengths_k in (
        ((ends, None), (ends, leftpad), used, [max(a - b, 0) for a, b in zip(used, first, strict=True)]),
        ((None, None), (None, leftpad), [rows] * 130, [rows - x for x in first]),
    ):
        varlen, padded = (torch.full((HEADER.value + 2 * 130 * 5,), -1, dtype=torch.int32, device=device) for _ in "vp")
        starts = [boundaries(x, device) for x in (lengths_q, lengths_k)]
        schedule_kernel[(2,)](varlen, starts[0], None, None, starts[1], None, None, 130, None, None, tile)
        schedule_kernel[(2,)](padded, None, *of_queries, None, *of_keys, 130, rows, rows, tile)
        assert torch.equal(padded, varlen)
