"""What the libraries' kernels differ in, with stand-ins for these kernels that run on a CPU.

The stand-ins have the interface and the limits of the kernels, and check the tensors that they are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_n
from attn_n.backends import registry
from attn_n.backends.adapt import dense_bias as dense_bias_module
from attn_n.backends.adapt import flash2, layout, one_by_one
from attn_n.backends.adapt.blockwise import Block
from attn_n.backends.adapt.blockwise import _blocks as blocks_of
from attn_n.backends.adapt.dense_bias import dense_bias
from attn_n.backends.adapt.efficient import MemoryEfficientBackend
from attn_n.backends.adapt.flash import FlashBackend, FlashBatch, Sequences, sequences
from attn_n.backends.base import empty_in_order
from attn_n.call import AttentionCall, Gradients, Grads, Options, Saved
from tests import compare
from tests.calls import gpu_call
from tests.cases import Case, make


def logits_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the logits `(H, L, S)` of `(L, H, E)` tensors."""
    groups = q.shape[1] // k.shape[1]
    return q.transpose(0, 1) @ k.repeat_interleave(groups, 1).permute(1, 2, 0) * scale


def gradients_of(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, weights: Tensor, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `(L, H, E)` tensors, those of k and v for each query head."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
    q, dout = q.transpose(0, 1), dout.transpose(0, 1)
    ds = weights * (dout @ v.mT - delta[..., None]) * scale
    found = ds @ k, ds.mT @ q, weights.mT @ dout
    return found[0].transpose(0, 1), found[1].transpose(0, 1), found[2].transpose(0, 1)


class Flash(FlashBackend):
    """FlashAttention 2: one head size, a multiple of 8; a side of -1 is max_k; rows without keys have lse = inf."""

    name = "flash stand-in"
    devices = ("cpu",)
    dtypes = (torch.float32,)
    honours = ("causal", "window", "varlen", "lse gradient")

    def __init__(self, takes_dlse: bool, backward_multiple: int) -> None:
        self.takes_dlse, self.backward_multiple = takes_dlse, backward_multiple

    def why_not(self, call: AttentionCall) -> str | None:
        return self.too_wide(call) or flash2.why_not_window(call)

    def each(self, options: Options, q: Tensor, k: Tensor) -> Iterator[tuple[object, object, object, Tensor]]:
        """Yield the places of the queries, of the keys and of the lse of each sequence, and what it hides."""
        lengths = sequences(options, q, k)
        window = flash2.window_arguments(options, lengths)
        if lengths.starts_q is None or lengths.starts_k is None:
            assert (lengths.max_q, lengths.max_k) == (q.shape[1], k.shape[1])
            places = [(b, b, b, q.shape[1], k.shape[1]) for b in range(q.shape[0])]
        else:
            ends = [x.tolist() for x in (lengths.starts_q, lengths.starts_k)]
            spans = [[slice(*pair) for pair in pairwise(each)] for each in ends]
            sizes = [[span.stop - span.start for span in each] for each in spans]
            assert q.shape[0] >= lengths.max_q >= max(sizes[0])
            assert k.shape[0] >= lengths.max_k >= max(sizes[1])
            of_lse = [(slice(None), span) for span in spans[0]]
            places = list(zip(*spans, of_lse, *sizes, strict=True))
        for queries, keys, rows, len_q, len_k in places:
            behind = torch.arange(len_q)[:, None] + len_k - len_q - torch.arange(len_k)
            hidden = behind < 0 if window.causal else torch.zeros_like(behind, dtype=torch.bool)
            if (window.left, window.right) != (-1, -1):
                left, right = (window.max_k if side == -1 else side for side in (window.left, window.right))
                hidden = hidden | (behind > left) | (-behind > right)
            yield queries, keys, rows, hidden

    def kernel_forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, None]:
        widths = {x.shape[-1] for x in (q, k, v)}
        assert len(widths) == 1
        assert widths.pop() % 8 == 0
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        shape = (q.shape[1], q.shape[0]) if options.varlen else (q.shape[0], q.shape[2], q.shape[1])
        out, lse = torch.zeros_like(q), torch.full(shape, math.inf)
        for queries, keys, rows, hidden in self.each(options, q, k):
            one_q, one_k, one_v = q[queries], k[keys], v[keys]  # type: ignore[index]
            logits = logits_of(one_q, one_k, options.scale).masked_fill(hidden, -math.inf)
            of_keys = one_v.repeat_interleave(q.shape[-2] // k.shape[-2], 1).transpose(0, 1)
            out[queries] = (logits.softmax(-1).nan_to_num(0.0) @ of_keys).transpose(0, 1)  # type: ignore[index]
            found = logits.logsumexp(-1)
            lse[rows] = found.masked_fill(found == -math.inf, math.inf)  # type: ignore[index]
        return out, flash2.rows_without_keys(lse, options, sequences(options, q, k)), None

    def kernel_backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        (dout, dlse, *_), (q, k, v, out, lse, *_) = grads, saved
        widths = {x.shape[-1] for x in (q, k, v, out, dout)}
        assert len(widths) == 1
        assert widths.pop() % self.backward_multiple == 0
        assert lse.is_contiguous()
        assert dlse is None or (self.takes_dlse and dlse.is_contiguous())
        shapes = [(*x.shape[:-2], q.shape[-2], x.shape[-1]) for x in (q, k, v)]
        dq, dk, dv = (q.new_zeros(shape) for shape in shapes)
        for queries, keys, rows, hidden in self.each(options, q, k):
            one_q, one_k, one_v, one_dout = q[queries], k[keys], v[keys], dout[queries]  # type: ignore[index]
            logits = logits_of(one_q, one_k, options.scale).masked_fill(hidden, -math.inf)
            weights = (logits - lse[rows][..., None]).exp()  # type: ignore[index]
            delta = (one_dout * out[queries]).sum(-1).T  # type: ignore[index]
            delta = delta if dlse is None else delta - dlse[rows]  # type: ignore[index]
            found = gradients_of(one_q, one_k, one_v, one_dout, weights, delta, options.scale)
            dq[queries], dk[keys], dv[keys] = found  # type: ignore[index]
        return Gradients(dq, dk, dv)


class Efficient(MemoryEfficientBackend):
    """The memory-efficient kernel: top-left causal masks, KV heads for all heads, logits in base 2."""

    name = "efficient stand-in"
    devices = ("cpu",)
    dtypes = (torch.float32,)

    def weights(self, q: Tensor, k: Tensor, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
        """Return the logits in base 2, in which a bias of `finfo.min` is -inf."""
        logits = torch.stack([logits_of(*pair, scale) for pair in zip(q, k, strict=True)])
        assert not (causal and bias is not None)
        logits = logits if bias is None else logits + bias
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        return logits / math.log(2)

    def kernel_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert all(x.shape[-1] % 8 == 0 for x in (q, k, v))
        q, k, v = self.tensors(q, k, v)
        assert q.shape[2] == k.shape[2] == v.shape[2]
        logits = self.weights(q, k, causal, bias, scale) * math.log(2)
        return logits.softmax(-1) @ v.transpose(1, 2), logits.logsumexp(-1)

    def kernel_backward(self, dout: Tensor, saved: Saved, causal: bool, bias: Tensor | None, scale: float) -> Gradients:
        q, k, v = self.tensors(*saved[:3])
        dout, out, lse = self.results(dout, saved.out, saved.lse)
        assert all(x.is_contiguous() for x in (dout, out, lse))
        logits = self.weights(q, k, causal, bias, scale)
        weights = (logits - lse[..., None] / math.log(2)).exp2()
        delta = (dout * out).sum(-1).transpose(1, 2)
        found = [gradients_of(*each, scale) for each in zip(q, k, v, dout, weights, delta, strict=True)]
        dq, dk, dv = (torch.stack(each).transpose(1, 2) for each in zip(*found, strict=True))
        return Gradients(dq, dk, dv)


@pytest.fixture(autouse=True)
def no_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own copy of the registry."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def is_exact(case: Case, backend: attn_n.Backend, lse_grad: bool) -> None:
    attn_n.register_backend(backend)
    inputs = make(case, torch.float32, "cpu")
    excess = compare.excess(inputs, compare.library(inputs, backend.name, lse_grad), lse_grad)
    assert max(excess.values()) <= 1, excess


HEADS = {"heads_q": 4, "heads_kv": 2}
FLASH = [
    Case("causal", causal=True, len_q=9, len_k=12, size=16, size_v=24, **HEADS),
    Case("rows without keys", causal=True, len_q=9, len_k=5, **HEADS),
    Case("window", window=(4, 2), len_q=12, len_k=12, layout="heads innermost"),
    Case("window to the left", window=(3, None), len_q=9, len_k=9, size=5, size_v=3),
    Case("window to the right", window=(None, 3), len_q=5, len_k=9, layout_of_dout="transposed"),
    Case("columns that are no multiple of 8", len_q=5, len_k=7, size=12, size_v=12, **HEADS),
    Case("varlen, causal", lengths_q=(5, 17, 9), lengths_k=(5, 30, 4), causal=True, size=12, size_v=20, **HEADS),
    Case("varlen, window", lengths_q=(9, 18), lengths_k=(9, 18), window=(4, 2), layout_of_dout="transposed"),
    Case("varlen, window to the left", lengths_q=(40, 5), lengths_k=(9, 12), window=(3, None)),
]


@pytest.mark.parametrize(("takes_dlse", "multiple"), [(False, 8), (True, 32)])
@pytest.mark.parametrize("lse_grad", [False, True])
@pytest.mark.parametrize("case", FLASH, ids=str)
def test_flash_attention(case: Case, lse_grad: bool, takes_dlse: bool, multiple: int) -> None:
    is_exact(case, Flash(takes_dlse, multiple), lse_grad)


def test_flash_attention_of_tensors_that_are_not_aligned() -> None:
    """A prepared call looks at the address of each tensor."""
    attn_n.register_backend(Flash(False, 8))
    memory = torch.randn(3, 1 + 2 * 6 * 8)
    for first in (0, 1):
        q, k, v = (x[first : first + 96].view(1, 2, 6, 8) for x in memory)
        out = attn_n.flash_attention_n(q, k, v, sm_n=1.0, backend="flash stand-in")
        expected = attn_n.flash_attention_n(q, k, v, sm_n=1.0, backend="reference")
        assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "size_v", "lse_grad", "takes_dlse", "said"),
    [
        (256, 256, False, False, None),
        (250, 255, True, False, None),
        (256, 256, True, True, None),
        (8, 256, True, False, "takes head sizes up to 256, got 264, of which one carries the gradient of lse"),
        (257, 8, True, True, "takes head sizes up to 256, got 264"),
    ],
)
def test_head_sizes_of_flash_attention(
    size: int, size_v: int, lse_grad: bool, takes_dlse: bool, said: str | None
) -> None:
    backend = Flash(takes_dlse, 8)
    attn_n.register_backend(backend)
    q, v = torch.empty(1, 1, 4, size, requires_grad=True), torch.empty(1, 1, 4, size_v)
    explained = attn_n.explain(q, q, v, return_lse=lse_grad, backend=backend.name)
    assert next(each.reason for each in explained.verdicts if each.name == backend.name) == said


