"""torch.func, torch.vmap, batched gradients and forward-mode AD are served, by `reference` where needed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import attn_n
from attn_n import UnsupportedError, flash_attention_n, flash_attention_n_varlen
from tests.cases import INTERPRETED
from tests.oracle import attention_n
from tests.places import slow

BACKENDS = [None, "reference", *(["triton"] if INTERPRETED else [])]
STARTS = torch.tensor([0, 3, 7], dtype=torch.int32)


def inputs(*leading: int, dtype: torch.dtype = torch.float64, heads_kv: int = 2) -> list[Tensor]:
    """Return q, k, v with negative logits, and sinks."""
    q, k, v = (torch.randn(*leading, heads, 5, 8, dtype=dtype) for heads in (4, heads_kv, heads_kv))
    q[..., 0], k[..., 0] = -2.0, 3.0
    return [q, k, v, torch.linspace(-1.0, 1.0, 4, dtype=dtype)]


def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, **options: Any) -> Tensor:
    return flash_attention_n(q, k, v, True, sinks=sinks, **options)


def exact(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return attention_n(q, k, v, sinks=sinks, causal=True)[0]


def loss_of(attend: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda *x: (attend(*x, **options).sin() * torch.arange(1.0, 9.0, dtype=x[0].dtype)).sum()


def equal(got: Any, expected: Any, tolerance: float) -> bool:
    return all(
        torch.allclose(a.double(), b.double(), atol=tolerance)
        for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True)
    )


def dtype_of(backend: str | None) -> tuple[torch.dtype, float]:
    return (torch.float32, 1e-4) if backend == "triton" else (torch.float64, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_vjp_jacrev(backend: str | None, ran: list[str]) -> None:
    dtype, tolerance = dtype_of(backend)
    x = inputs(2, dtype=dtype)
    every = (0, 1, 2, 3)
    got = torch.func.grad(loss_of(ours, backend=backend), every)(*x)
    assert equal(got, torch.func.grad(loss_of(exact), every)(*[each.double() for each in x]), tolerance)
    out, pull = torch.func.vjp(lambda *x: ours(*x, backend=backend), *x)
    expected, exact_pull = torch.func.vjp(exact, *[each.double() for each in x])
    assert equal((out, pull(out)), (expected, exact_pull(expected)), tolerance)
    if backend != "triton":  # one call for each number, by the slow interpreter
        short = [x[0][:1, :, :2], x[1][:1], x[2][:1], x[3]]
        got = torch.func.jacrev(lambda *x: ours(*x, backend=backend), every)(*short)
        assert equal(got, torch.func.jacrev(exact, every)(*[each.double() for each in short]), tolerance)
    kernel = {None: "forward sdpa:cpu", "triton": "forward triton:portable", "reference": "attend reference"}[backend]
    assert kernel in ran


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "in_dims", [(1, None, None, None), (0, 0, 0, 0), *slow((0, 0, 0, None), (None, None, None, 0))], ids=str
)
def test_vmap(backend: str | None, in_dims: tuple[int | None, ...], ran: list[str]) -> None:
    """torch.vmap works over the batch, over another dimension of q alone, and over the sinks."""
    dtype, tolerance = dtype_of(backend)
    x = inputs(2, dtype=dtype)
    x = [
        each if dim is None else torch.stack([each, each.flip(0), 0.5 * each], dim)
        for each, dim in zip(x, in_dims, strict=True)
    ]
    wide = [each.double() for each in x]
    assert equal(
        torch.vmap(lambda *x: ours(*x, backend=backend), in_dims)(*x), torch.vmap(exact, in_dims)(*wide), tolerance
    )
    # per-sample gradients
    got = torch.vmap(torch.func.grad(loss_of(ours, backend=backend), (0, 1, 2, 3)), in_dims)(*x)
    assert equal(got, torch.vmap(torch.func.grad(loss_of(exact), (0, 1, 2, 3)), in_dims)(*wide), tolerance)
    # the gradient of a loss over all samples
    got = torch.func.grad(lambda *x: torch.vmap(loss_of(ours, backend=backend), in_dims)(*x).sum(), (0, 1, 2, 3))(*x)
    expected = torch.func.grad(lambda *x: torch.vmap(loss_of(exact), in_dims)(*x).sum(), (0, 1, 2, 3))(*wide)
    assert equal(got, expected, tolerance)
    if backend is None:
        assert set(ran) == {"forward sdpa:cpu", "backward sdpa:cpu"}


def test_vmap_joins_the_batch(ran: list[str]) -> None:
    """One kernel serves all samples, unless n, a mask or varlen sequences keep them apart."""
    x = inputs(3, 2, heads_kv=1)
    got = torch.vmap(ours, (0, 0, 0, None))(*x)
    assert ran == ["forward sdpa:cpu"]
    assert torch.equal(got, torch.stack([ours(*each, x[3]) for each in zip(*x[:3], strict=True)]))
    ran.clear()
    torch.vmap(lambda q, k, v, mask: flash_attention_n(q, k, v, sm_n=1.0, attn_mask=mask))(
        *x[:3], torch.rand(3, 5, 5) > 0.3
    )
    assert ran == ["forward sdpa:cpu"] * 3


@pytest.mark.parametrize(
    ("mask", "sinks", "calls"),
    [
        ((5, 5), (4,), 1),
        ((1, 4, 5, 5), (4,), 1),
        ((2, 1, 5, 5), (4,), 3),
        (None, (1, 4, 5), 1),
        (None, (1, 1, 5), 1),
        (None, (2, 4, 5), 3),
    ],
)
def test_what_all_of_a_batch_share_joins(
    mask: tuple[int, ...] | None, sinks: tuple[int, ...], calls: int, ran: list[str]
) -> None:
    q, k, v, _ = inputs(3, 2)
    attn_mask, n = None if mask is None else torch.randn(mask, dtype=q.dtype), torch.randn(sinks, dtype=q.dtype)
    attend = lambda *x: flash_attention_n(*x, sinks=n, attn_mask=attn_mask, backend="sdpa")  # noqa: E731
    expected = [attention_n(*each, sinks=n, mask=attn_mask)[0] for each in zip(q, k, v, strict=True)]
    assert torch.allclose(torch.vmap(attend)(q, k, v), torch.stack(expected))
    assert ran == ["forward sdpa:cpu"] * calls


def test_vmap_of_varlen_sequences_and_masks() -> None:
    q, k, v = (torch.randn(3, 7, 2, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.randn(3, 5, 5, dtype=torch.float64)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention_n_varlen(q, k, v, STARTS, STARTS, 4, 4, sm_n=1.0)

    expected = torch.stack([varlen(*one) for one in zip(q, k, v, strict=True)])
    assert torch.allclose(torch.vmap(varlen)(q, k, v), expected)

    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        return flash_attention_n(q, k, v, sm_n=1.0, attn_mask=mask)

    x = inputs(3)[:3]
    for one in (mask, mask > 0):
        expected = torch.stack([masked(*each) for each in zip(*x, one, strict=True)])
        assert torch.allclose(torch.vmap(masked)(*x, one), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients(backend: str | None) -> None:
    """Batched gradients work, as PyTorch's gradcheck of SDPA and autograd.functional.jacobian(vectorize=True) need."""
    dtype, tolerance = dtype_of(backend)
    x = [each.requires_grad_() for each in inputs(1, dtype=dtype)]
    wide = [each.detach().double().requires_grad_() for each in x]
    with warnings.catch_warnings():  # PyTorch warns that its fallback is slow
        warnings.simplefilter("ignore")
        out, lse = flash_attention_n(*x[:3], True, sinks=x[3], return_lse=True, backend=backend)
        douts, dlses = torch.randn(3, *out.shape, dtype=dtype), torch.randn(3, *lse.shape, dtype=lse.dtype)
        got = torch.autograd.grad((out, lse), x, (douts, dlses), is_grads_batched=True)
        if backend != "triton":
            got_jacobian = torch.autograd.functional.jacobian(
                lambda *x: ours(*x, backend=backend), tuple(x), vectorize=True
            )
            assert equal(got_jacobian, torch.autograd.functional.jacobian(exact, tuple(wide)), tolerance)
    exact_out, exact_lse = attention_n(*wide[:3], sinks=wide[3], causal=True)
    expected = [
        torch.autograd.grad((exact_out, exact_lse), wide, (dout.double(), dlse.double()), retain_graph=True)
        for dout, dlse in zip(douts, dlses, strict=True)
    ]
    assert equal(got, [torch.stack(each) for each in zip(*expected, strict=True)], tolerance)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradcheck_with_batched_gradients() -> None:
    x = [each.requires_grad_() for each in inputs(1)]
    assert torch.autograd.gradcheck(ours, x, check_batched_grad=True, check_forward_ad=True)


