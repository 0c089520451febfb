"""Comparison of a call with the float64 oracle under FlashAttention's rule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import attn_n
from tests.cases import Inputs, in_use
from tests.oracle import attention_n

Results = dict[str, Tensor]


def library(inputs: Inputs, backend: str | None, lse_grad: bool = True) -> Results:
    """Compute out, lse and the gradients by the library."""
    out, lse = _forward(inputs, backend, lse_grad)
    return with_gradients(inputs, out, lse)


def forward_of_library(inputs: Inputs, backend: str | None) -> Results:
    """Compute out and lse by the library without gradients."""
    with torch.no_grad():
        out, lse = _forward(inputs, backend, return_lse=True)
    assert lse is not None
    return {"out": out, "lse": lse}


def _forward(inputs: Inputs, backend: str | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    arguments = (*inputs.packing(),) if inputs.case.varlen else ()
    function = attn_n.flash_attention_n_varlen if inputs.case.varlen else attn_n.flash_attention_n
    keywords = {**inputs.keywords, "return_lse": return_lse, "backend": backend}
    result = function(inputs.q, inputs.k, inputs.v, *arguments, **keywords)
    return result if isinstance(result, tuple) else (result, None)


def oracle(inputs: Inputs, dtype: torch.dtype, lse_grad: bool = True, ignore_n: bool = False) -> Results:
    """Compute out, lse and the gradients by the oracle in `dtype`, from the same numbers."""
    case = inputs.case
    cast = Inputs(case, *(x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)))
    cast.dout, cast.dlse = inputs.dout.to(dtype), inputs.dlse.to(torch.promote_types(dtype, torch.float32))
    wide = torch.promote_types(dtype, torch.float32)
    cast.n = inputs.n.detach().to(wide).requires_grad_() if isinstance(inputs.n, Tensor) else inputs.n
    cast.sinks = None if inputs.sinks is None else inputs.sinks.detach().to(wide).requires_grad_()
    cast.mask = inputs.mask
    cast.alibi_slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes.detach().to(dtype)
    if case.learned:
        cast.mask = None if inputs.mask is None else inputs.mask.detach().to(dtype).requires_grad_()
        cast.alibi_slopes = None if cast.alibi_slopes is None else cast.alibi_slopes.requires_grad_()

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        n = 0.0 if ignore_n or cast.n is None else cast.n
        return attention_n(
            q,
            k,
            v,
            n,
            None if ignore_n else sinks,
            case.causal,
            case.scale,
            mask,
            case.window,
            case.softcap,
            slopes,
        )

    tensors = cast.q, cast.k, cast.v, cast.mask, cast.alibi_slopes, cast.sinks
    by_parts = _varlen if case.varlen else _padded
    out, lse = by_parts(cast, attend) if case.varlen or case.padded else attend(*tensors)
    return with_gradients(cast, out, lse if lse_grad else None)


def _varlen(inputs: Inputs, attend: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    case, outs, lses, q_start, k_start = inputs.case, [], [], 0, 0
    for b, (len_q, len_k) in enumerate(zip(case.lengths_q, case.lengths_k, strict=True)):
        q = inputs.q[q_start : q_start + len_q].transpose(0, 1)[None]
        k, v = (x[k_start : k_start + len_k].transpose(0, 1)[None] for x in (inputs.k, inputs.v))
        mask, slopes = inputs.mask, inputs.alibi_slopes
        if mask is not None:
            mask = mask[b : b + 1] if mask.shape[0] > 1 else mask
            mask = mask[:, :, : len_q if mask.shape[2] > 1 else 1, : len_k if mask.shape[3] > 1 else 1]
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        sinks = inputs.sinks
        if sinks is not None and sinks.dim() > 1:
            sinks = (sinks[q_start : q_start + len_q] if sinks.shape[0] > 1 else sinks).t()[None]
        out, lse = attend(q, k, v, mask, slopes, sinks) if len_k else _without_keys(attend, q, k, v, sinks)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
        q_start, k_start = q_start + len_q, k_start + len_k
    return torch.cat(outs), torch.cat(lses)


def _padded(inputs: Inputs, attend: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for b, (end_q, begin, end_k) in enumerate(in_use(inputs.case)):
        q, k, v = inputs.q[b : b + 1], inputs.k[b : b + 1, :, begin:end_k], inputs.v[b : b + 1, :, begin:end_k]
        mask, slopes, sinks = inputs.mask, inputs.alibi_slopes, inputs.sinks
        if mask is not None:
            mask = mask[b : b + 1] if mask.shape[0] > 1 else mask
            mask = mask[:, :, : end_q if mask.shape[2] > 1 else 1, slice(begin, end_k) if mask.shape[3] > 1 else [0]]
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        if sinks is not None and sinks.dim() > 1:
            sinks = sinks[b : b + 1] if sinks.shape[0] > 1 else sinks
        # The rows that do not exist are as rows without keys, and have no gradient.
        out, lse = (x.detach() for x in _without_keys(attend, q.detach() * 0, k, v, sinks))
        if end_q:
            q = q[:, :, :end_q]
            if sinks is not None and sinks.dim() > 1 and sinks.shape[2] > 1:
                sinks = sinks[:, :, :end_q]
            exist = attend(q, k, v, mask, slopes, sinks) if end_k > begin else _without_keys(attend, q, k, v, sinks)
            out, lse = (torch.cat([x, y[:, :, end_q:]], 2) for x, y in zip(exist, (out, lse), strict=True))
        outs.append(out)
        lses.append(lse)
    none = inputs.q[:, :, :0].sum()  # so that there is a gradient, of zeros, where no row exists at all
    return torch.cat(outs) + none, torch.cat(lses) + none


def _without_keys(
    attend: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For the oracle no keys are one key that is hidden."""
    one = q.new_zeros((1, k.shape[1], 1, q.shape[-1])), q.new_zeros((1, k.shape[1], 1, v.shape[-1]))
    return attend(q.nan_to_num(), *one, torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=q.device), None, sinks)