def test_an_lse_without_a_gradient_takes_no_column() -> None:
    of_256 = {f"{x}_shape": (2, 8, 64, 256) for x in "qkv"}
    reasons = [Flash(False, 8).too_wide(gpu_call(**of_256, return_lse=True, needs_grad=x)) for x in (False, True)]
    assert reasons == [None, "takes head sizes up to 256, got 264, of which one carries the gradient of lse"]


class Widths(Flash):
    """It keeps the head sizes that the kernels get."""

    def __init__(self, takes_dlse: bool) -> None:
        super().__init__(takes_dlse, FlashBackend.backward_multiple)
        self.widths: list[int] = []

    def kernel_forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, None]:
        self.widths.append(q.shape[-1])
        return super().kernel_forward(q, k, v, options)

    def kernel_backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        self.widths.append(saved.q.shape[-1])
        return super().kernel_backward(grads, saved, options)


@pytest.mark.parametrize(
    ("takes_dlse", "size_v", "lse_grad", "expected"),
    [(False, 8, False, 16), (False, 15, True, 16), (False, 16, True, 24), (True, 16, True, 16)],
)
def test_the_backward_is_as_wide_as_it_has_to_be(takes_dlse: bool, size_v: int, lse_grad: bool, expected: int) -> None:
    backend, q, k = Widths(takes_dlse), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 9, 16)
    v, options = torch.randn(1, 2, 9, size_v), Options(1.0)
    out, lse, _ = backend.forward(q, k, v, None, options)
    backend.backward(Grads(out, lse if lse_grad else None), Saved(q, k, v, out, lse), options)
    assert backend.widths == [16, expected]


