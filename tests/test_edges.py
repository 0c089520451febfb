"""Unusual calls that are no errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attn_n import UnsupportedError, flash_attention_n, flash_attention_n_varlen
from attn_n.backends.adapt import matmuls
from tests.cases import INTERPRETED
from tests.oracle import attention_n

IN_FLOAT64 = ["reference", "sdpa"]
BACKENDS = [*IN_FLOAT64, *(["triton"] if INTERPRETED else [])]


def qkv(batch: int, heads: int, len_q: int, len_k: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, heads, length, size) for length in (len_q, len_k, len_k))
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0.0, 2.0])
@pytest.mark.parametrize(
    ("batch", "heads", "len_q", "len_k"), [(2, 2, 0, 5), (2, 2, 5, 0), (0, 2, 5, 5), (2, 2, 0, 0), (2, 0, 3, 3)]
)
def test_empty(backend: str, n: float, batch: int, heads: int, len_q: int, len_k: int) -> None:
    """A row without keys has out = 0 and lse = log n, whose gradient is 1 / n."""
    q, k, v = qkv(batch, heads, len_q, len_k)
    sm_n = torch.full((heads,), n, requires_grad=True)
    for causal in (False, True):
        out, lse = flash_attention_n(q, k, v, causal, sm_n=sm_n, return_lse=True, backend=backend)
        assert out.shape == (batch, heads, len_q, 8)
        assert lse.shape == (batch, heads, len_q)
        gradients = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), (q, k, v, sm_n))
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        if len_k == 0:
            assert not out.any()
            assert torch.allclose(lse, torch.full_like(lse, math.log(n) if n else -math.inf))
            expected = batch * len_q / n if n else 0.0
            assert torch.allclose(gradients[3], torch.full_like(sm_n, expected))
            assert not any(bool(gradient.any()) for gradient in gradients[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences(backend: str) -> None:
    nothing, start = torch.zeros(0, 2, 8), torch.zeros(1, dtype=torch.int32)
    out, lse = flash_attention_n_varlen(
        nothing, nothing, nothing, start, start, 0, 0, sm_n=1.0, return_lse=True, backend=backend
    )
    assert out.shape == (0, 2, 8)
    assert lse.shape == (0, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [2, 3, 4, 5, 6])
def test_dimensions(backend: str, dims: int) -> None:
    leading = (2, 3, 2, 2)[: dims - 2]
    q, k, v = torch.randn(*leading, 5, 8), torch.randn(*leading, 6, 8), torch.randn(*leading, 6, 4)
    mask = torch.rand(*leading, 5, 6) > 0.3
    narrow_mask = torch.rand(5, 6) > 0.3
    for attn_mask in (mask, narrow_mask):
        out, lse = flash_attention_n(q, k, v, sm_n=0.7, attn_mask=attn_mask, return_lse=True, backend=backend)
        flat = [x.reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v, attn_mask.expand(*leading, 5, 6))]
        expected, expected_lse = attention_n(*flat[:3], n=0.7, mask=flat[3])
        assert out.shape == (*leading, 5, 4)
        assert lse.shape == (*leading, 5)
        assert torch.allclose(out.flatten(), expected.flatten(), atol=1e-5)
        assert torch.allclose(lse.flatten(), expected_lse.flatten(), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["q", "k", "v", "n"])
def test_gradients_on_some_inputs_only(backend: str, wanted: str) -> None:
    q, k, v = (x.detach() for x in qkv(1, 2, 5, 5))
    inputs = {"q": q, "k": k, "v": v, "n": torch.tensor([0.5, 2.0])}
    results = []
    for every in (True, False):
        for name, tensor in inputs.items():
            tensor.requires_grad_(every or name == wanted)
        out = flash_attention_n(inputs["q"], inputs["k"], inputs["v"], sm_n=inputs["n"], backend=backend)
        results.append(torch.autograd.grad(out.square().sum(), inputs[wanted])[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_and_retained_graph(backend: str) -> None:
    q, k, v = qkv(1, 2, 6, 6)
    out = flash_attention_n(q, k, v, True, sm_n=1.0, backend=backend)
    first, second = (torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    with torch.inference_mode():
        assert torch.equal(flash_attention_n(q, k, v, True, sm_n=1.0, backend=backend), out)
    with torch.no_grad():
        assert not flash_attention_n(q, k, v, True, sm_n=1.0, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_lse_in_the_loss(backend: str) -> None:
    q, k, v = qkv(1, 2, 6, 6)
    n = torch.tensor([0.5, 3.0], requires_grad=True)
    expected = torch.autograd.grad(attention_n(q, k, v, n)[1].square().sum(), (q, k, n))
    _, lse = flash_attention_n(q, k, v, sm_n=n, return_lse=True, backend=backend)
    got = torch.autograd.grad(lse.square().sum(), (q, k, n))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_double_backward_on_the_reference() -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in qkv(1, 2, 3, 4, 4))
    n = torch.tensor([0.6, 2.0], dtype=torch.float64, requires_grad=True)

    def attend(*inputs: Tensor) -> tuple[Tensor, ...]:
        return flash_attention_n(*inputs[:3], True, sm_n=inputs[3], return_lse=True, backend="reference")

    assert torch.autograd.gradgradcheck(attend, (q, k, v, n))


def test_double_backward_elsewhere_says_so() -> None:
    q, k, v = qkv(1, 2, 5, 5)
    gradient, *_ = torch.autograd.grad(
        flash_attention_n(q, k, v, sm_n=1.0, backend="sdpa").sum(), (q, k, v), create_graph=True
    )
    with pytest.raises(UnsupportedError, match=r"'sdpa:cpu' has no double backward.*\n.*backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_the_lse_of_a_row_without_keys(backend: str) -> None:
    """At n = 0 the lse of a row without keys is -inf, and its gradient may be too; no other gradient becomes NaN."""
    q, k, v = qkv(1, 2, 5, 7)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    gradients = []
    for rows in ([0, 1, 2, 3, 4], [0, 1, 3, 4]):
        out, lse = flash_attention_n(q, k, v, attn_mask=mask, return_lse=True, backend=backend)
        gradients.append(torch.autograd.grad(out.sum() + lse[:, :, rows].square().sum(), (q, k, v)))
    assert lse[0, 0, 2] == -math.inf
    for with_it, without_it in zip(*gradients, strict=True):
        assert torch.equal(with_it, without_it)


@pytest.mark.parametrize("backend", IN_FLOAT64)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (2, 1)}, {"alibi_slopes": torch.tensor([0.5, 1.0])}]
)
def test_gradcheck(backend: str, options: dict[str, object]) -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in qkv(1, 2, 4, 5, 3))
    n = torch.tensor([0.6, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, n: flash_attention_n(q, k, v, sm_n=n, return_lse=True, backend=backend, **options), (q, k, v, n)
    )


def test_the_gradient_of_a_float_mask_comes_from_the_reference(ran: list[str]) -> None:
    q, k, v = qkv(1, 2, 5, 5)
    mask = torch.randn(2, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(attention_n(q, k, v, 1.0, mask=mask[None])[0].square().sum(), mask)[0]
    got = torch.autograd.grad(flash_attention_n(q, k, v, sm_n=1.0, attn_mask=mask).square().sum(), mask)[0]
    assert torch.allclose(got, expected, atol=1e-5)
    assert ran == ["attend reference"]
    with pytest.raises(UnsupportedError, match="no gradient of attn_mask"):
        flash_attention_n(q, k, v, sm_n=1.0, attn_mask=mask, backend="sdpa")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_left_unwritten(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under this switch torch fills fresh memory with NaN, which no output may show."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        q, k, v = qkv(2, 2, 40, 9)
        for options in ({"causal": True}, {"window": (3, 2)}, {"attn_mask": torch.rand(40, 9) > 0.8}):
            out, lse = flash_attention_n(q, k, v, sm_n=0.5, return_lse=True, backend=backend, **options)
            gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
            assert not any(bool(x.isnan().any()) for x in (out, lse, *gradients))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("n", [1e-6, 1.0, math.e, 1e20])
def test_n_equals_the_sink_log_n(n: float) -> None:
    q, k, v = qkv(2, 2, 5, 7)
    by_n = flash_attention_n(q, k, v, sm_n=n)
    by_tensor = flash_attention_n(q, k, v, sm_n=torch.tensor([n, n]))
    by_sinks = flash_attention_n(q, k, v, sinks=torch.full((2,), math.log(n)))
    assert torch.allclose(by_n, by_tensor, rtol=1e-5)
    assert torch.allclose(by_n, by_sinks, rtol=1e-5)


def test_n_zero_is_what_the_backend_gives_without_n() -> None:
    q, k, v = qkv(1, 2, 33, 33)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for n in (None, 0, 0.0):
        assert torch.equal(flash_attention_n(q, k, v, True, sm_n=n), plain)


def test_the_zero_vector_of_quiet_attention() -> None:
    """At n = 1 one key with logit 0 has the weight e^0 / (1 + e^0) = 1/2."""
    q, k, v = torch.zeros(1, 1, 1, 4), torch.randn(1, 1, 1, 4), torch.tensor([[[[2.0, 4.0, 6.0, -8.0]]]])
    for backend in BACKENDS:
        out = flash_attention_n(q, k, v, sm_n=1, backend=backend)
        assert out.flatten().tolist() == [1.0, 2.0, 3.0, -4.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_very_negative_logits_at_n_zero(backend: str) -> None:
    """The gradient of n at n = 0 needs exp(-lse), which overflows here; no other gradient becomes NaN."""
    q, k, v = torch.full((1, 2, 3, 4), 20.0), torch.full((1, 2, 3, 4), -20.0), torch.randn(1, 2, 3, 4)
    n = torch.zeros(2, requires_grad=True)
    out, lse = flash_attention_n(q, k, v, sm_n=n, return_lse=True, backend=backend)
    assert torch.allclose(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-5)
    assert lse.isfinite().all()
    (gradient,) = torch.autograd.grad(out.sum(), n)
    assert not gradient.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_n_is_exact_up_to_the_largest_number(backend: str) -> None:
    """The gradient of n is exact down to an lse of -88.7, where exp(-lse) is the largest float32."""
    q, k, v = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), -88.3), torch.full((1, 1, 1, 1), 0.5)
    n = torch.zeros(1, requires_grad=True)
    (dn,) = torch.autograd.grad(flash_attention_n(q, k, v, sm_scale=1.0, sm_n=n, backend=backend).sum(), n)
    assert dn.item() == pytest.approx(-0.5 * math.exp(88.3), rel=1e-4)


def test_a_softcap_on_a_cpu_has_no_logits_of_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def watched(logits: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(logits.shape)
        return softmax(logits)

    softmax = matmuls._softmax
    monkeypatch.setattr(matmuls, "_softmax", watched)
    q, k = torch.randn(1, 4, 600, 8, requires_grad=True), torch.randn(1, 2, 700, 8)
    flash_attention_n(q, k, k, True, softcap=5.0).sum().backward()
    # Two query heads share keys, of which the first queries see some.
    assert sizes == [(1, 2, 512, 356), (1, 2, 512, 612), (1, 2, 176, 700)] * 2
