"""The check: which mistake explains what a function returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_n.testing.formulas import Mistakes, attention
from attn_n.testing.problems import Problem, problems

EXPLANATIONS = {
    "sinks dropped": "The result is that of plain softmax: the sinks are ignored.",
    "sinks counted several times": "The sinks are in the denominator once a split of the keys. Merge the parts without"
    " sinks, by their lse, and apply the sinks once (attn_n.merge_attention).",
    "lse in bfloat16": "The lse is rounded to bfloat16 before the rows are rescaled by it. Keep it in float32.",
    "finite mask": "Keys are hidden by a finite number such as finfo.min, so that a row that sees no key is the mean of"
    " values it must not see. Hide them by -inf, and let such a row be zero.",
    "lse gradient lost": "dv is right, dq and dk are not: rescaling by sigmoid(lse - sinks) needs the gradient through"
    " lse, but lse is detached, or the backward beneath drops its gradient. Call that backward with the rescaled out"
    " and the lse of the whole denominator, as attn_n does.",
    "sinks without gradient": "The sinks get no gradient, and would not be trained.",
    "no gradient": "The result has no gradient. For a function that is for inference alone pass gradients=False.",
    "not finite": "There are NaN or infinities: sinks or hidden rows overflow.",
    "unknown": "This is none of the known mistakes.",
}

GRADIENTS = "dq", "dk", "dv", "dsinks"
# What is smaller counts for nothing: out, dout and the values are near 1.
SMALL = 0.01


@dataclass(frozen=True)
class Finding:
    """An error.

    Attributes:
        error: its name, a key of `attn_n.testing.check.EXPLANATIONS`.
        problem: the name of the problem that showed it.
        detail: where, and by how much.
    """

    error: str
    problem: str
    detail: str


@dataclass(frozen=True)
class Report:
    """The findings of a check; printed, they come with explanations.

    Attributes:
        findings: what is wrong, in the order of the problems.
        checked: the names of the problems that were given.
        left_out: what was not checked, with the reason.
    """

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.findings

    @property
    def errors(self) -> set[str]:
        """The names of the errors."""
        return {finding.error for finding in self.findings}

    def __str__(self) -> str:
        lines = []
        for error, explanation in EXPLANATIONS.items():
            shown = [finding for finding in self.findings if finding.error == error]
            if shown:
                lines += [f"{error}: {explanation}", *(f"    {each.problem}: {each.detail}" for each in shown)]
        lines.append(f"{'passed' if self.passed else 'checked'}: {', '.join(self.checked)}")
        return "\n".join([*lines, *(f"not checked: {each}" for each in self.left_out)])


def check_attention(
    fn: Callable[..., Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    gradients: bool = True,
) -> Report:
    """Give an attention function with sinks small problems on which known mistakes show, and say which it makes.

        print(check_attention(lambda q, k, v, sinks: mine(q, k, v, s_aux=sinks)))

    They are dropped sinks, sinks counted once a split, an lse in bfloat16, a lost gradient of lse, sinks without a
    gradient, and masks of finfo.min. Each has its prediction, by a formula in float64; a result that is wrong is held
    against all of them.

    Args:
        fn: `fn(q, k, v, sinks)`, and for masks also `attn_mask=`, returns out `(B, H, L, E)`, or a tuple that begins
            with it. q is `(B, H, L, E)`, k and v `(B, H, S, E)`, with E = 64, sinks `(H,)` in float32 (logits), the
            scale is `1 / sqrt(E)`, and without attn_mask each query sees all keys. attn_mask is `(B, 1, L, S)`, bool,
            True where a key is attended to; there are rows that see none, which must be zero.
        dtype: of q, k and v. In half precision what rounding hides is not found.
        device: where to run.
        gradients: check the gradients, too.

    Returns:
        A report: `passed`, `findings`, `errors`; printed, it explains.
    """
    takes_masks = _takes_masks(fn)
    findings: list[Finding] = []
    checked, left_out = [], [] if gradients else ["gradients: as was asked"]
    for problem in problems(dtype, torch.device(device)):
        if problem.attn_mask is not None and not takes_masks:
            left_out.append(f"{problem.name}: the function has no argument attn_mask")
            continue
        checked.append(problem.name)
        findings += _check(fn, problem, gradients)
    return Report(tuple(findings), tuple(checked), tuple(left_out))


def _takes_masks(fn: Callable[..., Any]) -> bool:
    try:
        named = inspect.signature(fn).parameters
    except ValueError:  # of a builtin
        return False
    return "attn_mask" in named


def _check(fn: Callable[..., Any], problem: Problem, gradients: bool) -> list[Finding]:
    inputs = [x.detach().clone().requires_grad_(gradients) for x in problem.inputs]
    masked = {} if problem.attn_mask is None else {"attn_mask": problem.attn_mask}
    returned = fn(*inputs, **masked)
    out = returned[0] if isinstance(returned, tuple) else returned
    if tuple(out.shape) != tuple(problem.q.shape):
        raise ValueError(f"fn: expected a result of shape {tuple(problem.q.shape)}, got {tuple(out.shape)}")
    if not out.isfinite().all():
        return [Finding("not finite", problem.name, "out")]
    truth, plain = _out(problem), _out(problem, dtype=problem.q.dtype)
    allowed = _allowed(truth, plain)
    mistakes, found = Mistakes(), list[Finding]()
    if _distance(out, truth) > allowed:
        named = _explained(problem, out, truth, allowed)
        off = f"out is off by {_relative(out, truth)}"
        if named is None:
            return [Finding("unknown", problem.name, off)]
        error, mistakes = named
        found = [Finding(error, problem.name, f"{off}{_how_often(mistakes)}")]
        if mistakes.finite_mask:  # of whose gradients nothing more is to be said
            return found
    return found + (_check_gradients(problem, out, inputs, mistakes) if gradients else [])


def _explained(problem: Problem, out: Tensor, truth: Tensor, allowed: float) -> tuple[str, Mistakes] | None:
    """Return the mistake that predicts out."""
    candidates = {"sinks dropped": Mistakes(times=0)}
    times = _times(problem, out)
    if times > 1:
        candidates["sinks counted several times"] = Mistakes(times=times)
    if problem.attn_mask is not None:
        candidates["finite mask"] = Mistakes(finite_mask=True)
    for error, mistakes in candidates.items():
        if _distance(out, _out(problem, mistakes)) <= 4 * allowed:
            return error, mistakes
    # An lse between two numbers of bfloat16 may be rounded either way.
    half = Mistakes(half_lse=True)
    return ("lse in bfloat16", half) if _is_nearer(out, _out(problem, half), truth) else None


def _check_gradients(problem: Problem, out: Tensor, inputs: list[Tensor], mistakes: Mistakes) -> list[Finding]:
    """Check the gradients of a result that is right, or that has mistakes which are named already."""
    if not out.requires_grad:
        return [Finding("no gradient", problem.name, "out")]
    got = dict(zip(GRADIENTS, _gradients(out, inputs, problem.dout), strict=True))
    expected, plain = _predicted(problem, mistakes), _predicted(problem, mistakes, problem.q.dtype)
    found = []
    of_sinks = mistakes.times > 0 and bool(problem.sinks.isfinite().any())
    if got["dsinks"] is None and of_sinks:
        found.append(Finding("sinks without gradient", problem.name, "dsinks"))
    values = {name: x for name, x in got.items() if x is not None and (of_sinks or name != "dsinks")}
    bad = [name for name, x in values.items() if not x.isfinite().all()]
    if bad:
        return [*found, Finding("not finite", problem.name, ", ".join(bad))]
    # Gradients may pass through that cast, too.
    roundings = torch.finfo(torch.bfloat16).eps if mistakes.half_lse else 0.0
    wrong = [
        name
        for name, x in values.items()
        if _distance(x, expected[name]) > _allowed(expected[name], plain[name]) + roundings * _size(expected[name])
    ]
    if not wrong:
        return found
    detail = ", ".join(f"{name} is off by {_relative(values[name], expected[name])}" for name in wrong)
    lost = _predicted(problem, replace(mistakes, detached_lse=True))
    explained = all(_is_nearer(values[name], lost[name], expected[name]) for name in wrong)
    return [*found, Finding("lse gradient lost" if explained else "unknown", problem.name, detail)]


def _times(problem: Problem, out: Tensor) -> int:
    """Estimate how often the sinks are in the denominator: `1 / factor - 1` is `times * exp(sink - lse)`."""
    plain, right = (_out(problem, Mistakes(times=times)) for times in (0, 1))
    odds = [(plain * plain).sum(-1) / (plain * x).sum(-1) - 1 for x in (out.detach().double(), right)]
    ratio = (odds[0] / odds[1])[(odds[1] > 1e-2) & (odds[1] < 1e6)]
    return round(float(ratio.median())) if ratio.numel() and bool(ratio.isfinite().all()) else 0


@torch.no_grad()
def _out(problem: Problem, mistakes: Mistakes | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the result of the formula in some dtype."""
    q, k, v, sinks = (x.to(dtype) for x in problem.inputs)
    return attention(q, k, v, sinks, problem.attn_mask, mistakes)


