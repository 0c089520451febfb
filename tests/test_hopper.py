"""The Hopper kernels on the table of cases at their widths, on odd and random shapes, and from run to run."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import attn_n
from attn_n import flash_attention_n, flash_attention_n_varlen
from attn_n.backends.triton.hopper import configs
from attn_n.backends.triton.hopper.configs import FORWARD, TILE_V, Config
from tests import compare
from tests.calls import boundaries
from tests.cases import CASES, HOPPER, Case, make, must_serve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="no GPU of compute capability 9.0")]

WIDTHS = (64, 128, 256)
TILES = ((64, 64), (128, 128), (192, 128), (256, 256))
# Heads that their tiles hold with zeros beside them.
SIZES = (*TILES, (40, 40), (96, 96), (80, 112), (56, 200), (160, 72), (192, 192))
HALF = (torch.bfloat16, torch.float16)


def of_size(case: Case, size: int, size_v: int) -> Case:
    return dataclasses.replace(case, size=size, size_v=size_v)


SERVED = [
    case
    for case in CASES
    if not case.features & {"mask", "alibi"} and case.layout != "transposed" and abs(case.shift) < 40
]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("size", "size_v"), [*TILES, (96, 80)])
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_cases(case: Case, size: int, size_v: int, dtype: torch.dtype, ran: list[str]) -> None:
    case = of_size(case, size, size_v)
    assert must_serve("triton:hopper", "cuda", dtype, case, lse_grad=True)
    inputs = make(case, dtype, "cuda")
    excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
    assert max(excess.values()) <= 1, excess
    assert set(ran) == {"forward triton:hopper", "backward triton:hopper"}


# Lengths around tiles of 128 and 192 queries and of 64 and 128 keys, and one longer than a round of all programs.
LENGTHS = [(1, 1), (63, 65), (128, 128), (129, 127), (192, 384), (193, 1000), (1000, 193), (777, 4500), (4500, 4400)]


@pytest.mark.parametrize(("size", "size_v"), TILES)
@pytest.mark.parametrize(("len_q", "len_k"), LENGTHS)
def test_lengths(len_q: int, len_k: int, size: int, size_v: int) -> None:
    case = Case("", batch=2, heads_q=4, heads_kv=2, len_q=len_q, len_k=len_k, size=size, size_v=size_v, n="per head")
    window = {"window": (len_k // 3, 40)}
    for changes in ({}, {"causal": True}, window, {"layout": "tokens first", "causal": True, "softcap": 3.0}):
        inputs = make(dataclasses.replace(case, **changes), torch.bfloat16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (changes, excess)


@pytest.fixture
def fresh_launches() -> Iterator[None]:
    """Forget prepared launches: calls with equal keys share one, and with it what a test has changed in `configs`."""
    from attn_n.backends.triton.hopper import call  # needs a tested release of Gluon

    call._calls.clear()
    yield
    call._calls.clear()


@pytest.mark.usefixtures("fresh_launches")
@pytest.mark.parametrize(("width", "row"), [(width, row) for width, rows in FORWARD.items() for row in rows], ids=str)
def test_every_row(width: int, row: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of the forward's table is right on short calls and on more work than runs at once."""
    monkeypatch.setattr(configs, "find", lambda key, tile: row)
    cases = (
        Case("", batch=1, heads_q=4, heads_kv=2, len_q=150, len_k=170, window=(90, 10), n="per head"),
        Case("", batch=2, heads_q=40, heads_kv=40, len_q=700, len_k=700, causal=True),
        Case("", batch=2, heads_q=40, heads_kv=8, len_q=333, len_k=720, softcap=5.0, layout="tokens first"),
        Case(
            "", batch=4, heads_q=4, heads_kv=2, len_q=700, len_k=720, causal=True, used_q=(700, 3, 0, 129),
            used_k=(650, 720, 1, 128),
        ),
    )  # fmt: skip
    for case in cases:
        inputs = make(of_size(case, width, TILE_V[width]), torch.bfloat16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (case, excess)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("width", "size_v"), TILES)
@pytest.mark.parametrize("causal", [False, True])
def test_growing_maxima(causal: bool, width: int, size_v: int, dtype: torch.dtype) -> None:
    """Logits rise by 0 to 200 towards the first keys, which are processed last, so that only some rows are rescaled."""
    case = Case("", batch=1, heads_q=2, heads_kv=2, len_q=1100, len_k=1500, size=width, size_v=size_v, causal=causal)
    inputs = make(case, dtype, "cuda")
    rises = torch.tensor([0.0, 2.0, 8.0, 40.0, 200.0], device="cuda")
    with torch.no_grad():
        inputs.q[..., 0] = rises[torch.arange(case.len_q, device="cuda") % 5] * width**0.5 / 16
        inputs.k[..., 0] = torch.linspace(16, 0, case.len_k, device="cuda")
    excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
    assert max(excess.values()) <= 1, excess