def test_a_large_number_in_base_2() -> None:
    """A row of numbers of which each overflows there attends equally to its keys, in both passes."""
    attn_n.register_backend(Efficient())
    q, k, v = (torch.randn(1, 2, length, 8, requires_grad=True) for length in (4, 6, 6))
    mask = torch.randn(4, 6)
    mask[1] = torch.finfo(torch.float32).min
    found, expected = (
        torch.autograd.grad(
            attn_n.flash_attention_n(q, k, v, sm_n=0.0, attn_mask=mask, backend=name).square().sum(), (q, k, v)
        )
        for name in ("efficient stand-in", "reference")
    )
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("size", "size_v", "as_they_are"), [(16, 16, True), (16, 8, False), (12, 12, False), (9, 9, False), (18, 18, False)]
)
def test_what_flash_attention_gets_as_it_is(size: int, size_v: int, as_they_are: bool) -> None:
    backend, q, v = Flash(False, 8), torch.randn(1, 2, 8, size), torch.randn(1, 2, 8, size_v)
    assert isinstance(backend.prepare(q, q, v, None, Options(1.0)), FlashBatch) == as_they_are


@pytest.mark.parametrize("lse_grad", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case("causal", causal=True, len_q=9, len_k=12, size=16, size_v=24, **HEADS),
        Case("rows without keys", causal=True, len_q=12, len_k=5, size=5, size_v=3, **HEADS),
        Case("window", window=(4, 2), len_q=40, len_k=40),
        Case("mask and window", mask="float", window=(9, 4), len_q=9, len_k=12, n="per head", **HEADS),
        Case("bool mask", mask="hidden rows", len_q=9, len_k=12, causal=True),
        Case("ALiBi", alibi="per batch", len_q=9, len_k=12, n="sinks", sinks=(1.0, -2.0)),
        Case("varlen", lengths_q=(5, 17, 9), lengths_k=(5, 30, 4), causal=True, layout="heads innermost", **HEADS),
    ],
    ids=str,
)
def test_the_memory_efficient_kernel(case: Case, lse_grad: bool) -> None:
    is_exact(case, Efficient(), lse_grad)


