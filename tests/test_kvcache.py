"""Attention over KV caches, contiguous and paged, against float64 on each sequence alone."""

from __future__ import annotations

import runpy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import attn_n
from attn_n import flash_attention_n_with_kvcache
from attn_n.backends import registry
from attn_n.call import checks
from attn_n.dispatch import call_cache
from tests.cases import INTERPRETED
from tests.oracle import attention_n
from tests.places import PLACES

# Other backends get a copy of the cache, and are those of padded batches then.
BACKENDS = [None, "reference", "triton:decode"]


@dataclass(frozen=True)
class Case:
    """A call; the caches hold NaN wherever nobody may look."""

    name: str
    lengths: tuple[int, ...] | int | None = (5, 0, 11, 12)  # in the cache before the new ones
    most: int = 16
    queries: int = 1
    new: int = 1
    block: int = 0  # of a paged cache; 0 is contiguous
    rows: tuple[int, ...] = ()  # cache_batch_idx
    leftpad: tuple[int, ...] = ()
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi: bool = False
    n: str = "number"  # "number", "zero", "sinks" or "sinks a row"
    rotary: str = ""  # "interleaved" or "halves", of 6 of the 8 columns
    tokens_first: bool = False
    splits: int = 0
    shared: bool = False  # sequences 2 and 3 share their first block
    size: int = 8

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one query"),
    Case("only read", new=0),
    Case("a full cache", lengths=None, new=0, queries=3),
    Case("one length for all", lengths=6, queries=2, new=2),
    Case("several queries, sinks", queries=3, new=3, n="sinks", lengths=(5, 0, 11, 13)),
    Case("more queries than new keys", queries=4, new=1, n="sinks a row"),
    Case("not causal", queries=3, new=3, causal=False),
    Case("window", queries=3, new=3, window=(3, 0)),
    Case("softcap, ALiBi", queries=2, new=2, softcap=2.0, alibi=True),
    Case("left padding", queries=2, new=2, leftpad=(2, 0, 11, 14)),
    Case("rows of a larger cache", rows=(5, 0, 3, 1), tokens_first=True),
    Case("tokens first", tokens_first=True, queries=2, new=2),
    Case("paged", block=4, queries=2, new=2),
    Case("paged, a shared block", block=4, shared=True, lengths=(5, 0, 9, 12), n="sinks"),
    Case("paged, window, padded left", block=8, tokens_first=True, window=(4, None), leftpad=(0, 0, 3, 9)),
    Case("rotary", rotary="interleaved", queries=3, new=3),
    Case("rotary, halves, paged", rotary="halves", block=4, queries=2, new=2),
    Case("split keys", most=208, lengths=(150, 0, 70, 207), splits=3, n="sinks"),
    Case("split keys, paged", most=208, lengths=(150, 0, 70, 207), splits=2, block=16, window=(100, None)),
    Case("split keys, large blocks", most=384, lengths=(250, 0, 70, 307), splits=3, block=128, queries=3, new=3),
    Case("rotary, not causal", rotary="halves", causal=False, queries=2, new=2),
    Case("n = 0", n="zero"),
    Case("n = 0, split keys, paged", most=208, lengths=(150, 0, 70, 207), splits=3, block=16, n="zero"),
    Case("rotary, unbounded window", rotary="halves", causal=False, window=(None, None), queries=2, new=2),
]  # fmt: skip


@dataclass
class Call:
    """The tensors of a case, and of each sequence the keys and values that it has in the end."""

    case: Case
    q: Tensor
    caches: list[Tensor]
    new: list[Tensor]
    keywords: dict[str, Any]
    sequences: list[tuple[Tensor, Tensor, Tensor]]  # q, k, v in float64, turned

    def run(self, backend: str | None) -> tuple[Tensor, Tensor]:
        new = self.new if self.case.new else (None, None)
        out, lse = flash_attention_n_with_kvcache(
            self.q, *self.caches, *new, **self.keywords, return_lse=True, backend=backend
        )
        return out, lse

    def exact(self) -> tuple[Tensor, Tensor]:
        case, outs, lses = self.case, [], []
        given = self.keywords
        sinks, slopes = (None if x is None else x.cpu() for x in (given.get("sinks"), given.get("alibi_slopes")))
        for b, (q, k, v) in enumerate(self.sequences):
            begin = case.leftpad[b] if case.leftpad else 0
            mine = None if sinks is None else sinks[b : b + 1].double() if sinks.dim() > 1 else sinks.double()
            empty = begin >= k.shape[1]
            k, v = (x[:, -1:] * 0 if empty else x[:, begin:] for x in (k, v))
            hidden = torch.zeros(1, 1, dtype=torch.bool) if empty else None
            out, lse = attention_n(
                q[None], k[None], v[None], given.get("sm_n", 0.0), mine, case.causal and not empty,
                mask=hidden, window=None if empty else case.window, softcap=case.softcap,
                alibi_slopes=slopes,
            )  # fmt: skip
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)