@pytest.mark.usefixtures("fresh_launches")
@pytest.mark.parametrize(("size", "size_v"), TILES)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_parts_of_a_kv_head(heads: int, size: int, size_v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dK and dV are right as sums over programs that take 1, 2 or 4 of 8 query heads each."""
    monkeypatch.setattr(configs, "heads_of_item", lambda key, tile, sm_count: heads)
    usual = Case("", batch=2, heads_q=16, heads_kv=2, len_q=333, len_k=420, n="per head")
    lengths = {"lengths_q": (0, 70, 0, 200, 9, 0), "lengths_k": (50, 0, 0, 333, 9, 0)}
    padded = {"used_q": (333, 70), "used_k": (300, 420), "leftpad": (0, 80)}
    cases = (
        {"layout": "tokens first"}, {"causal": True}, {"window": (60, 9)}, {"causal": True, "softcap": 3.0}, lengths,
        lengths | {"causal": True}, padded, padded | {"causal": True, "softcap": 3.0}, {"len_q": 1, "len_k": 1},
        {"len_q": 900, "len_k": 40},
    )  # fmt: skip
    for changes in cases:
        inputs = make(of_size(dataclasses.replace(usual, **changes), size, size_v), torch.bfloat16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (changes, excess)


def ragged(count: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Return lengths as real text has them: many short ones and a few long ones."""
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


@pytest.mark.parametrize(("size", "size_v"), TILES)
@pytest.mark.parametrize("packing", PACKINGS)
def test_packings(packing: str, size: int, size_v: int, ran: list[str]) -> None:
    queries, keys = PACKINGS[packing]
    many = sum(queries) > 10000
    case = Case(
        "", heads_q=4, heads_kv=2, lengths_q=queries, lengths_k=keys, size=size, size_v=size_v, n="per head",
    )  # fmt: skip
    for changes in ({"causal": True},) if many else ({}, {"causal": True}, {"window": (40, 9)}, {"softcap": 3.0}):
        inputs = make(dataclasses.replace(case, **changes), torch.bfloat16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (changes, excess)
    assert set(ran) == {"forward triton:hopper", "backward triton:hopper"}


# Around tiles of queries and keys, up to all of 333 queries and 420 keys, and none at all.
USED_Q, USED_K = (333, 0, 1, 64, 129, 192), (420, 5, 128, 65, 0, 193)
PADDINGS: dict[str, dict[str, tuple[int, ...]]] = {
    "right": {"used_q": (333, 0, 1, 64, 129, 192), "used_k": (333, 0, 1, 64, 129, 192)},
    "queries": {"used_q": USED_Q},
    "keys": {"used_k": USED_K},
    "left": {"leftpad": (0, 419, 420, 64, 127, 1)},
    "both sides": {"used_q": USED_Q, "used_k": USED_K, "leftpad": (70, 9, 64, 0, 0, 1)},
    "nothing": {"used_q": (0,) * 6, "used_k": (0,) * 6},
}


@pytest.mark.parametrize(("size", "size_v"), [*TILES, (96, 80)])
@pytest.mark.parametrize("padding", PADDINGS)
def test_padded_batches(padding: str, size: int, size_v: int, ran: list[str]) -> None:
    """What does not exist is NaN in q, k, v and dout, and so is the memory that results get."""
    usual = Case("", batch=6, heads_q=4, heads_kv=2, len_q=333, len_k=420, size=size, size_v=size_v, n="per head")
    for changes in (
        {}, {"causal": True, "n": "sinks a row"}, {"window": (40, 9), "layout": "tokens first"},
        {"causal": True, "softcap": 3.0, "n": 0.0}, {"window": (60, None), "layout": "one storage", "n": 1.0},
    ):  # fmt: skip
        for dtype in HALF:
            inputs = make(dataclasses.replace(usual, **changes, **PADDINGS[padding]), dtype, "cuda")
            left = [torch.full_like(x, math.nan) for x in (inputs.q, inputs.k, inputs.v) for _ in range(8)]
            del left
            excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
            assert max(excess.values()) <= 1, (changes, dtype, excess)
    assert set(ran) == {"forward triton:hopper", "backward triton:hopper"}


def in_layout(layout: str, x: torch.Tensor) -> torch.Tensor:
    """Return x `(B, H, L, E)` in another layout."""
    batch, heads, rows, width = x.shape
    if layout == "rows outermost":
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if layout == "batches no whole rows apart":
        apart = x.new_full((batch, heads, rows * width + 8), math.nan)
        return apart[..., : rows * width].copy_(x.flatten(2)).unflatten(2, (rows, width))
    if layout == "expanded over the batch":
        return x[:1].expand(x.shape)
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "layout", ["rows outermost", "batches no whole rows apart", "expanded over the batch", "heads between"]
)
def test_layouts_of_a_padded_batch(layout: str, width: int, ran: list[str]) -> None:
    used = torch.tensor([300, 17, 128], dtype=torch.int32, device="cuda")
    lengths = {"seqused_q": used, "seqused_k": used, "leftpad_k": torch.tensor([0, 3, 70], dtype=torch.int32).cuda()}
    there = [in_layout(layout, torch.randn(3, 2, 300, width, device="cuda", dtype=torch.bfloat16)) for _ in range(4)]
    found = []
    for given in (there, [x.contiguous() for x in there]):
        q, k, v, dout = given
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attention_n(*inputs, True, sm_n=1.0, backend="triton:hopper", **lengths)
        found.append((*torch.autograd.grad(out, inputs, dout), out.detach()))
    (dq, *same), (other_dq, *others) = found
    assert all(torch.equal(a, b) for a, b in zip(same, others, strict=True))
    assert torch.allclose(dq, other_dq, rtol=2e-2, atol=1e-2)
    assert ran == ["forward triton:hopper", "backward triton:hopper"] * 2


@pytest.mark.parametrize("width", WIDTHS)
def test_a_graph_is_replayed_with_other_lengths(width: int) -> None:
    """Nothing of the lengths is read on the host."""
    q, k, v = (torch.randn(4, 2, 500, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    used, dout = torch.tensor([500, 3, 0, 200], dtype=torch.int32, device="cuda"), torch.randn_like(q)

    def step() -> tuple[torch.Tensor, ...]:
        lengths = {"seqused_q": used, "seqused_k": used}
        out = flash_attention_n(q, k, v, True, sm_n=1.0, backend="triton:hopper", **lengths)
        return (*torch.autograd.grad(out, (q, k, v), dout), out.detach())

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for other in ([500, 3, 0, 200], [1, 500, 499, 0], [0, 0, 0, 0], [64, 128, 192, 256]):
        used.copy_(torch.tensor(other))
        graph.replay()
        (dq, *same), (other_dq, *others) = found, step()
        assert all(torch.equal(a, b) for a, b in zip(same, others, strict=True)), other
        assert torch.allclose(dq, other_dq, rtol=2e-2, atol=1e-2), other


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_neighbours_see_nothing_of_each_other(width: int, causal: bool) -> None:
    """A sequence of NaN leaves the others as they are, bit for bit; so do rows of NaN beyond all sequences."""
    lengths = [100, 77, 64, 5, 300, 128]
    starts, rows = boundaries(lengths, "cuda"), sum(lengths)
    whole = [torch.randn(rows + 200, 4, width, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

    def results(poisoned: slice) -> list[torch.Tensor]:
        given = [x.clone() for x in whole]
        for x in given:
            x[poisoned] = math.nan
        q, k, v, dout = (x[:rows] for x in given)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        left = [
            torch.full_like(q, math.nan) for _ in range(8)
        ]  # the next allocations get this memory, and have to overwrite it
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
            if name != "dq":  # its sum over tiles of keys is in no fixed order
                assert torch.equal(found[:begin], expected[:begin]), name
                assert torch.equal(found[end:], expected[end:]), name
            else:
                assert torch.allclose(found[:begin], expected[:begin], rtol=2e-2, atol=1e-2)
                assert torch.allclose(found[end:], expected[end:], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("width", WIDTHS)
def test_varlen_slices(width: int) -> None:
    """q, k and v may be slices of one tensor, where rows are far apart, and the boundaries may be a slice too."""
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


def varlen_at_random(pick: random.Random, case: Case, most: int, longest: int) -> Case:
    """Return the case as varlen: up to `most` sequences more, some of them empty."""
    count = pick.randint(1, most)
    lengths_q, lengths_k = (tuple(pick.choice([0, 1, pick.randint(1, longest)]) for _ in range(count)) for _ in "qk")
    varlen = {"lengths_q": (*lengths_q, case.len_q), "lengths_k": (*lengths_k, case.len_k), "layout": "heads first"}
    return dataclasses.replace(case, **varlen)


def padded_at_random(pick: random.Random, case: Case) -> Case:
    """Return the case with some of the three lengths."""
    most = {"used_q": case.len_q, "used_k": case.len_k, "leftpad": case.len_k}
    lengths = {
        name: tuple(pick.choice([0, 1, pick.randint(0, most[name])]) for _ in range(case.batch))
        for name in pick.sample(list(most), pick.randint(1, 3))
    }
    # NaN beyond the end of one batch would be in all of them.
    return dataclasses.replace(case, **lengths, layout="tokens first" if "expanded" in case.layout else case.layout)


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    """Ten random shapes of every kind of call are right; compiling each kind takes most of the time."""
    pick = random.Random(seed)
    for _ in range(10):
        heads_kv, len_q, len_k = pick.randint(1, 3), pick.randint(1, 700), pick.randint(1, 700)
        window = pick.choice(
            [None, (pick.randint(0, 300), pick.randint(0, 300)), (None, 9), (pick.randint(0, 90), None)]
        )
        size, size_v = pick.choice(SIZES)
        case = Case(
            "", batch=pick.randint(1, 3), heads_q=heads_kv * pick.choice([1, 2, 5]), heads_kv=heads_kv, len_q=len_q,
            len_k=len_k, size=size, size_v=size_v, causal=pick.random() < 0.4, window=window,
            softcap=pick.choice([None, None, 5.0]), n=pick.choice([0.0, 1.0, 3.7, "per head"]),
            layout=pick.choice(["heads first", "tokens first", "expanded over the batch"]),
        )  # fmt: skip
        if pick.random() < 0.3:
            case = varlen_at_random(pick, case, 12, 500)
        elif pick.random() < 0.5:
            case = padded_at_random(pick, case)
        inputs = make(case, pick.choice(HALF), "cuda", seed)
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (case, excess)


@pytest.mark.parametrize("part", range(10))
def test_a_thousand_shapes(part: int) -> None:
    """A thousand random shapes of a few kinds of calls are right; few kinds, so that little is compiled."""
    for seed in range(100 * part, 100 * part + 100):
        pick = random.Random(10_000 + seed)
        kind = pick.choice(["full", "causal", "window", "varlen", "padded"])
        heads_kv, (size, size_v) = pick.randint(1, 4), pick.choice(TILES)
        case = Case(
            "", batch=pick.randint(1, 4), heads_q=2 * heads_kv, heads_kv=heads_kv, len_q=pick.randint(1, 1800),
            len_k=pick.randint(1, 2200), size=size, size_v=size_v, n="per head",
            causal=kind in ("causal", "varlen", "padded"), window=(90, 20) if kind == "window" else None,
        )  # fmt: skip
        if kind == "varlen":
            case = varlen_at_random(pick, case, 14, 600)
        if kind == "padded":
            case = padded_at_random(pick, case)
        inputs = make(case, torch.bfloat16, "cuda", seed)
        excess = compare.excess(inputs, compare.library(inputs, "triton:hopper"))
        assert max(excess.values()) <= 1, (case, excess)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_a_hundred_times(width: int, causal: bool) -> None:
    """All results but dq, which is summed up in no fixed order, are the same from run to run."""
    q, k, v = (torch.randn(2, 4, 1500, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    dout, first = torch.randn_like(q), None
    for _ in range(100):
        out, lse = flash_attention_n(q, k, v, causal, sm_n=1.0, return_lse=True, backend="triton:hopper")
        _dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        found = (out, lse, dk, dv)
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


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


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "layout", ["sum", "over heads", "rows apart", "columns apart", "odd rows", "odd beginning", "one head"]
)
def test_gradients_of_out_in_any_layout(layout: str, width: int, ran: list[str]) -> None:
    shape = (1, 1, 300, width) if layout == "one head" else (2, 3, 300, width)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    dout = {
        "sum": lambda: torch.ones((), device="cuda", dtype=torch.bfloat16).expand(q.shape),
        "over heads": lambda: torch.randn_like(q[:, :1]).expand(q.shape),
        "rows apart": lambda: torch.randn(300, 2, 3, 2 * width).cuda().bfloat16()[..., :width].permute(1, 2, 0, 3),
        "columns apart": lambda: torch.randn_like(q.mT.contiguous()).mT,
        "odd rows": lambda: torch.randn(2, 3, 300, width + 3).cuda().bfloat16()[..., :width],
        "odd beginning": lambda: torch.randn(1 + q.numel()).cuda().bfloat16()[1:].view(q.shape),
        # Contiguous for PyTorch, whatever the strides of dimensions of size 1.
        "one head": lambda: torch.randn(q.numel()).cuda().bfloat16().as_strided(q.shape, (3, 5, width, 1)),
    }[layout]()
    found = []
    for given in (dout, dout.clone(memory_format=torch.contiguous_format)):
        out = flash_attention_n(q, k, v, True, sm_n=1.0, backend="triton:hopper")
        found.append(torch.autograd.grad(out, (q, k, v), given))
    (dq, *same), (other_dq, *others) = found
    assert all(torch.equal(a, b) for a, b in zip(same, others, strict=True))
    assert torch.allclose(dq, other_dq, rtol=2e-2, atol=1e-2)
    assert ran == ["forward triton:hopper", "backward triton:hopper"] * 2


def test_what_tma_cannot_address(ran: list[str]) -> None:
    """The portable kernels serve unaligned tensors, and strides that TMA cannot have are refused."""
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