def with_gradients(inputs: Inputs, out: Tensor, lse: Tensor | None) -> Results:
    """out, lse and the gradients, where out and lse get those of the inputs as they lie in memory."""
    results, outputs, given = {"out": out.detach()}, [out], [inputs.dout]
    if lse is not None:
        results["lse"] = lse.detach()
        outputs.append(lse)
        # A row without a denominator has lse = -inf, which no loss can use.
        empty = lse.detach() == -math.inf
        given.append(inputs.dlse.masked_fill(empty, 0.0) if empty.any() else inputs.dlse)
    tensors = inputs.differentiable
    # A loss is no help here: its backward would give the gradients another layout.
    gradients = torch.autograd.grad(outputs, list(tensors.values()), given, materialize_grads=True)
    return results | {f"d{name}": gradient for name, gradient in zip(tensors, gradients, strict=True)}


def excess(inputs: Inputs, got: Results, lse_grad: bool = True) -> dict[str, float]:
    """For each result its error over the allowed one: max error <= 2 x that of plain PyTorch in the same dtype + floor.

    The floor is a few roundings of the largest value, and the smallest number of the dtype.
    """
    dtype = inputs.q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    computed = {each: oracle(inputs, each, lse_grad) for each in {torch.float64, wide, dtype}}
    truth, plain, plain_wide = computed[torch.float64], computed[dtype], computed[wide]
    assert got.keys() == truth.keys() or (lse_grad and got.keys() == {"out", "lse"})  # a forward without gradients
    excesses = {}
    for name, value in got.items():
        exact = truth[name]
        assert value.shape == exact.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
        assert value.dtype == _dtype_of(name, inputs), f"{name}: dtype {value.dtype}"
        allowed = tolerance(name, exact, (plain_wide if name == "lse" else plain)[name], dtype)
        if torch.finfo(dtype).bits > 16:
            allowed += torch.finfo(dtype).eps * cancellation(name, inputs, truth)
        excesses[name] = error(value, exact) / allowed
    return excesses


def cancellation(name: str, inputs: Inputs, truth: Results) -> float:
    """Roundings of what goes into a gradient, where it may cancel and leave much less.

    That is a subtraction in `dS = P (dout V^T - delta)` for dq and dk (of one key and n = 0 nothing is left), and for n
    a sum over the rows whose terms have both signs.
    """
    if name in ("dn", "dsinks", "dslopes"):
        lse = truth["lse"] if "lse" in truth else oracle(inputs, torch.float64)["lse"]
        terms = (inputs.dout * truth["out"]).abs().sum(-1) + (inputs.dlse.abs() if "lse" in truth else 0.0)
        terms = terms.nan_to_num()  # of rows that do not exist
        if name == "dslopes":
            return 4 * float(terms.sum()) * max(inputs.case.len_k, *inputs.case.lengths_k, 0)
        log_n = 0.0
        if inputs.sinks is not None:
            log_n, varlen = inputs.sinks.detach(), inputs.case.varlen
            log_n = log_n if varlen or log_n.dim() > 1 else log_n[:, None]
        shares = (log_n - lse).exp().masked_fill(lse == -math.inf, 0.0)
        return 4 * float((shares * terms).sum())
    if name not in ("dq", "dk"):
        return 0.0
    other = inputs.k if name == "dq" else inputs.q
    scale = 1 / math.sqrt(inputs.case.size) if inputs.case.scale is None else abs(inputs.case.scale)
    return 40 * scale * math.prod(_largest(x.detach()) for x in (inputs.dout, inputs.v, other))


def tolerance(name: str, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """Return the largest error that is allowed; `plain` is the same computation by plain PyTorch.

    lse is held to float32, in which every backend computes it. PyTorch's CPU kernel takes a faster exp for half
    precision, which is good to 3e-5.
    """
    half = torch.finfo(dtype).bits == 16
    # The oracle is float64 itself, so for float64 the roundings of both count; half precision counts its own roundings.
    roundings = {64: 200, 32: 40, 16: 2}[torch.finfo(dtype).bits]
    relative = roundings * torch.finfo(dtype).eps
    if name == "lse" and half:
        relative = 1e-4
    elif name in ("dn", "dsinks", "dslopes") and half:
        relative *= 8  # a sum over all rows, in which terms of both signs cancel
    # The smallest number that counts: float16 uses its subnormals, the wider dtypes may flush theirs to zero.
    limits = torch.finfo(dtype)
    smallest = limits.tiny * (4 * limits.eps if dtype == torch.float16 else 1)
    allowed = 2 * error(plain, exact) + relative * _largest(exact) + smallest
    assert math.isfinite(allowed), f"{name}: the plain computation is not finite, and would allow anything"
    return allowed


def _dtype_of(name: str, inputs: Inputs) -> torch.dtype:
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    return wide if name in ("lse", "dn", "dsinks", "dslopes") else inputs.q.dtype


def error(x: Tensor, exact: Tensor) -> float:
    if x.numel() == 0:
        return 0.0
    same_infinity = (x == exact) & exact.isinf()
    difference = (x.to(torch.float64) - exact).masked_fill(same_infinity, 0.0).abs()
    return math.inf if bool(difference.isnan().any()) else float(difference.max())


def _largest(x: Tensor) -> float:
    finite = x.masked_fill(~x.isfinite(), 0.0)
    return float(finite.abs().max()) if x.numel() else 0.0