SHORT = 0, 0, 0, 32  # no mask, no ALiBi, no softcap, and blocks of up to 32 rows
BLOCKS = [
    # L, S, left, right, mask, ALiBi, softcap, rows
    ((5, 9, None, None, *SHORT), [Block(None, None)]),
    ((5, 9, None, None, 1, 0, 0, 2), [Block(None, None, biased=True)]),
    ((5, 9, None, None, 0, 0, 1, 3), [Block((0, 3), None), Block((3, 5), None)]),
    ((5, 9, None, None, 0, 1, 0, 3), [Block((0, 3), None, biased=True), Block((3, 5), None, biased=True)]),
    ((5, 9, None, 1, 1, 0, 0, 3), [Block((0, 3), (0, 8), biased=True), Block((3, 5), None, biased=True)]),
    ((9, 9, None, 0, *SHORT), [Block(None, None, causal=True)]),
    ((9, 12, None, 0, *SHORT), [Block(None, (0, 3), alone=False), Block((0, 9), (3, 12), causal=True, alone=False)]),
    ((12, 9, None, 0, *SHORT), [Block((3, 12), None, causal=True)]),
    (
        (9, 12, None, 5, *SHORT),
        [
            Block(None, (0, 8), alone=False),
            Block((0, 4), (8, 12), causal=True, alone=False),
            Block((4, 9), (8, 12), alone=False),
        ],
    ),
    ((9, 12, None, 9, *SHORT), [Block(None, None)]),
    ((12, 9, None, 2, *SHORT), [Block((1, 10), None, causal=True), Block((10, 12), None)]),
    ((2, 5, None, 0, *SHORT), [Block(None, (0, 3), alone=False), Block((0, 2), (3, 5), causal=True, alone=False)]),
    ((1, 9, None, 0, *SHORT), [Block(None, (0, 8), alone=False), Block((0, 1), (8, 9), alone=False)]),
    ((9, 2, None, -3, *SHORT), []),
    ((6, 6, 1, 1, 0, 0, 0, 4), [Block((0, 4), (0, 5), biased=True), Block((4, 6), (3, 6), biased=True)]),
    ((3, 5, 1, 0, 0, 0, 0, 1), [Block((0, 1), (1, 3)), Block((1, 2), (2, 4)), Block((2, 3), (3, 5))]),
    ((4, 2, 0, 0, 0, 0, 0, 1), [Block((2, 3), (0, 1)), Block((3, 4), (1, 2))]),
    ((2, 5, 5, None, *SHORT), [Block(None, None)]),
    ((2, 5, 3, None, *SHORT), [Block(None, None, biased=True)]),
]


