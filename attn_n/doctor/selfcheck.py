"""The self-check: outputs and gradients of a backend on this machine against plain float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_n.call.errors import UnsupportedError
from attn_n.functional import flash_attention_n

BATCH, HEADS, SIZE = 2, 4, 64

# Relative errors, in norm. A right backend stays well below them; one that ignores n exceeds them by far.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One call, with few keys and negative logits, so that n is a large part of the denominator."""

    name: str
    n: float | tuple[float, ...]
    len_q: int = 16
    len_k: int = 7
    causal: bool = False
    return_lse: bool = False


PER_HEAD = (0.3, 1.0, 3.7, 20.0)
# The first ones tell most, and of our kernels they need the fewest.
CASES = (
    Case("lse, causal, more queries", PER_HEAD, causal=True, return_lse=True),
    Case("n = 1", 1.0),
    Case("causal, more keys", PER_HEAD, len_k=23, causal=True),
    *(Case(f"n = {n:g}", n) for n in (0.0, 1e-3, 3.7, 1e4)),
    Case("n per head", PER_HEAD),
    Case("causal", 1.0, len_k=16, causal=True),
    Case("causal, more queries", PER_HEAD, causal=True),
    Case("lse", 1.0, return_lse=True),
)


@dataclass(frozen=True)
class Check:
    """The worst relative error of one backend in one dtype over the cases that it serves, and its case."""

    device: str
    backend: str
    dtype: str
    served: int
    cases: int
    error: float | None
    where: str | None
    tolerance: float
    failure: str | None
    passed: bool


def check(backend: str, device: torch.device, dtype: torch.dtype, cases: Sequence[Case] = CASES) -> Check | None:
    """Check one backend in one dtype; return None if it serves none of the cases."""
    errors: dict[str, float] = {}
    failure, served = None, len(cases)
    for case in cases:
        try:
            found = _errors(case, backend, device, dtype)
        except UnsupportedError:
            served -= 1
        except Exception as raised:  # a kernel can fail in any way; the table names the failure, and the rest goes on
            failure = failure or f"{case.name}: {type(raised).__name__}: {raised}"
        else:
            errors |= {f"{name} ({case.name})": value for name, value in found.items()}
    if not served:
        return None
    infinite = next((where for where, value in errors.items() if not math.isfinite(value)), None)
    if infinite is not None:
        failure, errors = failure or f"not finite: {infinite}", {}
    where = max(errors, key=errors.__getitem__, default=None)
    error = None if where is None else errors[where]
    passed = failure is None and error is not None and error <= TOLERANCE[dtype]
    name = str(dtype).removeprefix("torch.")
    return Check(str(device), backend, name, served, len(cases), error, where, TOLERANCE[dtype], failure, passed)


def _errors(case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return `||x - exact|| / ||exact||` of each output and each gradient."""
    got = run(case, backend, device, dtype)

    def exactly(q: Tensor, k: Tensor, v: Tensor, n: float | Tensor) -> Sequence[Tensor]:
        return _softmax_n_attention(q, k, v, n, case.causal)

    exact = _outputs_and_gradients(exactly, *_problem(case, dtype), lambda x: x.double())
    return {name: float((got[name].cpu().double() - x).norm() / x.norm()) for name, x in exact.items()}


def run(case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return each output and each gradient of a backend."""

    def by_backend(q: Tensor, k: Tensor, v: Tensor, n: float | Tensor) -> Sequence[Tensor]:
        results = flash_attention_n(q, k, v, case.causal, sm_n=n, return_lse=case.return_lse, backend=backend)
        return (results,) if isinstance(results, Tensor) else results

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*rows see no key under this causal mask", UserWarning)  # as is meant
        return _outputs_and_gradients(by_backend, *_problem(case, dtype), lambda x: x.to(device))


def _problem(case: Case, dtype: torch.dtype) -> tuple[dict[str, float | Tensor], Sequence[Tensor]]:
    """Return the inputs, and the gradients of the outputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(BATCH, HEADS, *shape, generator=generator, dtype=torch.float64) + mean).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    inputs: dict[str, float | Tensor] = {
        "q": normal(case.len_q, SIZE, mean=0.5),
        "k": normal(case.len_k, SIZE, mean=-0.5),
        "v": normal(case.len_k, SIZE),
        "n": torch.tensor(case.n, dtype=wide) if isinstance(case.n, tuple) else case.n,
    }
    return inputs, [normal(case.len_q, SIZE), normal(case.len_q).to(wide)][: 2 if case.return_lse else 1]


def _softmax_n_attention(q: Tensor, k: Tensor, v: Tensor, n: float | Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) by the formula; `n` is a number or `(H,)`."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        len_q, len_k = logits.shape[-2:]
        later = torch.ones(len_q, len_k, dtype=torch.bool).triu(len_k - len_q + 1)
        logits = logits.masked_fill(later, -math.inf)
    weights = logits.exp()
    denominator = weights.sum(-1) + (n[:, None] if isinstance(n, Tensor) else n)
    return (weights / denominator[..., None]) @ v, denominator.log()


def _outputs_and_gradients(
    attend: Callable[..., Sequence[Tensor]],
    inputs: dict[str, float | Tensor],
    cotangents: Sequence[Tensor],
    convert: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    leaves = {name: convert(x).detach().requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)}
    outputs = attend(**(inputs | leaves))[: len(cotangents)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [convert(x) for x in cotangents])
    named_outputs = {name: output.detach() for name, output in zip(("out", "lse"), outputs, strict=False)}
    return named_outputs | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
