"""`attn_n.testing.check_attention` names each mistake, and finds none in what is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_n import flash_attention_n, merge_attention, softmax_n
from attn_n.testing import check_attention

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def with_nothing(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """gpt-oss's way: the sink is one more logit, which is dropped after the softmax."""
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).to(torch.promote_types(q.dtype, torch.float32))
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    of_sinks = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
    return softmax_n(torch.cat([logits, of_sinks], -1))[..., :-1].to(q.dtype) @ v


def rescaled(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """Compute the same by eager operations, which keep the gradient of lse."""
    logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    share = (logits.logsumexp(-1) - sinks[:, None]).sigmoid()
    return (logits.softmax(-1) @ v.to(logits.dtype) * share[..., None]).to(q.dtype)


def merged(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    parts = [flash_attention_n(q, *part, return_lse=True) for part in zip(k.chunk(4, 2), v.chunk(4, 2), strict=True)]
    return merge_attention(*zip(*parts, strict=True), sinks=sinks)[0]


def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return flash_attention_n(q, k, v, sinks=sinks, attn_mask=attn_mask)


RIGHT: dict[str, Callable[..., Any]] = {
    "attn_n": ours,
    "attn_n, reference": lambda q, k, v, sinks: flash_attention_n(
        q, k, v, sinks=sinks, return_lse=True, backend="reference"
    ),
    "one more logit": with_nothing,
    "rescaled": rescaled,
    "merged": merged,
}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, *(pytest.param(x, marks=slow) for x in (torch.float16, torch.float64))]
)
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name: str, dtype: torch.dtype) -> None:
    report = check_attention(RIGHT[name], dtype=dtype)
    assert report.passed, report
    assert len(report.checked) + len(report.left_out) == 6
    assert ("hidden rows" in report.checked) == (name in ("attn_n", "one more logit"))


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's kernel, whose backward drops the gradient of lse."""
    out, lse = FLASH(q, k, v)
    return out, lse


def lse_without_gradient(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    out, lse = flash(q, k, v)
    return out * (lse - sinks[:, None]).sigmoid()[..., None].to(out.dtype)


class Rescaling(torch.autograd.Function):
    """A kernel's backward with the out and the lse of plain softmax."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse = flash(q, k, v)
        share = (lse - sinks[:, None]).sigmoid()[..., None].to(out.dtype)
        ctx.save_for_backward(q, k, v, out, lse, share)
        return out * share

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse, share = ctx.saved_tensors
        of_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = of_kernel(dout * share, q, k, v, out, lse, 0.0, False)
        return *gradients, -(dout * out * share * (1 - share)).sum((0, 2, 3)).float()


def detached(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    share = (logits.float().logsumexp(-1).detach() - sinks[:, None]).sigmoid()
    return logits.softmax(-1) @ v * share[..., None].to(q.dtype)


@torch.no_grad()
def _share(q: Tensor, k: Tensor, sinks: Tensor) -> Tensor:
    lse = (q @ k.mT / math.sqrt(q.shape[-1])).float().logsumexp(-1)
    return (lse - sinks[:, None]).sigmoid()[..., None].to(q.dtype)


def half_lse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """As FlexAttention's lse, cast to the dtype of the values, is."""
    logits = (q @ k.mT).float() / math.sqrt(q.shape[-1])
    share = (logits.logsumexp(-1).bfloat16() - sinks[:, None]).sigmoid()
    return (logits.softmax(-1) @ v.float() * share[..., None]).to(q.dtype)


def split(parts: int) -> Callable[..., Tensor]:
    """Split-KV, each part with the sinks."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        found = [
            flash_attention_n(q, *part, sinks=sinks, return_lse=True)
            for part in zip(k.chunk(parts, 2), v.chunk(parts, 2), strict=True)
        ]
        return merge_attention(*zip(*found, strict=True))[0]

    return attend


def finite(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    bias = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=q.dtype)
    if bias is not None:
        bias = bias.masked_fill(~attn_mask, torch.finfo(q.dtype).min)
    return flash_attention_n(q, k, v, sinks=sinks, attn_mask=bias)


def overflows(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """The maximum of the logits is subtracted, without the sinks."""
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).float()
    row_max = logits.detach().amax(-1, keepdim=True)
    weights = (logits - row_max).exp()
    return (weights / (weights.sum(-1, keepdim=True) + (sinks[:, None, None] - row_max).exp())).to(q.dtype) @ v


WRONG: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "dropped": (lambda q, k, v, sinks: F.scaled_dot_product_attention(q, k, v), {"sinks dropped"}),
    "dropped, with masks": (
        lambda q, k, v, sinks, attn_mask=None: flash_attention_n(q, k, v, attn_mask=attn_mask), {"sinks dropped"},
    ),
    "detached": (detached, {"lse gradient lost"}),
    "lse without gradient": (lse_without_gradient, {"lse gradient lost"}),
    "a backward of plain softmax": (Rescaling.apply, {"lse gradient lost"}),
    "all detached": (
        lambda q, k, v, sinks: F.scaled_dot_product_attention(q, k, v) * _share(q, k, sinks),
        {"lse gradient lost", "sinks without gradient"},
    ),
    "sinks detached": (lambda q, k, v, sinks: ours(q, k, v, sinks.detach()), {"sinks without gradient"}),
    "half lse": (half_lse, {"lse in bfloat16"}),
    "twice": (split(2), {"sinks counted several times"}),
    "five times": (split(5), {"sinks counted several times"}),
    "finite mask": (finite, {"finite mask"}),
    "forward alone": (lambda q, k, v, sinks: ours(q, k, v, sinks).detach(), {"no gradient"}),
    "half of n": (lambda q, k, v, sinks: ours(q, k, v, sinks - math.log(2)), {"unknown"}),
    "dv": (lambda q, k, v, sinks: ours(q, k, v.detach() + (v - v.detach()) / 2, sinks), {"unknown"}),
    "overflow": (overflows, {"not finite"}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow)])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str, dtype: torch.dtype) -> None:
    fn, errors = WRONG[name]
    report = check_attention(fn, dtype=dtype)
    assert report.errors == errors, report
    for error in errors:
        assert f"{error}: " in str(report)


def test_half_precision_does_not_hide_a_half_lse() -> None:
    assert check_attention(half_lse, dtype=torch.bfloat16).errors == {"lse in bfloat16"}


def test_what_is_said() -> None:
    report = check_attention(split(3))
    assert not report.passed
    assert "few keys: out is off by 0.2" in str(report)
    assert ", sinks counted 3 times" in str(report)
    assert "not checked: hidden rows: the function has no argument attn_mask" in str(report)
    inference = check_attention(lambda q, k, v, sinks: ours(q, k, v, sinks).detach(), gradients=False)
    assert inference.passed
    assert "passed: few keys, many keys" in str(inference)
    assert "not checked: gradients: as was asked" in str(inference)
    with pytest.raises(ValueError, match=r"fn: expected a result of shape \(2, 4, 5, 64\), got \(2, 5, 4, 64\)"):
        check_attention(lambda q, k, v, sinks: ours(q, k, v, sinks).transpose(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [None, "triton:portable", "sdpa", "reference"])
def test_ours_on_a_gpu(backend: str | None, dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return flash_attention_n(q, k, v, sinks=sinks, attn_mask=attn_mask, backend=backend)

    report = check_attention(attend, dtype=dtype, device="cuda")
    assert report.passed, report
