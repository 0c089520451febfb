"""The public functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict, overload

from torch import Tensor

from attn_n import inference
from attn_n.backends import registry
from attn_n.call import Request, canonical, checks, jagged
from attn_n.dispatch import explanation, run

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on


class _Keywords(TypedDict, total=False):
    """The keyword arguments of both functions, without `return_lse`, on which the type of their result depends."""

    sinks: Tensor | None
    attn_mask: Tensor | None
    window: tuple[int | None, int | None] | None
    softcap: float | None
    alibi_slopes: Tensor | None
    dropout_p: float
    backend: str | None


class _BatchKeywords(_Keywords, total=False):
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    leftpad_k: Tensor | None


@overload
def flash_attention_n(
    q: Tensor, k: Tensor, v: Tensor,
    causal: bool = ..., sm_scale: float | None = ..., sm_n: float | Tensor | None = ...,
    *, return_lse: Literal[False] = ..., **keywords: Unpack[_BatchKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def flash_attention_n(
    q: Tensor, k: Tensor, v: Tensor,
    causal: bool = ..., sm_scale: float | None = ..., sm_n: float | Tensor | None = ...,
    *, return_lse: Literal[True], **keywords: Unpack[_BatchKeywords],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def flash_attention_n(
    q: Tensor, k: Tensor, v: Tensor,
    causal: bool = ..., sm_scale: float | None = ..., sm_n: float | Tensor | None = ...,
    *, return_lse: bool, **keywords: Unpack[_BatchKeywords],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


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
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
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
        sinks: differentiable logits of attention sinks: `log n` a head, `(Hq,)`, or a row, `(N, ..., Hq, L)` with 1 for
            any of these sizes (of `(N, Hq)` pass `sinks[:, :, None]`). Excludes `sm_n`.
        attn_mask: broadcastable to `(N, ..., Hq, L, S)`; bool (True = attend) or floating (added to the logits,
            differentiable). Or a `torch.nn.attention.bias.CausalBias`, which is served as a window, without a mask in
            memory.
        window: `(left, right)`: query i sees the keys `p - left <= j <= p + right`; None is unlimited on that side.
        softcap: c > 0: logits become `c tanh(s / c)` before masks.
        alibi_slopes: `(Hq,)` or `(N, Hq)`, differentiable: adds `-slope |p - j|` to the logits.
        dropout_p: in [0, 1): probability of dropping a weight; n is not dropped; follows `torch.manual_seed`.
        seqused_q: `(N,)`, int32, on the device of q: of batch b only the queries `i < seqused_q[b]` exist. The diagonal
            is that of the lengths in use: `p = i + seqused_k[b] - seqused_q[b]`. So right-padded self-attention needs
            both: `seqused_k` alone moves the diagonal. The values are checked where they can be read without waiting
            for an accelerator. What lies beyond is never read, and may be NaN.
        seqused_k: `(N,)`, int32: of batch b only the keys `j < seqused_k[b]` exist.
        leftpad_k: `(N,)`, int32: of batch b the keys `j < leftpad_k[b]` do not exist. The diagonal stays.
        return_lse: also return `log(n + sum_j exp(s_ij))`, natural logarithm, differentiable.
        backend: the name of a backend, which then serves the call or says why not; None lets `use_backend`,
            `ATTN_N_BACKEND` or the automatic order decide.

    Returns:
        `out` `(N, ..., Hq, L, Ev)` in the dtype of q; or `(out, lse)` with lse `(N, ..., Hq, L)` in float32
        (float64 for float64 inputs). A row without visible keys has `out = 0`, `lse = log n` and zero gradients, and so
        has one that does not exist; what dout and dlse have there is not read.

    Raises:
        TypeError, ValueError: a malformed call; the text names the argument, what was expected and what came.
        UnsupportedError: no backend, or not the one that was named, serves the call; the text says why.

    Under `torch.autocast`, q, k and v are cast as `torch.nn.functional.scaled_dot_product_attention` casts them.

    Formulas: n is one more key with logit log n and value 0, as in "Attention Is Off By One" (E. Miller, 2023; n = 1)
    and in the learned sinks of gpt-oss; the backward is that of FlashAttention-2 (T. Dao, 2023) with n in its lse.
    """
    if unknown:
        checks.no_others("flash_attention_n", unknown, Request._fields)
    request = Request(
        causal, sm_scale, sm_n, sinks, attn_mask, window, softcap, alibi_slopes, dropout_p, return_lse, backend,
        seqused_q, seqused_k, leftpad_k,
    )  # fmt: skip
    return run.batch(q, k, v, request)