@pytest.mark.parametrize(("arguments", "expected"), BLOCKS)
def test_the_blocks_of_a_call(arguments: tuple[Any, ...], expected: list[Block]) -> None:
    assert list(blocks_of(*arguments)) == expected


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (Options(1.0, softcap=9.0), 100),
        (Options(1.0, alibi_slopes=torch.ones(2, 3)), 100),
        (Options(1.0, alibi_slopes=torch.ones(1, 3)), 200),
        (Options(1.0, 99, mask=torch.ones(2, 1, 1, 10)), 300),
        (Options(1.0, 99, mask=torch.ones(1, 3, 1, 10)), 200),
        (Options(1.0, 99), 600),
    ],
)
def test_how_large_a_bias_becomes(options: Options, rows: int) -> None:
    """Of 6,000 elements, for batches and heads apart where it, or what stands for it, depends on them."""
    backend = Efficient()
    backend.bias_elements = 6000
    block, *_ = backend._blocks(torch.empty(2, 3, 700, 8), torch.empty(2, 1, 10, 8), options)
    assert block.rows == (0, rows)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dense_bias_has_the_dtype_of_the_logits(dtype: torch.dtype, default: torch.dtype) -> None:
    mask = torch.eye(5, 9, dtype=torch.bool)[None, None]
    dense_bias_module._constants.cache_clear()
    torch.set_default_dtype(default)
    try:
        for options in (Options(1.0, mask=mask), Options(1.0, 2, 0), Options(1.0, mask=mask.half(), window_right=1)):
            bias = dense_bias(options, 5, 9, (1, 4), (2, 9), dtype, torch.device("cpu"))
            assert bias is not None
            assert (bias.dtype, bias.shape) == (dtype, (1, 1, 3, 7))
    finally:
        torch.set_default_dtype(torch.float32)


