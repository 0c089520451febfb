"""The sink, by torch and by its Triton kernels (under the interpreter on a CPU), against float64."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from attn_n import flash_attention_n
from attn_n.sink import rescale
from attn_n.sink.merging import merge_
from attn_n.sink.weight import as_tensor, bounded_exp, weight_of_n
from tests.places import PLACES

pytest.importorskip("triton")

from attn_n.sink import fused

BATCH, HEADS, ROWS = 2, 3, 70
LAYOUTS = ("heads first", "tokens first", "varlen", "narrowed", "a stride in the last dimension")
LOG_N = {
    "1": 0.0,
    "1e-3": math.log(1e-3),
    "1e4": math.log(1e4),
    "per head": (-2.0, 0.5, 3.0),
    "zero": (-math.inf, 1.0, 90.0),
    "a row": "a row",
}


def log_n_of(kind: str, layout: str, device: str) -> float | Tensor:
    log_n = LOG_N[kind]
    if isinstance(log_n, str):
        of_rows = torch.randn(BATCH, HEADS, ROWS, device=device) * 3
        of_rows[:, :, ::7] = -math.inf  # n = 0, in some rows without visible keys and in others
        return of_rows.transpose(1, 2).flatten(0, 1) if layout == "varlen" else of_rows
    return torch.tensor(log_n, device=device) if isinstance(log_n, tuple) else log_n


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Lay out `(B, H, L, E)` in another way in memory, or as varlen `(T, H, E)`."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "varlen":
        return x.transpose(1, 2).flatten(0, 1)
    if layout == "narrowed":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if layout == "a stride in the last dimension":
        return x.mT.contiguous().mT
    return x


def rows_of(layout: str, device: str) -> Tensor:
    """Return an lse with rows without visible keys; of varlen `(T, H)` in FlashAttention's layout."""
    lse = torch.randn(BATCH, HEADS, ROWS, device=device) * 4
    lse[:, :, ::5] = -math.inf
    return lse.transpose(1, 2).flatten(0, 1).T.contiguous().T if layout == "varlen" else lse


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("kind", LOG_N)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_sink(device: str, layout: str, width: int, kind: str, dtype: torch.dtype) -> None:
    varlen = layout == "varlen"
    out, lse = (
        laid_out(torch.randn(BATCH, HEADS, ROWS, width, device=device, dtype=dtype), layout),
        rows_of(layout, device),
    )
    log_n = log_n_of(kind, layout, device)
    exact_n = log_n.double() if isinstance(log_n, Tensor) else log_n
    exact, exact_lse = out.double(), lse.double()
    rescale.scale_(exact, exact_lse, exact_n, varlen)
    exact_lse = rescale.add_to_lse(exact_lse, exact_n, varlen)
    lse_n = fused.add_sink_(out, lse, log_n)
    assert lse_n.stride() == lse.stride()
    relative = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert torch.allclose(out.double(), exact, rtol=relative, atol=1e-7)
    assert torch.equal(lse_n.isinf(), exact_lse.isinf())
    finite = exact_lse.isfinite()
    assert torch.allclose(lse_n.double()[finite], exact_lse[finite], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_n_does_not_change(device: str, dtype: torch.dtype) -> None:
    """Any number in a row that the kernel skips rounds to itself, and some number in the others changes."""
    numbers = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    numbers = numbers[numbers.isfinite()].to(device)
    edge = math.log(4 / torch.finfo(dtype).eps - 1)  # the lse at which the factor is 1 - eps / 4
    for off in (1e-3, -1e-3):
        out, lse = numbers[None, None, None], torch.full((1, 1, 1), edge + off, device=device)
        found = out.clone()
        fused.add_sink_(found, lse, 0.0)
        rounded = (out.double() * torch.sigmoid(lse.double())[..., None]).to(dtype)
        assert torch.equal(found, out) == torch.equal(rounded, out) == (off > 0)
    fused.add_sink_(found, lse, torch.full((1,), math.nan, device=device))
    assert bool(found.isnan().all())


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["n", "log n", "log n a row"])
@pytest.mark.parametrize("with_dlse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_n(device: str, layout: str, of: str, with_dlse: bool, dtype: torch.dtype) -> None:
    varlen = layout == "varlen"
    out, dout = (laid_out(torch.randn(BATCH, HEADS, ROWS, 40, device=device, dtype=dtype), layout) for _ in range(2))
    lse, dlse = rows_of(layout, device), rows_of(layout, device).nan_to_num(0.0, neginf=0.3) if with_dlse else None
    log_n = torch.tensor([-1.0, -math.inf, 2.0], device=device) if of == "log n" else None
    if of == "log n a row":
        log_n = log_n_of("a row", layout, device)  # type: ignore[assignment]
    wide = [None if x is None else x.double() for x in (dout, dlse, out, lse, log_n)]
    exact = rescale.gradient_of_n(*wide, varlen)  # type: ignore[arg-type]
    for of_dout in (dout, dout[..., :1].expand(dout.shape)):
        if of_dout is not dout:
            exact = rescale.gradient_of_n(of_dout.double(), *wide[1:], varlen)  # type: ignore[arg-type]
        got = [fused.gradient_of_n(of_dout, dlse, out, lse, log_n) for _ in range(2)]
        assert torch.equal(*got), "the same bits each time"
        assert torch.allclose(got[0].double(), exact, rtol=2e-5, atol=1e-3)


@pytest.mark.parametrize("device", PLACES)
def test_batches_of_several_tiles(device: str) -> None:
    out, dout = (torch.randn(2, 2, 300, 64, device=device) for _ in range(2))
    lse, n = torch.randn(2, 2, 300, device=device), torch.tensor([-1.0, 2.0], device=device)
    assert fused.launch_for("scale", out.device, out.dtype, out.shape, (), (), 0).programs == 2 * 2 * 3
    dn = fused.gradient_of_n(dout, None, out, lse, n)
    exact = [x.double() for x in (dout, out, lse, n)]
    assert torch.allclose(dn.double(), rescale.gradient_of_n(exact[0], None, *exact[1:], False), rtol=1e-5, atol=1e-3)
    lse_n = fused.add_sink_(out, lse, n)
    rescale.scale_(*exact[1:], False)
    assert torch.allclose(out.double(), exact[1], rtol=2e-6, atol=1e-7)
    assert torch.allclose(lse_n.double(), rescale.add_to_lse(*exact[2:], False), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", PLACES)
def test_the_gradient_of_n_is_float32_whatever_the_default(device: str) -> None:
    out, lse = torch.ones(1, 2, 4, 8, device=device), torch.zeros(1, 2, 4, device=device)
    torch.set_default_dtype(torch.float64)
    try:
        assert fused.gradient_of_n(out, None, out, lse, None).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bounded_exponential_has_finite_derivatives(dtype: torch.dtype) -> None:
    """At the largest number too, where one step of rounding is the difference to infinity."""
    end = math.log(torch.finfo(dtype).max)
    x = torch.tensor([-3.0, end - 0.03, end, end + 1e-3, end + 0.01, end + 1, math.inf], dtype=dtype).requires_grad_()
    found = bounded_exp(x)
    (dx,) = torch.autograd.grad(found.sum(), x)
    assert found.isfinite().all()
    assert dx.isfinite().all()
    assert torch.allclose(found[:2], x[:2].exp())


def test_rows_that_see_no_key_in_some_parts() -> None:
    logits, v = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    logits[:, :, 1, :3] = logits[:, :, 2, 3:] = logits[:, :, 3] = -math.inf
    (out, lse), (part, part_lse), (expected, expected_lse) = (
        ((x.softmax(-1).nan_to_num(0.0) @ of_v).float(), x.logsumexp(-1).float())
        for x, of_v in ((logits[..., :3], v[:, :, :3]), (logits[..., 3:], v[:, :, 3:]), (logits, v))
    )
    merge_(out, lse, part, part_lse)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(lse, expected_lse, atol=1e-6)


@pytest.mark.parametrize("n", [1e-40, 3e-30, 0.3, 7.0, 1e30])
@pytest.mark.parametrize("as_number", [True, False])
def test_the_weight_of_n_has_no_rounding_of_its_logarithm(n: float, as_number: bool) -> None:
    row_max = torch.tensor([math.log(n), math.log(n) + 0.5, math.log(n) + 3.0])
    found = weight_of_n(n if as_number else torch.tensor(n, dtype=torch.float64), row_max)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), (math.log(n) - row_max.double()).exp(), rtol=4e-7, atol=0)