@pytest.mark.parametrize("of", range(4))
def test_forward_mode(of: int, ran: list[str]) -> None:
    """The tangent of each input is right, and the automatic choice takes a backend that can compute it."""
    x, tangent = inputs(2), torch.randn(inputs(2)[of].shape, dtype=torch.float64)

    def along(attend: Callable[..., Tensor], **options: Any) -> Tensor:
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(each, tangent) if i == of else each for i, each in enumerate(x)]
            return forward_ad.unpack_dual(attend(*dual, **options)).tangent

    assert torch.allclose(along(ours), along(exact), atol=1e-10)
    by_func = torch.func.jvp(lambda one: ours(*x[:of], one, *x[of + 1 :]), (x[of],), (tangent,))[1]
    assert torch.allclose(by_func, along(exact), atol=1e-10)
    assert set(ran) == {"attend reference"}
    for backend in ("sdpa", "triton"):
        with pytest.raises(UnsupportedError, match=rf"{backend}: forward-mode AD is served by .* reference"):
            along(ours, backend=backend)
    with forward_ad.dual_level():  # a call without tangents
        ours(*x)
    assert ran[-1] == "forward sdpa:cpu"


def test_hessians() -> None:
    """Second derivatives are right, forward over reverse and reverse over reverse."""
    x = [each[:, :, :2] if each.dim() == 4 else each for each in inputs(1)]
    for transform in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.grad(f))):
        for of in (0, 3):
            got, expected = (
                transform(lambda one, f=f, of=of: f(*x[:of], one, *x[of + 1 :]))(x[of])
                for f in (loss_of(ours), loss_of(exact))
            )
            assert torch.allclose(got, expected, atol=1e-9)
    with pytest.raises(UnsupportedError, match=r"sdpa: differentiated twice by torch\.func"):
        torch.func.jacrev(torch.func.grad(lambda q: loss_of(ours, backend="sdpa")(q, *x[1:])))(x[0])


