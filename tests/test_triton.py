"""The portable kernels beyond the table of cases: every shipped tile and every target, and tests for a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from attn_n import flash_attention_n, flash_attention_n_varlen
from attn_n.backends.triton import portable
from attn_n.backends.triton.portable import configs, prepare
from attn_n.backends.triton.portable.configs import Config
from attn_n.backends.triton.portable.tile import ROW_PADDING
from tests import compare
from tests.calls import gpu_call
from tests.cases import Case, make
from tests.oracle import attention_n
from tests.places import PLACES

TABLES = {"sm_90": configs.SM_90, "large": configs.LARGE, "small": configs.SMALL, "float32": configs.FLOAT32}


def tiles() -> Iterator[tuple[str, int, dict[str, Config]]]:
    """Yield every row of the tables: the rows for long loops of all kernels together, then those for short ones."""
    for name, table in TABLES.items():
        for width in (64, 128, 256):
            found = {kernel: widths[width] for kernel, widths in table.items() if width in widths}
            for i in range(max(map(len, found.values()))):
                yield name, width, {kernel: rows[min(i, len(rows) - 1)] for kernel, rows in found.items()}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_tables_are_whole(table: configs.Table) -> None:
    wide = set() if table is configs.FLOAT32 else {512}
    every = {64, 128, 256} | wide
    assert {kernel: set(widths) for kernel, widths in table.items()} == {
        "forward": every, "dq": every, "dmask": every, "dk and dv": {64, 128}, "dk": {256} | wide, "dv": {256} | wide,
    }  # fmt: skip
    for kernel in table:
        for found in table[kernel].values():
            assert not found[-1].descriptors
            assert found[-1].at_least == 0
            assert [row.at_least for row in found] == sorted((row.at_least for row in found), reverse=True)
    for kernel in ("dk and dv", "dk", "dv"):
        for width, found in table[kernel].items():
            # The dK and dV kernels read rows that the dQ kernel has written, up to the end of its last tile.
            assert max(row.tile_q for row in found) <= min(row.tile_q for row in table["dq"][width])
            assert max(row.tile_q for row in table["dq"][width]) <= ROW_PADDING.value


@pytest.fixture
def unprepared() -> Iterator[None]:
    """Forget prepared launches: calls with equal keys share one, and each test here has its own tiles."""
    prepare._calls.clear()
    yield
    prepare._calls.clear()


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(
    ("name", "width", "row_of"),
    [pytest.param(*found, id=f"{found[0]}-{found[1]}-{i}") for i, found in enumerate(tiles())],
)
def test_every_row(
    name: str, width: int, row_of: dict[str, Config], device: str, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    """Each row is right on a call whose lengths are no multiples of its tiles, with a window and GQA."""
    if device == "cuda" and name == "sm_90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its tiles are for sm_90")
    case = Case(
        "", batch=1, heads_q=2, heads_kv=1, len_q=150, len_k=170, size=width - 16, size_v=width - 16, window=(90, 10)
    )
    monkeypatch.setattr(configs, "find", lambda kernel, key: row_of[kernel])
    inputs = make(case, torch.float32 if name == "float32" else torch.bfloat16, device)
    excess = compare.excess(inputs, compare.library(inputs, "triton:portable"))
    assert max(excess.values()) <= 1, excess
    assert set(ran) == {"forward triton:portable", "backward triton:portable"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32, "mask_shape": (1, 1, 1, 256), "mask_dtype": torch.bool, "dropout_p": 0.5}, None),
        ({"sequences": 2, "softcap": 3.0, "alibi": True, "return_lse": True}, None),
        ({"dtype": torch.float64}, "takes float16, bfloat16 and float32, not float64"),
        ({"capability": (7, 5)}, "needs compute capability 8.0 or later, got 7.5"),
        ({"v_shape": (2, 8, 256, 520)}, "takes heads of up to 512 in bfloat16, got 520"),
        ({"v_shape": (2, 8, 256, 264), "dtype": torch.float32}, "takes heads of up to 256 in float32, got 264"),
        ({"device": "mps", "capability": None}, "runs on CUDA and CPU, not on mps"),
        ({"mask_needs_grad": True, "alibi_needs_grad": True}, None),
        ({"seqused": True, "leftpad": True}, None),
        ({"leftpad": True, "mask_needs_grad": True}, "has no gradient of attn_mask together with leftpad_k"),
        ({"block_table": 4, "cache": True}, "has no KV cache, no block table of a paged KV cache"),
    ],
    ids=str,
)  # fmt: skip
def test_why_not(changes: dict[str, object], reason: str | None) -> None:
    assert portable.PortableKernels().refusal(gpu_call(**changes)) == reason


def test_why_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    call = gpu_call(device="cpu", capability=None)
    assert portable.PortableKernels().refusal(call) is None or torch.cuda.is_available()
    monkeypatch.setattr(portable, "_INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in str(portable.PortableKernels().refusal(call))
    monkeypatch.setattr(portable.triton, "__version__", "3.3.1")
    assert portable.PortableKernels().refusal(gpu_call()) == "needs Triton 3.4 or later, found 3.3.1"


@pytest.mark.parametrize("device", PLACES)
def test_a_window_of_more_than_32_bits(device: str) -> None:
    q, k, v = (torch.randn(1, 2, 40, 16, device=device) for _ in range(3))
    for window in ((2**40, 3), (5, 2**31 - 1)):
        out = flash_attention_n(q, k, v, sm_n=1.0, window=window, backend="triton:portable")
        assert torch.allclose(out, flash_attention_n(q, k, v, sm_n=1.0, window=window, backend="reference"), atol=1e-5)


@pytest.fixture
def inputs() -> list[Tensor]:
    return [torch.randn(2, 4, 700, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2}], ids=str)
def test_a_cuda_graph_of_both_passes(inputs: list[Tensor], options: dict[str, float]) -> None:
    n = torch.full((4,), 2.0, device="cuda", requires_grad=True)
    every, dout = [*inputs, n], torch.randn_like(inputs[0])

    def step() -> list[Tensor]:
        out = flash_attention_n(*inputs, True, sm_n=n, backend="triton:portable", **options)
        return [out, *torch.autograd.grad(out, every, dout)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    first = [x.clone() for x in captured]
    if not options:
        assert all(torch.equal(*pair) for pair in zip(first, step(), strict=True))
    else:  # each replay drops different weights
        graph.replay()
        assert not torch.equal(captured[0], first[0])
        assert all(bool(x.isfinite().all()) for x in captured)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_what_changes_between_calls_that_look_the_same(inputs: list[Tensor], dropout_p: float) -> None:
    """The launch is prepared once; n, a gradient of lse and the alignment of a tensor are not part of its key."""
    q, k, v = (x.detach()[:, :, :24].contiguous().requires_grad_() for x in inputs)
    per_head = torch.tensor([0.0, 0.5, 1.0, 9.0], device="cuda", requires_grad=True)
    odd = torch.cat([q.detach().new_zeros(1), k.detach().flatten()])[1:].view(k.shape).requires_grad_()
    for n in (None, 1.0, 0.0, 7.0, per_head, None):
        for keys in (k, odd, k):
            for with_lse in (False, True):
                calls = []
                for backend_name in ("triton:portable", "reference"):
                    out, lse = flash_attention_n(
                        q, keys, v, sm_n=n, return_lse=True, backend=backend_name, dropout_p=dropout_p
                    )
                    loss = (out if dropout_p == 0 else lse).float().square().sum() + (lse.sum() if with_lse else 0)
                    wanted = [q, keys, *([per_head] if n is per_head else [])]
                    calls.append([lse, *torch.autograd.grad(loss, wanted)])
                for got, want in zip(*calls, strict=True):
                    assert torch.allclose(got.double(), want.double(), atol=2e-2, rtol=3e-2)


@pytest.mark.gpu
def test_twice_the_same_bits(inputs: list[Tensor]) -> None:
    results = []
    for _ in range(20):
        out = flash_attention_n(*inputs, True, sm_n=1.0, backend="triton:portable")
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    assert all(torch.equal(a, b) for found in results[1:] for a, b in zip(found, results[0], strict=True))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    """Offsets beyond 32 bits are right in the last rows of a sequence of 2^31 numbers, which a window keeps fast."""
    length, width, tail = 2**31 // 64 + 1000, 64, 200
    q, k, v = (
        torch.randn(1, 1, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    out, lse = flash_attention_n(q, k, v, sm_n=1.0, window=(63, 0), return_lse=True, backend="triton:portable")
    dout = torch.zeros_like(out)
    dout[:, :, -tail:] = torch.randn(1, 1, tail, width, device="cuda", dtype=torch.bfloat16)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    ends = [x.detach()[:, :, -tail - 63 :].double().cpu().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = attention_n(*ends, n=1.0, window=(63, 0))
    wanted = torch.autograd.grad(expected[:, :, -tail:], ends, dout[:, :, -tail:].double().cpu())
    assert torch.allclose(out[:, :, -tail:].double().cpu(), expected[:, :, -tail:], atol=2e-2)
    assert torch.allclose(lse[:, :, -tail:].double().cpu(), expected_lse[:, :, -tail:], atol=1e-3)
    for got, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(got[:, :, -tail - 63 :].double().cpu(), want, atol=5e-2)
        assert not got[:, :, : -tail - 63].any()


@pytest.mark.gpu
def test_heads_far_apart() -> None:
    """The heads of a group are more than 2^31 elements apart, though no stride is."""
    distance, length, width = 2**30, 90, 64
    far = torch.empty(3 * distance, device="cuda", dtype=torch.bfloat16).as_strided(
        (1, 3, length, width), (3 * distance, distance, width, 1)
    )
    case = Case("", batch=1, heads_q=3, heads_kv=1, len_q=length, len_k=length, size=width, size_v=width, causal=True)
    inputs = make(case, torch.bfloat16, "cuda")
    inputs.q = far.copy_(inputs.q.detach()).requires_grad_()
    excess = compare.excess(inputs, compare.library(inputs, "triton:portable"))
    assert max(excess.values()) <= 1, excess


@pytest.mark.gpu
def test_more_than_2_to_the_31_rows() -> None:
    """With one key each of 2^31 and more rows has the weight `1 / (n + 1)` and the lse `log(n + 1)`."""
    heads = 17
    tokens = 2**31 // heads + 1000
    q = torch.zeros(tokens, heads, 1, device="cuda", dtype=torch.float16)
    k = v = torch.ones(1, heads, 1, device="cuda", dtype=torch.float16)
    starts, one = (torch.tensor([0, end], dtype=torch.int32, device="cuda") for end in (tokens, 1))
    out, lse = flash_attention_n_varlen(
        q, k, v, starts, one, tokens, 1, sm_n=torch.arange(1.0, heads + 1, device="cuda"), return_lse=True,
        backend="triton:portable",
    )  # fmt: skip
    expected = torch.arange(2.0, heads + 2, device="cuda")
    assert all(torch.equal(some, (1 / expected).half().expand_as(some)) for some in out[..., 0].split(1 << 24))
    assert all(torch.allclose(some, expected.log().expand_as(some)) for some in lse.split(1 << 24))


WIDTHS = [
    (40, 24), (40, 20), (36, 20), (40, 8), (24, 8), (64, 24), (72, 40), (100, 36), (200, 72), (192, 128), (256, 16),
    (8, 24), (20, 40), (36, 100), (72, 200), (128, 256), (1, 1), (33, 33), (72, 72), (88, 88), (96, 96), (255, 255),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "size_v"), WIDTHS)
def test_widths(size: int, size_v: int) -> None:
    """Pairs of widths around the tiles are right: compilers have been wrong for single pairs."""
    for changes in ({}, {"causal": True, "heads_kv": 1}):
        case = dataclasses.replace(Case("", batch=1, len_q=90, len_k=130, size=size, size_v=size_v), **changes)
        inputs = make(case, torch.float16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "triton:portable"))
        assert max(excess.values()) <= 1, (changes, excess)


@pytest.mark.gpu
def test_learned_n_on_the_long_tiles(ran: list[str]) -> None:
    """Learned n is right at lengths beyond every threshold of the table, where TMA descriptors load the tiles."""
    case = Case("", batch=1, heads_q=2, heads_kv=1, len_q=3100, len_k=3333, size=128, size_v=128, n="per head")
    for changes in ({}, {"causal": True}, {"n": "sinks", "sinks": (-2.0, 1.0)}, {"size": 64, "size_v": 64}):
        inputs = make(dataclasses.replace(case, **changes), torch.bfloat16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "triton:portable"))
        assert max(excess.values()) <= 1, (changes, excess)