def test_head_sizes_are_filled_up_to_multiples() -> None:
    assert [MemoryEfficientBackend().widths(*sizes) for sizes in ((5, 8), (8, 9), (9, 1))] == [
        (8, 8),
        (8, 16),
        (16, 8),
    ]
    sizes = (8, 8), (9, 8), (8, 16), (8, 8, 1), (16, 8, 1), (8, 8, 0, 32), (8, 32, 1, 32)
    assert [layout.common_width(*each) for each in sizes] == [8, 16, 16, 16, 16, 32, 64]


def test_what_has_not_been_tested_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for backend in (FlashBackend(), MemoryEfficientBackend()):
        assert backend.refusal(gpu_call()) == "has not been tested on ROCm"


def test_the_memory_efficient_kernel_has_tokens_before_heads() -> None:
    backend = MemoryEfficientBackend()
    for shape in ((2, 3, 5, 8), (5, 3, 8)):  # varlen tensors have that order
        x = torch.empty(shape)
        for order in (backend.out_dim_order(x), backend.gradient_dim_order(x)):
            found = empty_in_order(x, shape, order)
            assert found.shape == shape
            assert (found.transpose(1, 2) if x.dim() == 4 else found).is_contiguous()


NOTHING = Sequences(None, None, 5, 9)
STARTS = Sequences(torch.tensor([0, 3]), torch.tensor([0, 9]), 12, 9)


@pytest.mark.parametrize(
    ("options", "lengths", "expected"),
    [
        (Options(1.0), NOTHING, (False, -1, -1, 9)),
        (Options(1.0, None, 0), NOTHING, (True, -1, -1, 9)),
        (Options(1.0, None, 0, alibi_slopes=torch.ones(1, 2)), NOTHING, (False, 8, 0, 9)),
        (Options(1.0, 3, 0), NOTHING, (False, 3, 0, 9)),
        (Options(1.0, None, 1), NOTHING, (False, -1, 1, 9)),
        (Options(1.0, 0, None), NOTHING, (False, 0, -1, 9)),
        (Options(1.0), STARTS, (False, -1, -1, 9)),
        (Options(1.0, None, 0), STARTS, (True, -1, -1, 9)),
        (Options(1.0, 3, None), STARTS, (False, 3, -1, 12)),
        (Options(1.0, None, 3), STARTS, (False, -1, 3, 12)),
    ],
)
def test_windows_of_flash_attention_2(
    options: Options, lengths: Sequences, expected: tuple[bool, int, int, int]
) -> None:
    assert flash2.window_arguments(options, lengths) == expected


@pytest.mark.parametrize(
    ("length", "window", "served"),
    [
        (10, (3, None), True),
        (11, (3, None), False),
        (11, (3, 8), True),
        (11, (3, 9), False),
        (11, (None, 9), False),
        (11, (None, 0), True),
        (11, (None, None), True),
    ],
)
def test_a_window_that_is_open_far_before_the_keys(
    length: int, window: tuple[int | None, int | None], served: bool
) -> None:
    """Nine keys. In varlen a side without a bound is given as one that bounds nothing."""
    sides = {"window_left": window[0], "window_right": window[1]}
    of_k = {"k_shape": (2, 8, 9, 64), "v_shape": (2, 8, 9, 64)}
    reason = flash2.why_not_window(gpu_call(q_shape=(2, 8, length, 64), **of_k, **sides))
    assert (reason is None) == served
    of_k = {"k_shape": (9, 8, 64), "v_shape": (9, 8, 64)}
    assert flash2.why_not_window(gpu_call(q_shape=(99, 80, 64), **of_k, **sides, sequences=2)) is None


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (1, 2, 1, 4), (3, 1, 4, 1), (1, 1, 4, 4)], ids=str)
def test_each_sequence_as_a_batch_of_one(shape: tuple[int, ...]) -> None:
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 6], [0, 3, 7, 8]))
    mask, slopes = torch.randn(shape), torch.randn(3, 2)
    options = Options(0.5, 2, 0, 9.0, 0.25, mask, slopes, starts_q, starts_k, 4, 4)
    expected = [(slice(0, 2), slice(0, 3)), (slice(2, 2), slice(3, 7)), (slice(2, 6), slice(7, 8))]
    found = list(one_by_one.each_sequence(options, 6, 8))
    assert [each[:2] for each in found] == expected
    for b, (queries, keys, alone) in enumerate(found):
        size = 1, 2, queries.stop - queries.start, keys.stop - keys.start
        assert alone.without_tensors() == Options(0.5, 2, 0, 9.0, 0.25)
        assert not alone.varlen
        assert alone.cu_seqlens_k is None
        assert alone.mask is not None is not alone.alibi_slopes
        assert torch.equal(alone.mask.expand(size), mask.expand(3, 2, 4, 4)[b : b + 1, :, : size[2], : size[3]])
        assert torch.equal(alone.alibi_slopes, slopes[b : b + 1])
    for missing in ("cu_seqlens_q", "cu_seqlens_k"):
        with pytest.raises(TypeError, match="cu_seqlens_q, cu_seqlens_k: expected tensors, got None"):
            next(one_by_one.each_sequence(options.replaced(**{missing: None}), 6, 8))


