"""The gradients of a floating mask and of ALiBi slopes; the case table has them on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attn_n
from attn_n import flash_attention_n
from tests.cases import INTERPRETED
from tests.oracle import attention_n
from tests.places import PLACES, slow

pytest.importorskip("triton")

from attn_n.backends.triton.kernel_key import describe
from attn_n.backends.triton.portable import configs, prepare
from attn_n.backends.triton.portable.configs import Config
from attn_n.call import Options

SHAPES = ((2, 2, 34, 40), (1, 2, 34, 40), (2, 1, 34, 40), (2, 1, 1, 40), (1, 2, 34, 1), (1, 1, 1, 1), (40,))


def inputs(device: str, mask: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return q, k, v with negative logits, a mask, and slopes; several tiles of them, or few if the mask has few."""
    len_q, len_k = (5, 7) if mask[-1] == 7 else (34, 40)
    q, k, v = (torch.randn(2, *shape, 16, device=device, dtype=dtype) for shape in ((2, len_q), (1, len_k), (1, len_k)))
    q[..., 0], k[..., 0] = -2.0, 3.0
    slopes = torch.linspace(0.1, 0.9, 2, device=device)
    return [x.requires_grad_() for x in (q, k, v, torch.randn(mask, device=device), slopes)]


def ours(*x: Tensor, **options: Any) -> Tensor:
    return flash_attention_n(*x[:3], sm_n=2.0, attn_mask=x[3], alibi_slopes=x[4], window=(30, 20), **options)


def exact(x: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    wide = [each.detach().double().requires_grad_() for each in x]
    mask = wide[3].expand(2, 2, x[0].shape[2], x[1].shape[2])
    out = attention_n(*wide[:3], 2.0, mask=mask, window=(30, 20), alibi_slopes=wide[4])[0]
    return torch.autograd.grad(out, wide, dout.double())


def check(found: tuple[Tensor, ...], x: list[Tensor], dout: Tensor) -> None:
    for got, expected, leaf in zip(found, exact(x, dout), x, strict=True):
        assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)
        assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], *slow(*(SHAPES[i] for i in (0, 2, 4, 5, 6)))], ids=str)
def test_what_is_broadcast_is_added_up(shape: tuple[int, ...], device: str, ran: list[str]) -> None:
    x = inputs(device, shape)
    dout = torch.randn_like(x[0])
    found = [torch.autograd.grad(ours(*x, backend="triton:portable"), x, dout) for _ in range(2)]
    assert ran == ["forward triton:portable", "backward triton:portable"] * 2
    check(found[0], x, dout)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "the same bits each time"


@pytest.mark.parametrize("device", PLACES)
def test_an_expanded_mask(device: str) -> None:
    """Its memory has one number for all heads, its gradient one for each."""
    x = inputs(device, (2, 1, 5, 7))
    x[3] = x[3].detach().expand(2, 2, 5, 7).requires_grad_()
    dout = torch.randn_like(x[0])
    check(torch.autograd.grad(ours(*x, backend="triton"), x, dout), x, dout)


@pytest.mark.parametrize("device", PLACES)
def test_a_float32_mask_beside_half_precision(device: str) -> None:
    x = inputs(device, (1, 2, 5, 7), torch.bfloat16)
    dout = torch.randn_like(x[0])
    found = torch.autograd.grad(ours(*x, backend="triton"), x, dout)
    assert [gradient.dtype for gradient in found[3:]] == [torch.float32, torch.float32]
    for got, expected in zip(found[3:], exact(x, dout)[3:], strict=True):
        assert float((got - expected).abs().max()) < 0.02 * float(expected.abs().max())