def _predicted(problem: Problem, mistakes: Mistakes, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return the gradients of the formula in some dtype."""
    q, k, v, sinks = (x.detach().to(dtype).requires_grad_() for x in problem.inputs)
    out = attention(q, k, v, sinks, problem.attn_mask, mistakes)
    inputs = [q, k, v, sinks]
    gradients = _gradients(out, inputs, problem.dout)
    made = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(inputs, gradients, strict=True)]
    return dict(zip(GRADIENTS, made, strict=True))


def _gradients(out: Tensor, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(out, inputs, dout.to(out.dtype), allow_unused=True)


def _distance(x: Tensor, other: Tensor) -> float:
    """Return the root of the mean squared difference."""
    return float((x.detach().double() - other.double()).square().mean().sqrt())


def _size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _relative(x: Tensor, truth: Tensor) -> str:
    size = _size(truth)
    return f"{_distance(x, truth) / size:.2g} of it" if size else f"{_distance(x, truth):.2g}"


def _allowed(truth: Tensor, plain: Tensor) -> float:
    """Return the error that rounding explains: twice that of the formula in the same dtype, and some roundings."""
    # Sinks, and so their gradients, are float32 also beside float64.
    eps = max(torch.finfo(plain.dtype).eps, torch.finfo(torch.float32).eps if plain.dim() == 1 else 0.0)
    roundings = eps * (0.5 if plain.dtype.itemsize == 2 else 40)
    return 2 * _distance(plain, truth) + roundings * (_size(truth) + SMALL)


def _is_nearer(x: Tensor, prediction: Tensor, truth: Tensor) -> bool:
    return _distance(x, prediction) < 0.35 * _distance(x, truth)


def _how_often(mistakes: Mistakes) -> str:
    return f", sinks counted {mistakes.times} times" if mistakes.times > 1 else ""
