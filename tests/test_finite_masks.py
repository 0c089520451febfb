"""Masks of large finite numbers: only -inf hides a key, and any other number is added to the logit in float32.

The truth is what float64 makes of that float32 sum. A whole row of `finfo.min`, with which transformers hides a row,
swallows its logits and gives the mean of the visible values. The logits here are multiples of 1/4, which are added
without a rounding in whatever order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attn_n import Gradients, Saved, flash_attention_n, flash_attention_n_varlen
from attn_n.backends import registry
from attn_n.backends.sdpa.cpu import CpuFlash
from tests.cases import INTERPRETED, why_not_usable

LOWEST = torch.finfo(torch.float32).min
NUMBERS = {
    "float32's lowest": LOWEST,
    "bfloat16's lowest": torch.finfo(torch.bfloat16).min,
    "float16's lowest": torch.finfo(torch.float16).min,
    "-1e9": -1e9,
    "-1e6": -1e6,
    "-1e4": -1e4,
    "1e9": 1e9,
    "float32's highest": -LOWEST,
    "a sum of two lowest": -math.inf,  # the float32 sum
}
BATCH, ROWS, KEYS, SIZE = 2, 9, 37, 16
# Their forward multiplies the bias by log2(e) too, and their backward knows the row sum only by the lse.
IN_BASE_2 = ("sdpa:efficient", "xformers:cutlass", "in base 2")


@dataclass(frozen=True)
class Case:
    name: str
    n: float | None = None
    sinks: tuple[float, float] | None = None
    mask: str = "rows"  # or "batch": one batch is all that number; "head": one head
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    alibi: bool = False
    softcap: float | None = None
    heads_kv: int = 2
    lse_grad: bool = True

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("rows"),
    Case("rows, no lse", lse_grad=False),
    Case("a batch", mask="batch"),
    Case("a head", mask="head", lse_grad=False),
    Case("n=1", n=1.0),
    Case("sinks, one of -inf", sinks=(-math.inf, 0.5)),
    Case("causal", causal=True),
    Case("window, a batch", window=(20, 3), mask="batch"),
    Case("GQA", heads_kv=1, lse_grad=False),
    Case("ALiBi", alibi=True),
    Case("softcap", softcap=4.0),
]


def mask_of(case: Case, number: float, dtype: torch.dtype, device: str) -> Tensor:
    if math.isfinite(number):
        number = max(-torch.finfo(dtype).max, min(number, torch.finfo(dtype).max))
    hidden = torch.rand(1, 1, ROWS, KEYS) < 0.3
    hidden[..., 0] = False
    mask = torch.zeros(1, 1, ROWS, KEYS)
    if case.mask == "batch":
        mask = torch.zeros(BATCH, 1, 1, KEYS)
        mask[1] = number
    elif case.mask == "head":
        mask = torch.zeros(1, 2, 1, 1)
        mask[:, 0] = number
    else:
        mask[:, :, 0] = number
        mask[:, :, 1] = number
        mask[:, :, 1].masked_fill_(hidden[:, :, 1], -math.inf)
        mask[:, :, 2, ::3] = number  # beside ordinary ones
        mask[:, :, 3] = -math.inf
        mask[:, :, 4, 11:] = number
        mask[:, :, 4, :11] = -math.inf
        mask[:, :, 5].masked_fill_(hidden[:, :, 5], -math.inf)
        mask[:, :, 8] = number
    return mask.to(dtype).to(device)


def exact(
    case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute out and lse in float64 from logits that are added in float32."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.mT * 0.25
    if case.softcap is not None:
        s = case.softcap * (s / case.softcap).tanh()
    distance = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    distance = distance - torch.arange(k.shape[2], device=q.device)
    rounded = s.detach().float()
    if slopes is not None:
        rounded = rounded - slopes[:, None, None] * distance.abs()
    rounded = rounded + mask.float()
    left, right = case.window or (None, None)
    if case.causal:
        right = 0
    if left is not None:
        rounded = rounded.masked_fill(distance > left, -math.inf)
    if right is not None:
        rounded = rounded.masked_fill(-distance > right, -math.inf)
    rounded = rounded.double()
    top = rounded.amax(-1, keepdim=True)
    log_n = torch.full((q.shape[1],), math.log(case.n) if case.n else -math.inf, device=q.device).double()
    log_n = (log_n if sinks is None else sinks)[:, None, None].expand(*s.shape[:-1], 1)
    top = torch.maximum(top, log_n.detach())
    top = torch.where(top == -math.inf, 0.0, top)
    # s with a gradient, and the value of the sum: d(sum) / ds = 1
    weights = (rounded - top).exp() * (1 + s - s.detach())
    total = weights.sum(-1, keepdim=True) + (log_n - top).exp()
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return weights / total @ v, (top + total.log()).masked_fill(empty, -math.inf)[..., 0]


def grids(*shape: int) -> Tensor:
    """Return numbers whose products and sums are exact."""
    return torch.randint(-1, 2, shape).double()


def check(case: Case, number: float, backend: str, dtype: torch.dtype, device: str, varlen: bool = False) -> None:
    q, k = grids(BATCH, 2, ROWS, SIZE), grids(BATCH, case.heads_kv, KEYS, SIZE)
    q[..., 0] = 2.0
    v = torch.randn(BATCH, case.heads_kv, KEYS, SIZE, dtype=torch.float64)
    tensors = [x.to(dtype).to(device).requires_grad_() for x in (q, k, v)]
    mask = mask_of(case, number, dtype if dtype.itemsize == 2 else torch.float32, device)
    slopes = torch.tensor([0.25, 0.5], device=device) if case.alibi else None
    sinks = None if case.sinks is None else torch.tensor(case.sinks, device=device, requires_grad=True)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    exact_sinks = None if sinks is None else sinks.detach().double().requires_grad_()
    out, lse = exact(case, *doubles, exact_sinks, mask, slopes)
    keywords = {
        "causal": case.causal, "window": case.window, "attn_mask": mask, "alibi_slopes": slopes, "sinks": sinks,
        "softcap": case.softcap, "sm_n": case.n, "sm_scale": 0.25, "return_lse": case.lse_grad, "backend": backend,
    }  # fmt: skip
    if varlen:
        starts_q, starts_k = (torch.arange(0, BATCH * x + 1, x, dtype=torch.int32, device=device) for x in (ROWS, KEYS))
        tokens = [x.transpose(1, 2).flatten(0, 1) for x in tensors]
        result = flash_attention_n_varlen(*tokens, starts_q, starts_k, ROWS, KEYS, **keywords)
        parts = [x.unflatten(0, (BATCH, ROWS)).transpose(1, 2) for x in (result if case.lse_grad else (result,))]
        result = tuple(parts) if case.lse_grad else parts[0]
    else:
        result = flash_attention_n(*tensors, **keywords)
    got = result if isinstance(result, tuple) else (result, None)
    dout = torch.randn(out.shape, device=device, dtype=dtype)
    dlse = torch.randn(lse.shape, device=device)
    loss, exact_loss = (got[0] * dout).sum(), (out * dout.double()).sum()
    if got[1] is not None:
        # A row without a denominator has lse = -inf, which no loss can use.
        loss = loss + (got[1] * dlse).masked_fill(lse == -math.inf, 0.0).sum()
        exact_loss = exact_loss + (lse * dlse.double()).masked_fill(lse == -math.inf, 0.0).sum()
    leaves = tensors if sinks is None else [*tensors, sinks]
    exact_leaves = doubles if exact_sinks is None else [*doubles, exact_sinks]
    gradients, exact_gradients = torch.autograd.grad(loss, leaves), torch.autograd.grad(exact_loss, exact_leaves)
    relative = 2e-5 if dtype == torch.float32 else 2e-2
    if backend in IN_BASE_2 and abs(number) > 1e3:
        relative += 2 * torch.finfo(torch.float32).eps * min(abs(number), 7e4)  # the rounding of lse
    pairs = zip(("out", "dq", "dk", "dv", "dsinks"), (got[0], *gradients), (out, *exact_gradients), strict=False)
    for name, value, truth in pairs:
        error = float(
            (value.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max().clamp(min=1.0)
        )
        assert error < relative, f"{name}: off by {error:.1e}"
    if got[1] is not None:
        assert torch.equal(got[1].isinf(), lse.isinf())
        torch.testing.assert_close(got[1].double(), lse, rtol=3e-7, atol=1e-5 if dtype == torch.float32 else 1e-3)


def calls(backend: str, few: bool = False) -> list[object]:
    """Return every case with every number; with `few`, every case with one number, and one case with all."""
    found = []
    for i, case in enumerate(CASES):
        if case.softcap is not None and backend not in ("reference", "sdpa:cpu", "triton:portable"):
            continue
        for j, number in enumerate(NUMBERS):
            if backend in IN_BASE_2 and number == "-1e6":  # its lse is rounded to sixteenths
                continue
            if not few or j == i % len(NUMBERS) or case.name == "rows":
                found.append(pytest.param(backend, case, number, id=f"{backend}-{case}-{number}"))
    return found


@pytest.mark.parametrize(
    ("backend", "case", "number"),
    [*calls("reference"), *calls("sdpa:cpu"), *(calls("triton:portable", few=True) if INTERPRETED else [])],
)
def test_on_a_cpu(backend: str, case: Case, number: str, ran: list[str]) -> None:
    check(case, NUMBERS[number], backend, torch.float32, "cpu")
    passes = ("attend",) if backend == "reference" else ("forward", "backward")
    assert set(ran) == {f"{each} {backend}" for each in passes}


@pytest.mark.parametrize("backend", ["reference", "sdpa:cpu", *(["triton:portable"] if INTERPRETED else [])])
@pytest.mark.parametrize("number", ["bfloat16's lowest", "-1e4"])
@pytest.mark.parametrize("varlen", [False, True])
def test_in_half_precision_and_varlen(backend: str, number: str, varlen: bool) -> None:
    check(CASES[0], NUMBERS[number], backend, torch.bfloat16, "cpu", varlen)


class InBase2(CpuFlash):
    """The arithmetic of the memory-efficient kernel on a bias, written in torch."""

    name = "in base 2"
    base_2 = True

    def kernel_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert bias is not None
        logits = (self._logits(q, k, scale) + bias) * math.log2(math.e)
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top.masked_fill(top == -math.inf, 0.0)).exp2()
        total = weights.sum(-1, keepdim=True)
        out = weights / total.masked_fill(total == 0, 1.0) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return out, (top / math.log2(math.e) + total.log())[..., 0]

    def kernel_backward(self, dout: Tensor, saved: Saved, causal: bool, bias: Tensor | None, scale: float) -> Gradients:
        assert bias is not None
        q, k, v, out, lse, *_ = saved
        groups = q.shape[1] // k.shape[1]
        weights = (self._logits(q, k, scale) + bias - lse[..., None]).exp()
        delta = (dout * out).sum(-1, keepdim=True)
        ds = weights * (dout @ v.repeat_interleave(groups, 1).mT - delta) * scale
        return Gradients(ds @ k.repeat_interleave(groups, 1), ds.mT @ q, weights.mT @ dout)

    def _logits(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale


@pytest.mark.parametrize(("backend", "case", "number"), calls("in base 2"))
def test_a_kernel_in_base_2(backend: str, case: Case, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._entries, backend, registry._Entry(InBase2))
    check(case, NUMBERS[number], backend, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("backend", "case", "number"),
    [
        *(one for name in ("sdpa:efficient", "triton:portable") for one in calls(name)),
        *(one for name in ("reference", "xformers:cutlass") for one in calls(name, few=True)),
    ],
)
def test_on_a_gpu(backend: str, case: Case, number: str, dtype: torch.dtype, ran: list[str]) -> None:
    if why_not_usable(backend):
        pytest.skip(f"{backend}: {why_not_usable(backend)}")
    if backend in IN_BASE_2 and dtype != torch.float32 and case.alibi:
        pytest.skip("rounds ALiBi to half precision, and refuses")
    check(case, NUMBERS[number], backend, dtype, "cuda")
    passes = ("attend",) if backend == "reference" else ("forward", "backward")
    assert set(ran) == {f"{each} {backend}" for each in passes}


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """A call can be captured in a CUDA graph: the host does not read which rows have such a bias."""
    q, k, v = (torch.randn(1, 2, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.zeros(8, 8, device="cuda", dtype=torch.bfloat16)
    mask[3] = NUMBERS["bfloat16's lowest"]
    for backend in ("sdpa:efficient", "triton:portable"):
        for _ in range(3):  # compiled before it is captured
            gradients = torch.autograd.grad(
                flash_attention_n(q, k, v, attn_mask=mask, backend=backend).sum(), (q, k, v)
            )
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flash_attention_n(q, k, v, attn_mask=mask, backend=backend)
            captured = torch.autograd.grad(out.sum(), (q, k, v))
        graph.replay()
        torch.testing.assert_close(out[:, :, 3], v.mean(2), atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(captured, gradients)


@pytest.mark.parametrize("backend", ["reference", "sdpa:cpu", *(["triton:portable"] if INTERPRETED else [])])
def test_the_gradient_of_n_at_zero_is_no_nan(backend: str) -> None:
    """Where exp(-lse) overflows, the terms of two rows could be infinite and of opposite sign, and their sum NaN."""
    q, k, v = (torch.randn(1, 2, 4, 16) for _ in range(3))
    n, mask = torch.zeros(2, requires_grad=True), torch.full((4, 4), LOWEST)
    mask[0] = 0.0
    out = flash_attention_n(q, k, v, sm_n=n, attn_mask=mask, backend=backend)
    rows = torch.tensor([0.0, 100.0, -100.0, 0.0])[:, None]
    assert torch.autograd.grad(out, n, (out.detach() * rows))[0].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "sdpa:cpu", *(["triton:portable"] if INTERPRETED else [])])
def test_a_sink_as_large_as_the_logits(backend: str) -> None:
    """A sink of 2,000 is part of the lse by right: beside logits of 2,000 it takes half of each row."""
    q, k = (torch.zeros(1, 2, 4, 16, requires_grad=True) for _ in range(2))
    v, mask = torch.randn(1, 2, 1, 16, requires_grad=True), torch.full((4, 1), 2000.0)
    out = flash_attention_n(q, k[:, :, :1], v, sinks=torch.full((2,), 2000.0), attn_mask=mask, backend=backend)
    (dv,) = torch.autograd.grad(out.sum(), v)
    assert torch.allclose(out, v / 2)
    assert torch.allclose(dv, torch.full_like(dv, 2.0), rtol=1e-3)