def test_n_as_a_tensor() -> None:
    assert as_tensor(1e300, torch.device("cpu")).item() == 1e300
    assert as_tensor(1.0, torch.device("meta")).is_meta


@pytest.mark.parametrize("device", PLACES)
def test_a_gradient_that_exp_would_overflow(device: str) -> None:
    for power in (89.2, 300.0):
        out, lse = torch.zeros(1, 2, 4, 8, device=device), torch.full((1, 2, 4), -power, device=device)
        assert torch.equal(fused.gradient_of_n(out, None, out, lse, None).cpu(), torch.zeros(2))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), None),
        (ModuleNotFoundError("No module named 'triton.tools'", name="triton.tools"), "triton.tools"),
        (ImportError("libcuda.so.1: cannot open shared object file"), r"ImportError: libcuda\.so\.1"),
        (RuntimeError("0 active drivers"), "RuntimeError: 0 active drivers"),
    ],
    ids=str,
)
def test_kernels_that_cannot_be_imported(
    error: Exception, said: str | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Without Triton torch does it and nothing is said; anything else that costs the kernels is said, once."""

    def fail(module: str) -> object:
        assert module == "attn_n.sink.fused"
        raise error

    monkeypatch.setattr(rescale.importlib, "import_module", fail)
    rescale._kernels.cache_clear()
    try:
        assert rescale._kernels() is rescale._kernels() is None
    finally:
        rescale._kernels.cache_clear()
    warnings = [str(warning.message) for warning in recwarn]
    assert len(warnings) == (said is not None)
    for warning in warnings:
        assert re.search(said or "", warning)
        assert "torch applies it" in warning


@pytest.mark.gpu
def test_the_kernels_are_what_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("add_sink_", "gradient_of_n"):
        original = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *x, name=name, original=original: (ran.append(name), original(*x))[1])
    q, k, v = (torch.randn(1, 2, 40, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    n = torch.ones(2, device="cuda", requires_grad=True)
    flash_attention_n(q, k, v, sm_n=n, backend="sdpa:flash").sum().backward()
    assert ran == ["add_sink_", "gradient_of_n"]


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    out = torch.ones(2, 16, 2**21, 64, device="cuda", dtype=torch.bfloat16)
    lse = torch.zeros(out.shape[:3], device="cuda")
    lse = fused.add_sink_(out, lse, 0.0)
    assert bool((out == 0.5).all())
    assert torch.allclose(lse, torch.full((), math.log(2.0), device="cuda"))
    assert torch.allclose(
        fused.gradient_of_n(out, None, out, lse, None).double(),
        torch.tensor(-(2**22) * 0.5 * 16.0, device="cuda", dtype=torch.float64), rtol=1e-3,
    )  # fmt: skip