def test_explain_says_why() -> None:
    x = inputs(2)
    tokens = torch.randn(7, 4, 8)
    with forward_ad.dual_level():
        of_varlen = attn_n.explain(forward_ad.make_dual(tokens, tokens), tokens, tokens, STARTS, STARTS, 4, 4)
        explanation = attn_n.explain(forward_ad.make_dual(x[0], x[0]), *x[1:3], sinks=x[3])
    assert of_varlen.call.transform == explanation.call.transform == "forward-mode AD"
    assert explanation.chosen == "reference"
    assert "forward-mode AD" in str(explanation.call)
    assert "sdpa        no: forward-mode AD is served by differentiable operations alone" in str(explanation)


def test_dropout_under_vmap() -> None:
    q = torch.eye(16).expand(3, 1, 1, 16, 16)
    attend = lambda q: flash_attention_n(q, q, q, sm_n=1.0, dropout_p=0.5, backend="triton")  # noqa: E731
    if INTERPRETED:
        with pytest.raises(RuntimeError, match="randomness='different'"):
            torch.vmap(attend)(q)
        out = torch.vmap(attend, randomness="different")(q)
        assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("of", ["mask", "slopes"])
def test_a_batched_mask_has_its_gradient(of: str, ran: list[str]) -> None:
    """A batched mask gets its gradient, though torch.vmap hides that its tensors require one."""
    q, k, v, _ = inputs(2)
    x = torch.randn(3, 5, 5, dtype=torch.float64) if of == "mask" else torch.rand(3, 4, dtype=torch.float64)

    def attend(x: Tensor) -> Any:
        return flash_attention_n(q, k, v, sm_n=1.0, **{"attn_mask" if of == "mask" else "alibi_slopes": x})

    def truth(x: Tensor) -> Tensor:
        return attention_n(q, k, v, 1.0, **{"mask" if of == "mask" else "alibi_slopes": x})[0]

    expected = torch.func.grad(lambda x: torch.stack([truth(one) for one in x]).square().sum())(x)
    assert torch.allclose(torch.func.grad(lambda x: torch.vmap(attend)(x).square().sum())(x), expected)
    assert torch.allclose(torch.vmap(torch.func.grad(lambda x: attend(x).square().sum()))(x), expected)
    leaf = x.clone().requires_grad_()
    assert torch.allclose(torch.autograd.grad(torch.vmap(attend)(leaf).square().sum(), leaf)[0], expected)
    assert set(ran) == {"attend reference"}


