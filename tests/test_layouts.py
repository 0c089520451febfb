"""Every backend is right in every memory layout, with and without the lse in the loss, against float64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_n import UnsupportedError, flash_attention_n
from attn_n.backends.adapt.layout import of_width
from attn_n.call import Options
from tests import compare
from tests.cases import LAYOUTS, Case, laid_out, make, must_serve, why_not_usable
from tests.operators import opcheck
from tests.places import on_gpu

ON_GPU = {
    torch.bfloat16: (
        "reference", "sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "triton:portable", "triton:hopper", "flash_attn:2",
        "flash_attn:3", "flash_attn:4", "xformers:flash", "xformers:cutlass", None,
    ),
    torch.float32: ("sdpa:efficient", "xformers:cutlass"),
}  # fmt: skip
PLACES = [
    *(pytest.param("cpu", name, torch.float32) for name in ("reference", "sdpa:cpu", "triton:portable", None)),
    pytest.param("cpu", "sdpa:cpu", torch.bfloat16),
    *on_gpu(*(("cuda", name, dtype) for dtype, names in ON_GPU.items() for name in names)),
]
SIZES = ((64, 64), (64, 32), (32, 64), (40, 72))
LAYOUTS_OF_DOUT = ("heads first", "tokens first", "heads innermost", "transposed", "overlapping rows", "of a sum")


def _rows() -> Iterator[Case]:
    """Yield each layout of q, k and v with a dout of another layout, and each layout of dout."""
    for layout, (size, size_v) in itertools.product(LAYOUTS, SIZES):
        case = Case(layout, layout=layout, len_q=12, len_k=12, size=size, size_v=size_v, heads_q=4, causal=True)
        yield dataclasses.replace(case, heads_kv=1 if layout == "channels last" else 2)
    for layout, (size, size_v) in itertools.product(LAYOUTS_OF_DOUT[1:], SIZES):
        yield Case(f"dout {layout}", layout_of_dout=layout, len_q=9, len_k=12, size=size, size_v=size_v)
    for layout in ("sliced", "heads innermost", "offset by one", "one storage"):
        for size, size_v in SIZES[1:]:
            varlen = Case(f"varlen {layout}", layout=layout, lengths_q=(5, 1, 8), lengths_k=(5, 3, 9), causal=True)
            yield dataclasses.replace(varlen, size=size, size_v=size_v, layout_of_dout="transposed")


def _table() -> Iterator[object]:
    for place, case, lse_grad in itertools.product(PLACES, _rows(), (True, False)):
        device, backend, dtype = place.values
        # Our own kernels take every stride as it is, and interpreting or compiling them is slow.
        few = device == "cuda" and "heads innermost" not in case.name
        sizes = SIZES[::3] if few or backend is None else SIZES
        sizes = {"triton:portable": SIZES[-1:], "triton:hopper": SIZES[:1]}.get(backend, sizes)
        if (case.size, case.size_v) not in sizes:
            continue
        kind = str(dtype).removeprefix("torch.")
        name = f"{case}-{case.size}-{case.size_v}-{'lse' if lse_grad else 'no lse'}-{device}-{backend}-{kind}"
        yield pytest.param(device, backend, dtype, case, lse_grad, id=name, marks=place.marks)


@pytest.mark.parametrize(("device", "backend", "dtype", "case", "lse_grad"), list(_table()))
def test_the_table(
    device: str, backend: str | None, dtype: torch.dtype, case: Case, lse_grad: bool, ran: list[str]
) -> None:
    """A backend that serves a call is right in every layout; `None` is the automatic choice."""
    if backend is not None and why_not_usable(backend):
        pytest.skip(f"{backend}: {why_not_usable(backend)}")
    inputs = make(case, dtype, device)
    if backend is not None and not must_serve(backend, device, dtype, case, lse_grad):
        with pytest.raises(UnsupportedError, match=backend):
            compare.library(inputs, backend, lse_grad)
        return
    got = compare.library(inputs, backend, lse_grad)
    if backend is not None:
        wanted = {"attend"} if backend == "reference" else {"forward", "backward"}
        assert set(ran) == {f"{method} {backend}" for method in wanted}
    excess = compare.excess(inputs, got, lse_grad)
    assert max(excess.values()) <= 1, {name: f"{value:.2f} x the allowed error" for name, value in excess.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_layouts_one_after_the_other_on_cudnn(reverse: bool) -> None:
    """Layouts do not disturb each other, though PyTorch caches cuDNN's backward plan by strides of q, k, v alone."""
    cases = [case for case in _rows() if not case.varlen and (case.size, case.size_v) == (64, 64)]
    for case in reversed(cases) if reverse else cases:
        case = dataclasses.replace(case, len_q=21, len_k=21) if reverse else case
        inputs = make(case, torch.bfloat16, "cuda")
        excess = compare.excess(inputs, compare.library(inputs, "sdpa:cudnn", False), False)
        assert max(excess.values()) <= 1, (case.name, excess)