@overload
def flash_attention_n_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    causal: bool = ..., sm_scale: float | None = ..., sm_n: float | Tensor | None = ...,
    *, return_lse: Literal[False] = ..., **keywords: Unpack[_Keywords],
) -> Tensor: ...  # fmt: skip


@overload
def flash_attention_n_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    causal: bool = ..., sm_scale: float | None = ..., sm_n: float | Tensor | None = ...,
    *, return_lse: Literal[True], **keywords: Unpack[_Keywords],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def flash_attention_n_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    causal: bool = ..., sm_scale: float | None = ..., sm_n: float | Tensor | None = ...,
    *, return_lse: bool, **keywords: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


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
        sinks: `(Hq,)`, or one a row: `(Tq, Hq)` with 1 for any of these sizes.

    The other arguments are those of `flash_attention_n`, with L and S the lengths of each sequence.

    Returns:
        `out` `(Tq, Hq, Ev)`; or `(out, lse)` with lse `(Tq, Hq)`.

    Raises:
        TypeError, ValueError, UnsupportedError: as `flash_attention_n`.
    """
    if unknown:
        checks.no_others("flash_attention_n_varlen", unknown, Request._fields)
    request = Request(
        causal, sm_scale, sm_n, sinks, attn_mask, window, softcap, alibi_slopes, dropout_p, return_lse, backend
    )
    sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return run.varlen(q, k, v, *sequences, request)


def backends() -> list[str]:
    """The names of the known backends: built in, registered, and found by the entry points `attn_n.backends`."""
    return registry.names()


def explain(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> explanation.Explanation:
    """Print and return which backend would serve this call, with the reason or the rank of each of them.

    Takes what `flash_attention_n` takes, or what `flash_attention_n_varlen` takes if that has `cu_seqlens_q`, or what
    `flash_attention_n_with_kvcache` takes if that has `cache_seqlens` or another argument of a cache. The call is
    validated and not run, and nothing is written into a cache.
    """
    if not inference.OF_CACHE.isdisjoint(kwargs):
        call, backend, copied = inference.described(q, k, v, *args, **kwargs)
        if copied:
            print("the cache is copied first, because no backend reads it in place; then")
        explained = explanation.explain(call, backend)
        print(explained)
        return explained
    by_name = "cu_seqlens_q" in kwargs or "cu_seqlens_k" in kwargs
    varlen = by_name or (len(args) > 1 and isinstance(args[1], Tensor))  # args[0] alone may be a mask, as SDPA has it
    function: Callable[..., Any] = flash_attention_n
    if varlen:
        function = flash_attention_n_varlen
    bound = inspect.signature(function).bind(q, k, v, *args, **kwargs)
    bound.apply_defaults()
    checks.no_others(function.__name__, bound.arguments.pop("unknown"), Request._fields)
    request = Request(**{name: bound.arguments.pop(name) for name in Request._fields if name in bound.arguments})
    if jagged.is_jagged(q):
        prepared = canonical.varlen(*jagged.to_varlen(q, k, v), request)
    else:
        prepare = canonical.varlen if varlen else canonical.batch
        prepared = prepare(**bound.arguments, request=request)
    explained = explanation.explain(prepared.call, request.backend)
    print(explained)
    return explained