def make(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        return x.to(dtype)

    batch, heads, heads_kv, width = 4, 4, 2, case.size
    q, new = normal(batch, heads, case.queries, width), [normal(batch, heads_kv, case.new, width) for _ in "kv"]
    q[..., 0], new[0][..., 0] = -2.0, 3.0  # negative logits, so that n matters
    past = [normal(batch, heads_kv, case.most, width) for _ in "kv"]
    past[0][..., 0] = 3.0
    lengths = (case.most,) * batch if case.lengths is None else case.lengths
    lengths = (lengths,) * batch if isinstance(lengths, int) else lengths
    if case.shared:
        for x in past:
            x[3, :, : case.block] = x[2, :, : case.block]

    keywords: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    if case.splits:
        keywords["num_splits"] = case.splits
    if case.n in ("number", "zero"):
        keywords["sm_n"] = 1.5 if case.n == "number" else 0.0
    elif case.n == "sinks":
        keywords["sinks"] = torch.tensor([0.0, -2.0, 3.0, 20.0])
    else:
        keywords["sinks"] = 2 * torch.randn(batch, heads, case.queries, generator=generator)
    if case.alibi:
        keywords["alibi_slopes"] = torch.linspace(0.1, 0.7, heads)
    if case.lengths is not None:
        one = isinstance(case.lengths, int)
        keywords["cache_seqlens"] = case.lengths if one else torch.tensor(case.lengths, dtype=torch.int32)
    if case.leftpad:
        keywords["cache_leftpad"] = torch.tensor(case.leftpad, dtype=torch.int32)
    angles = torch.randn(case.most, 3, generator=generator)
    if case.rotary:
        keywords |= {
            "rotary_cos": angles.cos(),
            "rotary_sin": angles.sin(),
            "rotary_interleaved": case.rotary == "interleaved",
        }

    sequences = []
    for b, length in enumerate(lengths):
        k, v = (torch.cat([x[b, :, :length], y[b]], 1).double() for x, y in zip(past, new, strict=True))
        one_q = q[b].double()
        if case.rotary:
            bounded = case.causal or case.window not in (None, (None, None))
            at = range(length, length + case.queries) if bounded else [length] * case.queries
            one_q = turned(one_q, angles.double()[list(at)], case.rotary)
            k[:, length:] = turned(k[:, length:], angles.double()[length : length + case.new], case.rotary)
        sequences.append((one_q, k, v))

    caches = []
    for x in past:
        for b, length in enumerate(lengths):
            x[b, :, length:] = torch.nan
            if case.leftpad:
                x[b, :, : case.leftpad[b]] = torch.nan
        if case.block:
            cache, table = paged(x, case, lengths, generator)
            keywords["block_table"] = table
            generator.manual_seed(3)
        elif case.rows:
            cache = torch.full((6, *x.shape[1:]), torch.nan, dtype=dtype)
            cache[list(case.rows)] = x
            keywords["cache_batch_idx"] = torch.tensor(case.rows, dtype=torch.int32)
        else:
            cache = x
        caches.append(cache.transpose(1, 2).contiguous().transpose(1, 2) if case.tokens_first else cache)
    keywords = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in keywords.items()}
    moved = [[x.to(device) for x in group] for group in ([q], caches, new)]
    return Call(case, moved[0][0], moved[1], moved[2], keywords, sequences)


