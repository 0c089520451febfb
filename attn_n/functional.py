"""The public functions: validate, describe the call, choose a backend, run it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from attn_n import autocast, fold, jagged, ops, plans, registry, transforms, validate
from attn_n.call import AttentionCall, Options, Request, describe


def flash_attention_n(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    sm_n: float | Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with softmax_n: `out_i = sum_j exp(s_ij) v_j / (n + sum_j exp(s_ij))`, `s = sm_scale q k^T + masks`.

    Query i stands at position `p = i + S - L`: the last query meets the last key.

    Args:
        q: `(N, ..., Hq, L, E)`, 2 to 6 dimensions, float16, bfloat16, float32 or float64, any strides. With two
            dimensions there is one head. Or a jagged NestedTensor `(N, Hq, j, E)`, as k and v then are: on CUDA
            one made with `max_seqlen=`, or its longest length is read from the GPU once.
        k: `(N, ..., Hkv, S, E)`, with `Hq % Hkv == 0`: each KV head serves `Hq / Hkv` query heads (GQA, MQA). Those
            before the heads broadcast (of 5 or 6 dimensions by a copy where strides cannot say it).
        v: `(N, ..., Hkv, S, Ev)`.
        causal: query i sees the keys `j <= p`.
        sm_scale: factor of the logits; None is `1 / sqrt(E)`.
        sm_n: n >= 0: None is 0, plain softmax; a number; or a differentiable tensor `()` or `(Hq,)`.
        sinks: differentiable logits `(Hq,)` of attention sinks: `log n` a head. Excludes `sm_n`.
        attn_mask: broadcastable to `(N, ..., Hq, L, S)`; bool (True = attend) or floating (added to the logits). Or a
            `torch.nn.attention.bias.CausalBias`, which is served as a window, without a mask in memory.
        window: `(left, right)`: query i sees the keys `p - left <= j <= p + right`; None is unlimited on that side.
        softcap: c > 0: logits become `c tanh(s / c)` before masks.
        alibi_slopes: `(Hq,)` or `(N, Hq)`: adds `-slope |p - j|` to the logits.
        dropout_p: in [0, 1): probability of dropping a weight; n is not dropped; follows `torch.manual_seed`.
        return_lse: also return `log(n + sum_j exp(s_ij))`, natural logarithm, differentiable.
        backend: the name of a backend, which then serves the call or says why not; None lets `use_backend`,
            `ATTN_N_BACKEND` or the automatic order decide.

    Returns:
        `out` `(N, ..., Hq, L, Ev)` in the dtype of q; or `(out, lse)` with lse `(N, ..., Hq, L)` in float32
        (float64 for float64 inputs). A row without visible keys has `out = 0`, `lse = log n` and zero gradients.

    Raises:
        TypeError, ValueError: a malformed call; the text names the argument, what was expected and what came.
        UnsupportedError: no backend, or not the one that was named, serves the call; the text says why.

    Under `torch.autocast`, q, k and v are cast as `torch.nn.functional.scaled_dot_product_attention` casts them.

    Formulas: n is one more key with logit log n and value 0, as in "Attention Is Off By One" (E. Miller, 2023; n = 1)
    and in the learned sinks of gpt-oss; the backward is that of FlashAttention-2 (T. Dao, 2023) with n in its lse.
    """
    if unknown:
        validate.no_others("flash_attention_n", unknown, Request._fields)
    request = Request(
        causal, sm_scale, sm_n, sinks, attn_mask, window, softcap, alibi_slopes, dropout_p, return_lse, backend
    )
    key = plans.key(q, k, v, request)
    plan = plans.find(key)
    if plan is not None:
        out, lse = ops.attend(q, k, v, plans.tensor_n(request), *plan)
        return (out, lse) if return_lse else out
    if jagged.is_jagged(q):
        return _run_jagged(q, k, v, request)
    prepared = _prepare(q, k, v, request, plain=key is not None)
    canonical = prepared.q is q and prepared.k is k and prepared.v is v
    return _run(prepared, request, key if canonical else None)