@pytest.fixture
def by_descriptors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several small tiles, loaded by descriptors, and several tiles of the mask for each program of its gradient."""
    sizes = {"forward": (32, 16), "dq": (32, 16), "dk and dv": (16, 32), "dmask": (16, 16)}
    monkeypatch.setattr(configs, "find", lambda kernel, key: Config(*sizes[kernel], 4, 2, descriptors=True))
    monkeypatch.setattr(prepare, "PROGRAMS", 2)
    prepare._calls.clear()
    yield
    prepare._calls.clear()


@pytest.mark.usefixtures("by_descriptors")
@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("window", [(20, 0), *slow((None, None))], ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (2, 1), *slow((2, 4), (1, 1))], ids=str)
def test_masks_by_descriptors(shape: tuple[int, int], window: tuple[int | None, int | None], device: str) -> None:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16)

    x = [normal(2, heads, length, 16) for heads, length in ((4, 40), (2, 56), (2, 56))]
    x = [each.requires_grad_() for each in (*x, normal(*shape, 40, 56))]
    assert describe((*x[:3],), None, Options(0.25, mask=x[3])).mask_fits_descriptors
    dout = normal(2, 4, 40, 16)
    out = flash_attention_n(*x[:3], sm_n=2.0, attn_mask=x[3], window=window, backend="triton:portable")
    wide = [each.detach().double().requires_grad_() for each in x]
    expected = attention_n(*wide[:3], 2.0, mask=wide[3].expand(2, 4, 40, 56), window=window)[0]
    assert torch.allclose(out.double(), expected, atol=0.02 * float(expected.detach().abs().max()))
    exact = torch.autograd.grad(expected, wide, dout.double())
    for got, right in zip(torch.autograd.grad(out, x, dout), exact, strict=True):
        assert float((got - right).abs().max()) < 0.02 * float(right.abs().max())


@pytest.mark.usefixtures("by_descriptors")
@pytest.mark.parametrize("device", PLACES)
def test_an_unaligned_mask_after_an_aligned_one(device: str) -> None:
    q, k, v = (torch.randn(1, 2, 32, 16, device=device, dtype=torch.bfloat16) for _ in range(3))
    memory = torch.randn(2 * 32 * 32 + 1, device=device, dtype=torch.bfloat16)
    for start in (0, 1):
        mask = memory[start : start + 2 * 32 * 32].view(1, 2, 32, 32).requires_grad_()
        of = [x.requires_grad_() for x in (q, k, v)]
        out = flash_attention_n(*of, attn_mask=mask, backend="triton:portable")
        expected = flash_attention_n(*of, attn_mask=mask, backend="reference")
        assert torch.allclose(out, expected, atol=0.03)
        dout = torch.randn_like(out)
        found, right = (torch.autograd.grad(y, (*of, mask), dout) for y in (out, expected))
        assert all(torch.allclose(a, b, atol=0.1) for a, b in zip(found, right, strict=True))


def test_only_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare._calls.clear()
    made = []
    launch = prepare.launch_of_dmask
    monkeypatch.setattr(prepare, "launch_of_dmask", lambda *of: made.append(of) or launch(*of))
    device = "cpu" if INTERPRETED else "cuda"
    x = inputs(device, (1, 2, 5, 7))
    without = [*x[:3], *[each.detach() for each in x[3:]]]
    ours(*without, backend="triton").sum().backward()
    ours(*x[:3], without[3], x[4], backend="triton").sum().backward()
    assert x[4].grad is not None
    assert made == []
    ours(*[each.detach() for each in x[:3]], x[3], without[4], backend="triton").sum().backward()
    assert x[3].grad is not None
    assert len(made) == 1


def under_func_grad(x: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.func.grad(lambda *y: (ours(*y, backend="triton") * dout).sum(), tuple(range(5)))(*x))


def under_a_checkpoint(x: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(checkpoint(lambda *y: ours(*y, backend="triton"), *x, use_reentrant=False), x, dout)


def under_compile(x: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    attend = torch.compile(lambda *y: ours(*y, backend="triton"), fullgraph=True, backend="aot_eager")
    return torch.autograd.grad(attend(*x), x, dout)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("run", [under_func_grad, under_a_checkpoint, under_compile])
def test_other_ways_to_differentiate(run: Any, device: str) -> None:
    x = inputs(device, (2, 1, 5, 7))
    dout = torch.randn_like(x[0])
    check(run(x, dout), x, dout)


def test_vmap() -> None:
    device = "cpu" if INTERPRETED else "cuda"
    many = [inputs(device, (1, 2, 5, 7)) for _ in range(2)]
    douts = [torch.randn_like(x[0]) for x in many]

    def gradients(dout: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.grad(lambda *y: (ours(*y, backend="triton") * dout).sum(), tuple(range(5)))(*x))

    stacked = [torch.stack([x[i].detach() for x in many]) for i in range(5)]
    found = torch.vmap(gradients)(torch.stack(douts), *stacked)
    for i, (x, dout) in enumerate(zip(many, douts, strict=True)):
        check(tuple(gradient[i] for gradient in found), x, dout)


def test_no_keys() -> None:
    q, mask = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 5, 0, requires_grad=True)
    k = torch.randn(1, 2, 0, 8)
    out = flash_attention_n(q, k, k, sm_n=1.0, attn_mask=mask, backend="triton" if INTERPRETED else "reference")
    of_mask, of_q = torch.autograd.grad(out.sum(), (mask, q))
    assert of_mask.shape == mask.shape
    assert not of_q.any()


def test_who_serves_it() -> None:
    q = torch.randn(1, 2, 5, 8)
    said = attn_n.explain(q, q, q, attn_mask=torch.randn(5, 5, requires_grad=True), sm_n=1.0)
    reasons = {verdict.name: verdict.reason for verdict in said.verdicts}
    assert reasons["sdpa"] == "cpu: has no gradient of attn_mask"
    assert reasons["reference"] is None
    assert (reasons["triton"] is None) == INTERPRETED
