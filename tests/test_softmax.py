"""softmax_n by itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention.bias import causal_lower_right

from attn_n import softmax_n
from attn_n.sink.weight import weight_of_n
from tests.places import on_gpu


@pytest.mark.parametrize("n", [0.0, 1e-6, 1.0, 3.7, 1e20])
@pytest.mark.parametrize("shift", [-100.0, -3.0, 0.0, 40.0, 500.0])
def test_against_exact_arithmetic(n: float, shift: float) -> None:
    x = [shift - 1.5, shift, shift + 2.0]
    log_denominator = shift + math.log(sum(math.exp(one - shift) for one in x))
    if n:
        top, other = max(log_denominator, math.log(n)), min(log_denominator, math.log(n))
        log_denominator = top + math.log1p(math.exp(other - top))
    expected = torch.tensor([math.exp(one - log_denominator) for one in x], dtype=torch.float64)
    assert torch.allclose(softmax_n(torch.tensor(x, dtype=torch.float64), n), expected, rtol=1e-10)
    assert torch.allclose(softmax_n(torch.tensor(x), n).double(), expected, rtol=2e-4, atol=1e-37)


def test_n_zero_is_softmax() -> None:
    x = torch.randn(3, 4, 5)
    for dim in (0, 1, -1):
        assert torch.allclose(softmax_n(x, dim=dim), x.softmax(dim), atol=1e-7)


def test_none_is_what_it_is_in_flash_attention_softmax_n() -> None:
    """None stands for the last dimension, and for n = 0."""
    x, n = torch.randn(3, 4), torch.rand(3, 1)
    assert torch.equal(softmax_n(x, n=None, dim=None), softmax_n(x, 0.0, -1))
    assert torch.equal(softmax_n(x, 2.0, dim=None), softmax_n(x, 2.0, -1))
    assert torch.equal(softmax_n(x, n, dim=None), softmax_n(x, n, -1))
    assert torch.allclose(softmax_n(torch.tensor(0.0), 1.0, dim=None), torch.tensor(0.5))


def test_what_is_hidden_everywhere_is_zero() -> None:
    x = torch.full((2, 3), -math.inf, requires_grad=True)
    for n in (0.0, 1.0):
        weights = softmax_n(x, n)
        assert not weights.any()
        assert not torch.autograd.grad(weights.sum(), x)[0].isnan().any()
    assert softmax_n(torch.zeros(2, 0)).shape == (2, 0)


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(100, dtype=torch.bfloat16)
    assert torch.equal(softmax_n(x, 2.5), softmax_n(x.float(), 2.5).bfloat16())
    assert softmax_n(x, 1.0, dtype=torch.float64).dtype == torch.float64


def test_gradients() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for n in (torch.tensor(0.0), torch.tensor(1.3), torch.rand(4, 1) + 0.2):
        n = n.double().requires_grad_()
        if n.min() > 0:
            assert torch.autograd.gradcheck(softmax_n, (x, n))
        else:  # the derivative at n = 0 is one-sided: - softmax(x)_i / sum exp(x)
            got = torch.autograd.grad(softmax_n(x, n)[:, 0].sum(), n)[0]
            assert torch.allclose(got, -(x.softmax(-1)[:, 0] / x.exp().sum(-1)).sum())


@pytest.mark.parametrize("x", [0.5, -95.0])
@pytest.mark.parametrize("n", [1e300, 1e39, 1e38, 3.7, 1e-37, 1e-40, 1e-300])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_n_beyond_the_dtype_of_x(n: float, x: float, as_tensor: bool) -> None:
    """n may exceed the dtype of x: n times exp(-row_max), computed in two factors, would overflow or vanish."""
    expected = math.exp(x) / (n + math.exp(x))
    for dtype in (torch.float32, torch.bfloat16):
        weight = softmax_n(torch.tensor([x], dtype=dtype), torch.tensor(n, dtype=torch.float64) if as_tensor else n)
        assert weight.dtype == dtype
        assert weight.double().item() == pytest.approx(
            expected, rel=1e-4 if dtype == torch.float32 else 4e-3, abs=1e-38
        )


@pytest.mark.parametrize("n", [0.0, 1e-3, 2.5])
@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_the_weight_of_n_is_linear_in_n(n: float, shape: tuple[int, ...]) -> None:
    """Derivatives by n are right in reverse and forward mode, batched, and of second order, at n = 0 too."""
    row_max = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    values = torch.full(shape, n, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(weight_of_n(values, row_max), n * (-row_max).exp(), rtol=1e-14)
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(weight_of_n, (values, row_max.detach()), **options)
    assert torch.autograd.gradgradcheck(weight_of_n, (values, row_max))
    each = torch.vmap(weight_of_n)(values.expand(3, 1), row_max)
    assert torch.allclose(each, weight_of_n(values, row_max), rtol=1e-14)


def test_a_compiled_number_n_is_not_a_constant() -> None:
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(softmax_n, backend=graphs, dynamic=True, fullgraph=True)
    x = torch.randn(3, 4)
    for n in (0.5, 1.5, 1e-40, 3e300):
        assert torch.equal(compiled(x, n), softmax_n(x, n))
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dim": 2}, ValueError, r"dim: expected a dimension of x \(2, 3\), -2 to 1, got 2"),
        ({"dim": -3}, ValueError, r"dim: expected a dimension of x \(2, 3\), -2 to 1, got -3"),
        ({"dim": (0, 1)}, TypeError, "dim: expected None or an integer, got tuple"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected float16.*, got int64"),
        ({"dtype": "float"}, TypeError, r"dtype: expected None or a torch\.dtype, got str"),
        ({"dtype": torch.ones(1)}, TypeError, r"dtype: expected None or a torch\.dtype, got Tensor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1.0, torch.tensor(1.0)])
def test_bad_options(n: float | torch.Tensor, options: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        softmax_n(torch.ones(2, 3), n, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "n", "error", "text"),
    [
        (torch.ones(3, dtype=torch.int64), 1.0, TypeError, "x: expected float16"),
        (torch.ones(3), -1.0, ValueError, "n: expected a finite number >= 0, got -1.0"),
        (torch.ones(3), torch.tensor(-1.0), ValueError, "n: expected finite numbers >= 0"),
        (torch.ones(2, 3), torch.ones(3), ValueError, r"n: expected a shape that broadcasts to \(2, 1\), got \(3,\)"),
        (torch.ones(3), 10**400, ValueError, "n: expected a finite number >= 0 .*, got an integer beyond"),
        (torch.ones(2, 3).to_sparse(), 1.0, TypeError, r"x: expected a dense tensor, got .* torch\.sparse_coo"),
        (torch.ones(2, 3), torch.ones(2, 1).to_sparse(), TypeError, r"n: expected a dense tensor, got .*sparse_coo"),
        (causal_lower_right(3, 3), 1.0, TypeError, r"x: expected a plain torch\.Tensor, .* got CausalBias"),
        (torch.ones(3), "1", TypeError, "n: expected a finite number >= 0 or a tensor, got str"),
    ],
)
def test_bad_input(x: torch.Tensor, n: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        softmax_n(x, n)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", *on_gpu(("cuda",))])
def test_under_autocast(device: str) -> None:
    x, n = torch.randn(3, 7, device=device), torch.tensor(0.7, device=device)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        expected = softmax_n(x.to(dtype), n)
        with torch.autocast(device, torch.bfloat16):
            got = softmax_n(x.to(dtype), n)
        assert got.dtype == dtype
        assert torch.equal(got, expected)