def flash_attention_n_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    sm_scale: float | None = None,
    sm_n: float | Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention_n` of sequences of different lengths, packed one behind the other without padding.

    Args:
        q: `(Tq, Hq, E)`: the queries of all sequences.
        k: `(Tk, Hkv, E)`; v: `(Tk, Hkv, Ev)`.
        cu_seqlens_q: `(N + 1,)`, int32, on the device of q: sequence b holds the queries
            `cu_seqlens_q[b] : cu_seqlens_q[b + 1]`; it starts at 0 and ends at Tq. The same for `cu_seqlens_k`.
            The values are checked where they can be read without waiting for an accelerator.
        max_seqlen_q: at least the length of the longest query sequence. The same for `max_seqlen_k`.
        attn_mask: broadcastable to `(N, Hq, max_seqlen_q, max_seqlen_k)`; of sequence b its first rows and columns.
        alibi_slopes: `(Hq,)` or `(N, Hq)`.

    The other arguments are those of `flash_attention_n`, with L and S the lengths of each sequence.

    Returns:
        `out` `(Tq, Hq, Ev)`; or `(out, lse)` with lse `(Tq, Hq)`.

    Raises:
        TypeError, ValueError, UnsupportedError: as `flash_attention_n`.
    """
    if unknown:
        validate.no_others("flash_attention_n_varlen", unknown, Request._fields)
    request = Request(
        causal, sm_scale, sm_n, sinks, attn_mask, window, softcap, alibi_slopes, dropout_p, return_lse, backend
    )
    sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return _run(_prepare_varlen(q, k, v, *sequences, request), request)


def backends() -> list[str]:
    """The names of the known backends: built in, registered, and found by the entry points `attn_n.backends`."""
    return registry.names()


def explain(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> registry.Explanation:
    """Print and return which backend would serve this call, with the reason or the rank of each of them.

    Takes what `flash_attention_n` takes, or what `flash_attention_n_varlen` takes if that has `cu_seqlens_q`. The call
    is validated and not run.
    """
    by_name = "cu_seqlens_q" in kwargs or "cu_seqlens_k" in kwargs
    varlen = by_name or (len(args) > 1 and isinstance(args[1], Tensor))  # args[0] alone may be a mask, as SDPA has it
    function: Callable[..., Any] = flash_attention_n
    if varlen:
        function = flash_attention_n_varlen
    bound = inspect.signature(function).bind(q, k, v, *args, **kwargs)
    bound.apply_defaults()
    validate.no_others(function.__name__, bound.arguments.pop("unknown"), Request._fields)
    request = Request(*(bound.arguments.pop(name) for name in Request._fields))
    if jagged.is_jagged(q):
        prepared = _prepare_varlen(*jagged.packed(q, k, v), request)
    else:
        prepare = _prepare_varlen if varlen else _prepare
        prepared = prepare(**bound.arguments, request=request)
    explanation = registry.explain(prepared.call, request.backend)
    print(explanation)
    return explanation


class _Prepared(NamedTuple):
    """A valid call: canonical tensors, its options and its description."""

    q: Tensor
    k: Tensor
    v: Tensor
    n: float | Tensor | None
    n_is_logit: bool
    options: Options
    call: AttentionCall
    out_shape: Sequence[int]  # of out, but for its last dimension


def _prepare(q: Tensor, k: Tensor, v: Tensor, request: Request, plain: bool = False) -> _Prepared:
    """`plain`: the call has a key, so that nothing surrounds it, and q, k, v and n are plain tensors."""
    if not plain:
        validate.not_traced()
        q, k, v = _autocast(q, k, v)
    validate.qkv(q, k, v, packed=False)
    if not plain:
        q, k, v = _neg_resolved(q), _neg_resolved(k), _neg_resolved(v)
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        leading = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        q, k, v = (x.expand(*leading, *x.shape[-3:]) for x in (q, k, v))
    shape, mask = q.shape[:-1], request.attn_mask
    right_of_mask = validate.causal_bias(mask, q.shape[-2], k.shape[-2])
    if right_of_mask is not None:
        mask = None
    if mask is not None:
        validate.mask(mask, q, (*shape, k.shape[-2]))
        mask = _canonical_mask(_clamped_to_float32(_neg_resolved(mask), q), q.shape)
    q, k, v = _canonical(q), _canonical(k), _canonical(v)
    left, right = _window(request, q.shape[2], k.shape[2], right_of_mask)
    if right == 0:
        _warn_of_rows_without_keys(q, k)
    options = Options(validate.scale(request.sm_scale, q), left, right, mask=mask)
    return _describe(q, k, v, q.shape[0], request, options, shape, plain)


def _prepare_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    request: Request,
) -> _Prepared:
    validate.not_traced()
    q, k, v = _autocast(q, k, v)
    validate.qkv(q, k, v, packed=True)
    q, k, v = _neg_resolved(q), _neg_resolved(k), _neg_resolved(v)
    validate.no_causal_bias(request.attn_mask)
    validate.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    validate.cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        expected, got = tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)
        raise ValueError(f"cu_seqlens_k: expected the shape of cu_seqlens_q, {expected}, got {got}")
    max_seqlen_q = validate.length("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = validate.length("max_seqlen_k", max_seqlen_k)
    if validate.readable(cu_seqlens_q) and validate.readable(cu_seqlens_k):
        validate.boundaries("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        validate.boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    batch, mask = cu_seqlens_q.shape[0] - 1, request.attn_mask
    if mask is not None:
        validate.mask(mask, q, (batch, q.shape[1], max_seqlen_q, max_seqlen_k))
        mask = _clamped_to_float32(_neg_resolved(mask), q)[(None,) * (4 - mask.dim())]
    left, right = _window(request)
    # Sides beyond the longest sequence bound nothing, and the kernels of libraries cut them to 32 bits.
    left = None if left is None else min(left, max_seqlen_k)
    right = None if right is None else min(right, max_seqlen_q)
    options = Options(
        validate.scale(request.sm_scale, q),
        left,
        right,
        mask=mask,
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return _describe(q, k, v, batch, request, options, q.shape[:-1])


def _describe(
    q: Tensor, k: Tensor, v: Tensor, batch: int, request: Request, options: Options, out_shape: Sequence[int],
    plain: bool = False,
) -> _Prepared:  # fmt: skip
    """The checks and the canonical form that batches and packed sequences share."""
    heads = q.shape[1]
    sm_n, sinks, slopes = request.sm_n, request.sinks, request.alibi_slopes
    if sinks is not None and sm_n is not None:
        raise ValueError("sinks: expected None together with sm_n (a sink is log n), got both")
    n: float | Tensor | None
    if sinks is not None or isinstance(sm_n, Tensor):
        n = _neg_resolved(validate.n_tensor(sm_n, sinks, q, heads))
        n_kind = "per head" if n.dim() else "scalar tensor"
    else:
        n = validate.n_number("sm_n", 0.0 if sm_n is None else sm_n)
        n, n_kind = (n, "float") if n > 0 else (None, "none")
    if slopes is not None:
        compute = torch.promote_types(q.dtype, torch.float32)
        slopes = _neg_resolved(validate.alibi(slopes, q, batch, heads)).to(compute).expand(batch, heads)
    softcap, dropout_p = validate.softcap(request.softcap, q), validate.dropout(request.dropout_p)
    if softcap is not None or dropout_p or slopes is not None:
        options = options.replaced(softcap=softcap, dropout_p=dropout_p, alibi_slopes=slopes)
    smallest = 2.3e-308 if q.dtype == torch.float64 else 1.2e-38  # normal number in which logits are computed
    if options.scale < smallest:  # kernels flush a smaller one to zero, and take the maximum before they scale
        tiny = options.scale > -smallest
        q, scale = (q * options.scale, 1.0) if tiny else (-q, -options.scale)
        options = options.replaced(scale=scale)
    mask, transform = options.mask, None
    tensors = q, k, v, n if isinstance(n, Tensor) else None, mask, slopes
    needing = [x is not None and x.requires_grad for x in tensors]
    if not plain:
        needing = [transforms.requires_grad(x) for x in tensors]
        transform = transforms.beyond_one_backward(*tensors)
    *_, of_mask, of_slopes = needing
    differentiates = torch.is_grad_enabled()
    call = describe(
        q,
        k,
        v,
        options,
        n_kind=n_kind,
        return_lse=validate.flag("return_lse", request.return_lse),
        needs_grad=differentiates and any(needing),
        mask_needs_grad=differentiates and of_mask,
        alibi_needs_grad=differentiates and of_slopes,
        transform=transform,
    )
    return _Prepared(q, k, v, n, sinks is not None, options, call, out_shape)


def _run(prepared: _Prepared, request: Request, key: plans.Key | None = None) -> Tensor | tuple[Tensor, Tensor]:
    q, k, v, n, n_is_logit, options, call, out_shape = prepared
    name, backend = registry.choose(call, request.backend)
    lse: Tensor | None
    if backend.differentiates:
        with autocast.suspended(q.device.type):
            out, lse = backend.attend(q, k, v, n, n_is_logit, options, call.return_lse)
    else:
        tensor_n = n if isinstance(n, Tensor) else None
        log_n, numbers, options = _numbers(n, options)
        # With dropout the backward has to run where the forward ran, which an open choice does not promise.
        if torch.compiler.is_exporting() and registry.forced(request.backend)[0] is None and not options.dropout_p:
            name = ops.ANY_BACKEND
        how = ops.How(name, n_is_logit, log_n, numbers, call.return_lse, ops.watched(q))
        with autocast.suspended(q.device.type):
            out, lse = ops.attend(q, k, v, tensor_n, options, how, call.needs_grad)
        if key is not None:
            plans.keep(key, plans.Plan(options, how, call.needs_grad))
    if out.dim() != len(out_shape) + 1:
        out = out.reshape(*out_shape, out.shape[-1])
        lse = None if lse is None else lse.reshape(out_shape)
    return (out, lse) if call.return_lse and lse is not None else out


def _numbers(n: float | Tensor | None, options: Options) -> tuple[float | None, Tensor | None, Options]:
    """log n of a number n, the `numbers` of `ops.How`, and the options without what these stand for."""
    number = None if isinstance(n, Tensor) else n
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # which imports SymPy

        if not (has_static_value(options.scale) and (number is None or has_static_value(number))):
            # As a factor of a tensor a number becomes an input of the graph, elsewhere a constant.
            cpu = torch.device("cpu")
            log_n = fold.as_tensor(1.0 if number is None else number, cpu).log()
            numbers = torch.stack((log_n, fold.as_tensor(options.scale, cpu)))
            return None if number is None else 0.0, numbers, options.replaced(scale=1.0)
    return None if number is None else math.log(number), None, options


def _run_jagged(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Tensor | tuple[Tensor, Tensor]:
    results = _run(_prepare_varlen(*jagged.packed(q, k, v), request), request)
    if isinstance(results, Tensor):
        return jagged.nested(results, q)
    out, lse = results
    return jagged.nested(out, q), jagged.nested(lse, q)


_warned = False


def _warn_of_rows_without_keys(q: Tensor, k: Tensor) -> None:
    """Once, where a causal mask leaves most rows without keys: so it does of `(B, L, H, E)` passed for `(B, H, L, E)`.

    With fewer KV heads than query heads nothing else tells: the heads of q pass for queries, those of k for keys.
    """
    global _warned
    if torch.compiler.is_compiling() or _warned or not 0 < 2 * k.shape[2] < q.shape[2]:
        return
    _warned = True
    shapes = f"q {tuple(q.shape)} and k {tuple(k.shape)} were read as (N, heads, length, E)"
    warnings.warn(
        f"{q.shape[2] - k.shape[2]} of {q.shape[2]} rows see no key under this causal mask, and are zero: {shapes}. If"
        " the length comes before the heads, pass q.transpose(1, 2), and k and v so too. (This is said once.)",
        stacklevel=4,
    )


def _autocast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """q, k and v, whatever the user passed, in the dtype of an enclosing autocast, which leaves float64 alone."""
    if not isinstance(q, Tensor):
        return q, k, v
    device = q.device.type
    if not autocast.enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    cast = (torch.float16, torch.bfloat16, torch.float32)
    q, k, v = (x.to(dtype) if isinstance(x, Tensor) and x.dtype in cast else x for x in (q, k, v))
    return q, k, v


def _neg_resolved(x: Tensor) -> Tensor:
    """x with its sign in its memory, which our kernels read: that of a conjugate's imaginary part is a flag beside it.

    In a compiled graph the operators do so by themselves.
    """
    return x if torch.compiler.is_compiling() else x.resolve_neg()


def _clamped_to_float32(mask: Tensor, q: Tensor) -> Tensor:
    """A float64 mask beside narrower inputs, its finite values within float32, where the logits are: only -inf hides.

    The gradient passes as through the rounding of any other value.
    """
    if mask.dtype != torch.float64 or q.dtype == torch.float64:
        return mask
    largest = torch.finfo(torch.float32).max
    constant = mask.detach()
    beyond = (constant.abs() > largest) & ~constant.isinf()
    return torch.where(beyond, constant.clamp(-largest, largest) + (mask - constant), mask)


def _canonical(x: Tensor) -> Tensor:
    """(N, ..., H, L, E) as (B, H, L, E)."""
    if x.dim() == 4:
        return x
    if x.dim() == 2:
        return x[None, None]
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _canonical_mask(mask: Tensor, q_shape: Sequence[int]) -> Tensor:
    """A mask that broadcasts to (N, ..., H, L, S) as one that broadcasts to (B, H, L, S)."""
    dims = max(4, len(q_shape))
    mask = mask[(None,) * (dims - mask.dim())]
    if dims == 4:
        return mask
    leading = mask.shape[:-3] if all(size == 1 for size in mask.shape[:-3]) else q_shape[:-3]
    return mask.expand(*leading, *mask.shape[-3:]).reshape(math.prod(leading), *mask.shape[-3:])


def _window(
    request: Request, len_q: int | None = None, len_k: int | None = None, right_of_mask: int | None = None
) -> tuple[int | None, int | None]:
    """The window with `causal` and a CausalBias in it; a side that bounds nothing at these lengths is None."""
    left, right = validate.window(request.window)
    if validate.flag("causal", request.causal):
        right = 0
    if right_of_mask is not None:
        right = right_of_mask if right is None else min(right, right_of_mask)
    if left is not None and len_k is not None and left >= len_k - 1:
        left = None
    if right is not None and len_q is not None and right >= len_q - 1:
        right = None
    return left, right