def test_a_kernel_gets_no_empty_sequence() -> None:
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 4, 5], [0, 3, 5, 5, 9]))
    options, sizes = Options(1.0, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=2, max_seqlen_k=4), []

    def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        sizes.append((q.shape[2], k.shape[2]))
        return torch.ones_like(q), torch.zeros(q.shape[:3])

    x = torch.randn(9, 2, 8)
    out, lse = one_by_one.forward_one_by_one(forward, x[:5], x, x, options)
    assert sizes == [(2, 3), (1, 4)]
    assert out[:, 0, 0].tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert lse[:, 0].tolist() == [0.0, 0.0, -math.inf, -math.inf, 0.0]


@pytest.mark.parametrize(
    ("shape", "strides", "as_it_is"),
    [
        ((2, 3, 4, 8), (96, 32, 8, 1), True),
        ((2, 3, 4, 8), (96, 8, 24, 1), True),
        ((2, 3, 4, 8), (0, 0, 16, 1), True),
        ((1, 1, 4, 8), (1, 1, 8, 1), True),
        ((2, 3, 4, 1), (12, 4, 1, 1), True),
        ((2, 3, 4, 8), (96, 1, 24, 3), False),
        ((2, 3, 4, 8), (96, 32, 1, 1), False),
        ((2, 3, 4, 8), (192, 64, 16, 2), False),
    ],
)
def test_what_a_kernel_reads_as_it_is(shape: tuple[int, ...], strides: tuple[int, ...], as_it_is: bool) -> None:
    x = torch.randn(400).as_strided(shape, strides)
    found = layout.of_width(x, shape[-1])
    assert (found is x) == layout.is_of_width(x, shape[-1]) == as_it_is
    assert torch.equal(found, x)
    assert not layout.is_of_width(x, shape[-1] + 8)
    wider = layout.of_width(x, shape[-1] + 8)
    assert wider.is_contiguous()
    assert torch.equal(wider, torch.nn.functional.pad(x, (0, 8)))


@pytest.mark.parametrize("len_k", [9, 16, 20])
def test_a_bias_whose_rows_are_aligned(len_k: int) -> None:
    q, k = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16), torch.randn(2, 3, len_k, 8)
    for bias in (torch.randn(1, 1, 5, len_k), torch.randn(2, 3, 1, 1)):
        rows = layout.aligned_bias(q, k, bias)
        assert rows is not None
        assert torch.equal(rows, bias.bfloat16().expand(2, 3, 5, len_k))
        assert rows.stride(3) == 1
        assert all(stride % 16 == 0 for stride in rows.stride()[:3])
    assert layout.aligned_bias(q, k, None) is None