def test_all_derivatives_at_n_zero() -> None:
    """All derivatives at n = 0 are right, since the denominator is linear in n."""
    q, k, v, _ = inputs(1)
    zero = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)

    def attend(n: Tensor, **options: Any) -> Any:
        return flash_attention_n(q, k, v, True, sm_n=n, backend="reference", **options)

    def truth(n: Tensor) -> Tensor:  # the oracle without its bounds, which have no second derivative
        weights = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)).exp().tril()
        return weights @ v.repeat_interleave(2, 1) / (weights.sum(-1) + n[:, None])[..., None]

    tangent = torch.rand(4, dtype=torch.float64)
    for one in (attend, lambda n: attend(n, softcap=1e6)):
        assert torch.allclose(one(zero), truth(zero))
        assert torch.allclose(
            torch.func.jvp(one, (zero,), (tangent,))[1], torch.func.jvp(truth, (zero,), (tangent,))[1]
        )
        assert torch.allclose(torch.func.jacrev(one)(zero), torch.func.jacrev(truth)(zero))
        assert torch.allclose(
            torch.func.hessian(lambda n, one=one: one(n).sin().sum())(zero),
            torch.func.hessian(lambda n: truth(n).sin().sum())(zero),
        )
    batch = torch.zeros(3, 4, dtype=torch.float64)
    got, expected = (torch.func.grad(lambda n, f=f: torch.vmap(f)(n).square().sum())(batch) for f in (attend, truth))
    assert torch.allclose(got, expected)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_transforms_within_a_graph(backend: str | None) -> None:
    torch.compiler.reset()
    x = inputs(3, 2)
    for transform, in_dims in (
        (lambda f: torch.vmap(f, (0, 0, 0, None)), (0, 0, 0, None)),
        (lambda f: torch.func.grad(lambda *x: f(*x).square().sum(), (0, 3)), None),
    ):
        function = transform(lambda *x: ours(*x, backend=backend))
        arguments = x if in_dims else [*[one[0] for one in x[:3]], x[3]]
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
        assert equal(got, transform(exact)(*arguments), 1e-9)
    torch.compiler.reset()


def test_forward_mode_around_a_graph() -> None:
    x = inputs(1)
    tangent = torch.rand_like(x[0])
    expected = torch.func.jvp(lambda q: exact(q, *x[1:]), (x[0],), (tangent,))[1]
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], tangent)
        if torch.__version__ >= "2.15":
            with pytest.raises(torch._dynamo.exc.Unsupported, match="a dual tensor input"):
                compiled(dual, *x[1:])
        else:
            assert torch.allclose(forward_ad.unpack_dual(compiled(dual, *x[1:])).tangent, expected)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # by torch.func.linearize
def test_odd_transforms(ran: list[str]) -> None:
    q, k, v, sinks = inputs(2)
    mask = torch.rand(3, 5, 5) > 0.3
    capped = torch.vmap(lambda m: flash_attention_n(q, k, v, sm_n=1.0, softcap=3.0, attn_mask=m))(mask)
    assert torch.allclose(capped[1], flash_attention_n(q, k, v, sm_n=1.0, softcap=3.0, attn_mask=mask[1]))
    with forward_ad.dual_level():
        out = torch.vmap(lambda q: ours(q, k, v, sinks))(torch.stack([q, q]))
    assert torch.allclose(out[0], exact(q, k, v, sinks))
    assert torch.vmap(lambda q: ours(q, k, v, sinks))(q.new_empty(0, *q.shape)).shape == (0, *q.shape)
    assert torch.allclose(torch.func.functionalize(ours)(q, k, v, sinks), exact(q, k, v, sinks))
    _, linear = torch.func.linearize(lambda n: flash_attention_n(q, k, v, True, sm_n=n), sinks.exp())
    tangent = torch.rand_like(sinks)
    expected = torch.func.jvp(lambda n: attention_n(q, k, v, n, causal=True)[0], (sinks.exp(),), (tangent,))[1]
    assert torch.allclose(linear(tangent), expected)


def test_a_planned_call_has_tangents_too() -> None:
    x = inputs(2)
    for _ in range(2):
        ours(*x)
    with forward_ad.dual_level():
        out = ours(forward_ad.make_dual(x[0], x[1].repeat_interleave(2, 1)), *x[1:])
        assert forward_ad.unpack_dual(out).tangent is not None


def test_tangents_of_a_backward_alone() -> None:
    """A backward whose forward has run without tangents refuses a tangent, and does not drop it silently."""
    x = [each.requires_grad_() for each in inputs(1)]
    out = ours(*x, backend="sdpa")
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="'sdpa:cpu' has no double backward"):
        torch.autograd.grad(out, x[0], forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))
    _, pull = torch.func.vjp(lambda *x: ours(*x, backend="sdpa"), *[each.detach() for each in x])
    with pytest.raises(UnsupportedError, match="has no double backward"):
        torch.func.jvp(pull, (torch.ones_like(out),), (torch.ones_like(out),))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients_of_the_lse_alone() -> None:
    x = [each.requires_grad_() for each in inputs(1)]
    _, lse = flash_attention_n(*x[:3], True, sinks=x[3], return_lse=True)
    _, exact_lse = attention_n(*x[:3], sinks=x[3], causal=True)
    batch = torch.randn(3, *lse.shape, dtype=torch.float64)
    got, expected = (
        torch.autograd.grad(y, (x[0], x[3]), batch, is_grads_batched=True, retain_graph=True) for y in (lse, exact_lse)
    )
    assert equal(got, expected, 1e-9)