@pytest.mark.parametrize(
    ("layout", "size", "size_v", "lse_grad"),
    [
        *(("heads innermost", *sizes, lse_grad) for sizes in SIZES for lse_grad in (True, False)),
        *((layout, 64, 64, False) for layout in ("channels last", "overlapping rows", "one storage")),
    ],
)
def test_compile(layout: str, size: int, size_v: int, lse_grad: bool, ran: list[str]) -> None:
    """Compiled calls are right; torch.compile always passes a gradient of lse, zeros if the loss has no lse."""
    torch.compiler.reset()
    case = Case("", layout=layout, len_q=9, len_k=12, size=size, size_v=size_v)
    inputs = make(case, torch.float32, "cpu")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention_n(q, k, v, sm_n=inputs.n, return_lse=True, backend="sdpa")

    out, lse = torch.compile(attend, fullgraph=True, backend="aot_eager")(inputs.q, inputs.k, inputs.v)
    excess = compare.excess(inputs, compare.with_gradients(inputs, out, lse if lse_grad else None), lse_grad)
    assert max(excess.values()) <= 1, excess
    assert {"forward sdpa:cpu", "backward sdpa:cpu"} <= set(ran)


@pytest.mark.parametrize("case", [case for case in _rows() if (case.size, case.size_v) == (40, 72)], ids=str)
def test_opcheck(case: Case) -> None:
    """The fakes promise the strides that the kernels return."""
    inputs = make(case, torch.float32, "cpu")
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    packing: tuple[Any, ...] = inputs.packing() if case.varlen else (None, None, 0, 0)
    options = Options(0.25, None, 0, None, 0.0, None, None, *packing)
    log_n, douts = torch.linspace(-1, 1, case.heads_q), (inputs.dout, inputs.dlse)
    opcheck(q, k, v, log_n, "sdpa:cpu", options, douts=douts, rows_may_be_empty=False)


MASKED = [
    *(pytest.param("cpu", name, torch.float32) for name in ("reference", "sdpa:cpu", "triton:portable")),
    *on_gpu(
        *(
            ("cuda", name, dtype)
            for name in ("sdpa:efficient", "triton:portable", "xformers:cutlass")
            for dtype in (torch.float32, torch.bfloat16)
        )
    ),
]


@pytest.mark.parametrize(("device", "backend", "dtype"), MASKED)
@pytest.mark.parametrize("layout", ["heads innermost", "transposed", "sliced", "expanded over heads", "offset by one"])
@pytest.mark.parametrize("keys", [16, 13])
def test_masks(device: str, backend: str, dtype: torch.dtype, layout: str, keys: int, ran: list[str]) -> None:
    """Masks are right in any layout; a bias by relative position has heads innermost, as an embedding gives it."""
    if why_not_usable(backend):
        pytest.skip(f"{backend}: {why_not_usable(backend)}")
    case = Case("", batch=2, heads_q=3, heads_kv=3, len_q=9, len_k=keys)
    inputs = make(case, dtype, device)
    inputs.mask = laid_out(torch.randn(2, 3, 9, keys, device=device, dtype=dtype), layout)
    excess = compare.excess(inputs, compare.library(inputs, backend))
    assert max(excess.values()) <= 1, excess
    assert len(set(ran)) == (1 if backend == "reference" else 2)


@pytest.mark.parametrize("device", ["cpu", *on_gpu(("cuda",))])
def test_what_a_kernel_reads(device: str) -> None:
    """A kernel gets contiguous columns, and an output like its input has room, whatever the strides are."""
    memory = torch.arange(4096.0, device=device)
    for shape in itertools.product((1, 2), (1, 3), (1, 4), (1, 8, 24)):
        for strides in itertools.product((0, 1, 8, 40), (0, 1, 8, 40), (0, 1, 8, 40), (0, 1, 3, 8)):
            x = memory.as_strided(shape, strides, 7)
            for width in (shape[-1], 24):
                wide = of_width(x, width)
                assert torch.equal(wide[..., : shape[-1]], x)
                assert not wide[..., shape[-1] :].any()
                if width > 1:
                    assert wide.stride(-1) == torch.empty_like(wide).stride(-1) == 1
                if device == "cuda":
                    assert all(step * 4 % 16 == 0 for step in wide.stride()[:-1] if width % 4 == 0)
                    assert wide.data_ptr() % 16 == 0