def paged(x: Tensor, case: Case, lengths: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lay a cache out in blocks of random order; of the table what lies beyond a sequence is -1."""
    most = case.most // case.block
    blocks = max(60, 4 * most)
    order = torch.randperm(blocks, generator=generator.manual_seed(7))[: 4 * most].reshape(4, most)
    if case.shared:
        order[3, 0] = order[2, 0]
    cache = torch.full((blocks, x.shape[1], case.block, x.shape[3]), torch.nan, dtype=x.dtype)
    table = torch.full((4, most), -1, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for i in range(-(-(length + case.new) // case.block)):
            table[b, i] = order[b, i]
            cache[order[b, i]] = x[b, :, i * case.block : (i + 1) * case.block]
    return cache, table


def turned(x: Tensor, angles: Tensor, kind: str) -> Tensor:
    """Turn the first six columns as complex numbers."""
    pairs = angles.shape[1]
    parts = x[..., : 2 * pairs]
    a, b = (parts[..., ::2], parts[..., 1::2]) if kind == "interleaved" else parts.split(pairs, -1)
    z = torch.complex(a.contiguous(), b.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    both = torch.view_as_real(z)
    return torch.cat([both.flatten(-2) if kind == "interleaved" else both.mT.flatten(-2), x[..., 2 * pairs :]], -1)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str | None, case: Case, device: str) -> None:
    call = make(case, device=device)
    before = [x.clone() for x in call.caches]
    out, lse = call.run(backend)
    truth, truth_lse = call.exact()
    assert torch.allclose(out.double().cpu(), truth, atol=1e-5)
    assert torch.allclose(lse.double().cpu(), truth_lse, atol=1e-5)
    for cache, old in zip(call.caches, before, strict=True):
        changed = ~((cache == old) | (cache.isnan() & old.isnan())).all(-1)
        assert int(changed.sum()) == 4 * 2 * case.new  # no row but the new ones
    out_again, _ = replace_new_by_reading(call).run(backend)
    if not case.rotary:
        assert torch.allclose(out_again, out, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="names what runs under the interpreter")
def test_who_reads_a_cache_in_place(ran: list[str]) -> None:
    """`triton` has its own kernels for it; other backends get a copy in the order of the sequences."""
    for case in (CASES[0], CASES[12]):
        for backend in ("triton", "triton:portable", "sdpa"):
            call = make(case)
            out, _ = call.run(backend)
            assert torch.allclose(out.double(), call.exact()[0], atol=1e-5)
    portable = ["forward triton:portable", "forward sdpa:cpu"]
    assert ran == ["forward triton:portable", *portable, "forward triton:decode", *portable]


def replace_new_by_reading(call: Call) -> Call:
    """Return the call that only reads the cache into which the first one has written."""
    keywords = {name: x for name, x in call.keywords.items() if not name.startswith("rotary")}
    if call.case.lengths is not None:
        keywords["cache_seqlens"] = call.keywords["cache_seqlens"] + call.case.new
    return Call(replace(call.case, new=0), call.q, call.caches, [], keywords, call.sequences)


@pytest.fixture
def known_backends() -> None:
    """Load all backends: each one that is loaded changes the keys."""
    for name in registry.names():
        registry.find(name)


@pytest.mark.usefixtures("known_backends")
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[10], CASES[12], CASES[16]], ids=str)
def test_a_known_call_reads_its_own_cache(case: Case) -> None:
    """A known call keeps metadata alone: it reads the lengths, tables and contents that it is given."""
    moved = bool(case.block or case.rows)
    backend = "triton:decode" if INTERPRETED and moved else None
    for lengths in ((5, 0, 11, 12), (3, 7, 9, 2)):
        call = make(replace(case, lengths=lengths))
        if case.block:
            call.keywords["block_table"] = call.keywords["block_table"].flip(0).contiguous()
            call.keywords["cache_seqlens"] = call.keywords["cache_seqlens"].flip(0).contiguous()
            call.q, call.new = call.q.flip(0).contiguous(), [x.flip(0).contiguous() for x in call.new]
            call.sequences.reverse()
        out, _ = call.run(backend)
        assert torch.allclose(out.double(), call.exact()[0], atol=1e-5)
        assert len(call_cache.over_cache) == (0 if backend is None and moved else 1)
    if not moved:
        call.keywords["cache_seqlens"][2] = 16 - case.new + 1
        with pytest.raises(ValueError, match="cache_seqlens: expected numbers from 0 to"):
            call.run(backend)


@pytest.mark.usefixtures("known_backends")
def test_calls_that_differ_in_their_cache_alone() -> None:
    """Whatever is passed beside q and the caches is part of the key."""
    cases = [replace(CASES[1], queries=2, new=new, leftpad=pad) for new in (1, 2, 0) for pad in ((), (2, 0, 3, 4))]
    cases += [replace(CASES[15], queries=2, new=2, rotary=kind) for kind in ("interleaved", "halves")]
    for case in cases:
        call = make(case)
        assert torch.allclose(call.run(None)[0].double(), call.exact()[0], atol=1e-5)
    assert len(call_cache.over_cache) == len(cases)


@pytest.mark.skipif(not INTERPRETED, reason="reads by a kernel under the interpreter")
def test_lengths_and_tables_in_any_strides() -> None:
    for case in (CASES[9], CASES[10], CASES[12]):
        call = make(case)
        for name in ("cache_seqlens", "cache_leftpad", "cache_batch_idx", "block_table"):
            x = call.keywords.get(name)
            if x is not None:
                call.keywords[name] = torch.stack((x, x + 1), -1)[..., 0]
        out, _ = call.run("triton:decode")
        assert torch.allclose(out.double(), call.exact()[0], atol=1e-5)
        assert not call_cache.over_cache  # the next one may have other strides


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("case", [CASES[4], CASES[12], CASES[19]], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float64, 1e-5)])
def test_dtypes(dtype: torch.dtype, tolerance: float, case: Case, device: str) -> None:
    call = make(case, dtype, device)
    out, lse = call.run(None)
    truth, truth_lse = call.exact()
    assert out.dtype == dtype
    assert torch.allclose(out.double().cpu(), truth, atol=tolerance)
    assert torch.allclose(lse.double().cpu(), truth_lse, atol=tolerance)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("paging", [0, 4])
def test_float8_caches(paging: int, device: str) -> None:
    """New rows are divided by their factors, and the cache is multiplied by them."""
    call = make(replace(CASES[0], block=paging, queries=2, new=2), device=device)
    factors = [torch.tensor([[0.5, 0.02]] * 4), torch.tensor([[0.3, 0.1]] * 4)]
    for i, x in enumerate(call.caches):
        call.caches[i] = x.clamp(-4, 4).to(torch.float8_e4m3fn)
    new = [
        (x.cpu() / y[:, :, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float() * y[:, :, None, None]
        for x, y in zip(call.new, factors, strict=True)
    ]
    sequences = []
    for b, (q, k, v) in enumerate(call.sequences):
        old = [x[:, :-2].clamp(-4, 4).to(torch.float8_e4m3fn).double() for x in (k, v)]
        parts = [
            torch.cat([x * y[b][:, None, None], z[b].double()], 1) for x, y, z in zip(old, factors, new, strict=True)
        ]
        sequences.append((q, *parts))
    call.sequences = sequences
    call.keywords |= {"k_descale": factors[0].to(device), "v_descale": factors[1].to(device)}
    out, lse = call.run(None)
    truth, truth_lse = call.exact()
    assert torch.allclose(out.double().cpu(), truth, atol=1e-5)
    assert torch.allclose(lse.double().cpu(), truth_lse, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[12]], ids=str)
def test_a_compiled_decoding_step_has_one_graph_for_all_lengths(case: Case) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(flash_attention_n_with_kvcache, fullgraph=True, backend=counter)
    for lengths in ((5, 0, 11, 12), (3, 7, 9, 2)):
        call = make(replace(case, lengths=lengths))
        out = step(call.q, *call.caches, *call.new, **call.keywords)
        assert torch.allclose(out.double(), call.exact()[0], atol=1e-5)
    assert counter.frame_count == 1


def replayed(case: Case, backend: str | None) -> None:
    """Capture a call in a CUDA graph, and replay it with other lengths, tables and contents."""
    first, second = (make(replace(case, lengths=x), torch.bfloat16, "cuda") for x in ((5, 0, 11, 12), (3, 7, 9, 2)))
    first.run(backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = first.run(backend)
    for name, x in second.keywords.items():
        if isinstance(x, Tensor):
            first.keywords[name].copy_(x)
    for mine, theirs in zip((first.q, *first.caches, *first.new), (second.q, *second.caches, *second.new), strict=True):
        mine.copy_(theirs)
    graph.replay()
    assert torch.allclose(out.double().cpu(), second.exact()[0], atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[12], CASES[16]], ids=str)
def test_a_cuda_graph_is_replayed_with_other_lengths_and_tables(case: Case) -> None:
    replayed(case, None)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


CACHE = torch.zeros(2, 2, 8, 4)
PAGES = torch.zeros(5, 2, 4, 4)
NEW = torch.zeros(2, 2, 1, 4)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"k_cache": CACHE[0]}, ValueError, r"k_cache: expected 4 dimensions \(B, Hkv, Smax, E\) or, paged"),
        ({"k_cache": CACHE.double()}, TypeError, "k_cache: expected float32 as q, or float8_e4m3fn, got float64"),
        ({"v_cache": CACHE.to(torch.float8_e4m3fn)}, TypeError, "v_cache: expected the dtype of k_cache, float32"),
        ({"k_cache": CACHE[..., :3], "v_cache": CACHE}, ValueError, "k_cache: expected the head size of q, 4, got 3"),
        ({"q": torch.zeros(2, 3, 1, 4)}, ValueError, "k_cache: expected a number of heads that divides the 3 heads of"),
        ({"k_cache": CACHE.clone().requires_grad_()}, ValueError, "k_cache: expected no gradient.*no_grad"),
        ({"v_cache": CACHE.clone().requires_grad_()}, ValueError, "v_cache: expected no gradient.*seqused_k to train"),
        ({"k": NEW.double(), "v": NEW, "cache_seqlens": 0}, TypeError, "k: expected the dtype of q, float32, got fl"),
        ({"v_cache": CACHE[:, :1]}, ValueError, r"v_cache: expected the shape of k_cache but for the head size, \(2, "),
        ({"k_cache": CACHE[:1], "v_cache": CACHE[:1]}, ValueError, "k_cache: expected as many rows as q, 2, or cache_"),
        ({"q": torch.zeros(2, 4, 1, 4, requires_grad=True)}, ValueError, "q: expected no gradient.*no_grad"),
        ({"k": NEW}, ValueError, "v: expected new keys and values together, or neither, got None"),
        ({"k": NEW, "v": NEW}, ValueError, "cache_seqlens: expected where the new k and v go, .* got None"),
        ({"k": NEW[:1], "v": NEW, "cache_seqlens": 0}, ValueError, r"k: expected shape \(2, 2, new keys, 4\), got \(1"),
        ({"k": NEW, "v": NEW, "cache_seqlens": 8}, ValueError, "from 0 to 7, the 8 keys of the cache less the 1 new"),
        ({"k": NEW, "v": NEW, "cache_seqlens": int32(8, 0)}, ValueError, r"cache_seqlens: expected .* got \[8, 0\]"),
        ({"cache_seqlens": int32(9, 0)}, ValueError, r"from 0 to 8, the 8 keys of the cache, got \[9, 0\]"),
        ({"cache_seqlens": torch.tensor([1, 2])}, TypeError, "cache_seqlens: expected int32, got int64"),
        ({"cache_batch_idx": int32(0, 2)}, ValueError, r"cache_batch_idx: expected numbers from 0 to 1, a row"),
        ({"cache_leftpad": int32(0, 9)}, ValueError, r"cache_leftpad: expected numbers from 0 to 8"),
        (
            {"k_cache": PAGES, "v_cache": PAGES, "block_table": int32(0, 1)},
            ValueError,
            r"block_table: expected shape \(2, blocks\), got \(2,\)",
        ),
        (
            {"k_cache": PAGES, "v_cache": PAGES, "block_table": int32(0, 5, 1, -1).view(2, 2), "cache_seqlens": 5},
            ValueError,
            r"block_table: expected entries from 0 to 4 for the 5 keys of sequence 0, got \[0, 5\]",
        ),
        ({"block_table": int32(0, 1).view(2, 1), "cache_batch_idx": int32(0, 1)}, ValueError, "cache_batch_idx: exp"),
        ({"rotary_cos": torch.zeros(8, 2)}, ValueError, "rotary_sin: expected both tables, or neither, got None"),
        ({"rotary_cos": torch.zeros(8, 2), "rotary_sin": torch.zeros(8, 2)}, ValueError, "rotary_cos: expected new ke"),
        (
            {
                "k": NEW, "v": NEW, "cache_seqlens": 0, "rotary_cos": torch.zeros(7, 2),
                "rotary_sin": torch.zeros(7, 2),
            },
            ValueError,
            r"rotary_cos: expected shape \(positions, pairs\) with at least 8 positions and at most 2 pairs, got \(7,",
        ),
        ({"k_descale": torch.ones(2, 2)}, ValueError, "k_descale: expected None beside a cache in float32"),
        ({"num_splits": -1}, ValueError, "num_splits: expected an integer >= 0, got -1"),
    ],
)  # fmt: skip
def test_errors(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"q": torch.zeros(2, 4, 1, 4), "k_cache": CACHE, "v_cache": CACHE} | changes
    with pytest.raises(error, match=text):
        flash_attention_n_with_kvcache(**given)


def test_what_is_read_of_a_gpu_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ATTN_N_CHECK=1` is looked at once, when the module is executed."""
    for value in ("1", "0"):
        monkeypatch.setenv("ATTN_N_CHECK", value)
        assert runpy.run_path(checks.__file__)["READ_ALL"] == (value == "1")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "value", "paged", "text"),
    [
        ("cache_seqlens", int32(5, 0, 16, 12), 0, r"cache_seqlens: expected .* got \[5, 0, 16, 12\]"),
        ("cache_leftpad", int32(0, 0, 17, 0), 0, "cache_leftpad: expected numbers from 0 to 16"),
        ("cache_batch_idx", int32(0, 1, 2, 4), 0, "cache_batch_idx: expected numbers from 0 to 3, a row of the cache"),
        ("block_table", torch.full((4, 4), 60, dtype=torch.int32), 4, "block_table: expected entries from 0 to 59"),
        ("sinks", torch.tensor([0.0, torch.nan, 0.0, 0.0]), 0, "sinks: "),
    ],
)
def test_values_on_a_gpu_are_checked_when_asked_for(
    name: str, value: Tensor, paged: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first call of its kind, and in one that is known."""
    call = make(replace(CASES[0], block=paged, n="sinks"), torch.bfloat16, "cuda")
    bad = call.keywords | {name: value.cuda()}
    good = call.keywords | {name: call.keywords.get(name, torch.zeros_like(bad[name]))}
    monkeypatch.setattr(checks, "READ_ALL", True)
    for keywords in (bad, good, bad):
        if keywords is good:
            flash_attention_n_with_kvcache(call.q, *call.caches, *call.new, **good)
        else:
            with pytest.raises(ValueError, match=text):
                flash_attention_n_with_kvcache(call.q, *call.caches, *call.new, **bad)


@pytest.mark.gpu
def test_boundaries_on_a_gpu_are_checked_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(6, 2, 64, device="cuda", dtype=torch.bfloat16)
    good, bad = int32(0, 2, 6).cuda(), int32(0, 7, 6).cuda()
    monkeypatch.setattr(checks, "READ_ALL", True)
    for starts in (bad, good, bad):
        if starts is good:
            attn_n.flash_attention_n_varlen(q, q, q, good, good, 4, 4)
        else:
            with pytest.raises(ValueError, match="cu_seqlens_q"):
                attn_n.flash_attention_n_varlen(q, q, q, bad, bad, 4, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_read_on_the_host(case: Case) -> None:
    call = make(case, torch.bfloat16, "cuda")
    call.run(None)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = call.run(None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(out.double().cpu(), call.exact()[0], atol=2e-2)


@pytest.mark.parametrize("kind", ["lengths", "a number", "paged", "float8"])
def test_who_reads_a_cache_is_explained(kind: str, ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    q, k, v = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64)
    caches, keywords = torch.zeros(2, 2, 2, 64, 64), {"cache_seqlens": int32(17, 30), "sm_n": 1.0}
    if kind == "a number":
        keywords["cache_seqlens"] = 17
    if kind == "paged":
        caches, keywords["block_table"] = torch.zeros(2, 8, 2, 16, 64), torch.arange(8, dtype=torch.int32).view(2, 4)
    if kind == "float8":
        caches = caches.to(torch.float8_e4m3fn)
    explained = attn_n.explain(q, *caches, k, v, **keywords)
    assert not caches.float().any()
    assert ran == []
    assert ("copied first" in capsys.readouterr().out) == (kind in ("paged", "float8"))
    flash_attention_n_with_kvcache(q, *caches, k, v, **keywords)
    assert ran == [f"forward {explained.chosen}"]
    assert explained.call.k_shape[2] == (18 if kind == "a number" else 64)


def test_a_full_cache_is_explained_without_lengths() -> None:
    q, caches = torch.randn(2, 8, 1, 64), torch.zeros(2, 8, 2, 16, 64)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    assert not attn_n.explain(q, *caches, block_table=table).call.seqused
    assert attn_n.explain(q, *caches, block_table=table, cache_seqlens=5).call.seqused
