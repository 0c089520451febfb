"""Checks of the public arguments: each error names the argument, what was expected and what came.

Values (of a tensor n, of lengths) are checked where reading them is free, that is for real tensors on the CPU. On an
accelerator that would stall the stream, so there only shapes, dtypes and devices are checked, unless `ATTN_N_CHECK=1`
is set when attn_n is imported.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# What lies on an accelerator is read too, and checked: lengths, tables, n.
READ_ALL = os.environ.get("ATTN_N_CHECK") == "1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = (Tensor, torch.nn.Parameter)

# Names that other libraries use for our arguments.
SPELLINGS = {
    "is_causal": "here it is causal, and aligned with the last query and the last key",
    "scale": "here it is sm_scale",
    "softmax_scale": "here it is sm_scale",
    "enable_gqa": "leave it out: k and v may always have fewer heads than q",
    "dropout": "here it is dropout_p",
    "window_size": "here it is window, with None for a side without a limit",
    "s_aux": "here it is sinks",
    "learnable_sink": "here it is sinks",
    "sink": "here it is sinks",
    "n": "here it is sm_n",
    "mask": "here it is attn_mask",
    "attn_bias": "here it is attn_mask",
    "logits_soft_cap": "here it is softcap",
    "return_attn_probs": "here it is return_lse, which returns lse alone",
    "return_softmax_lse": "here it is return_lse",
    "cache_seqlens": "here it is seqused_k, of flash_attention_n",
    "key_padding_mask": "here it is seqused_q and seqused_k, or leftpad_k; or attn_mask, True where keys are attended",
    "deterministic": "here it is torch.use_deterministic_algorithms(True)",
}


def no_others(function: str, unknown: Iterable[str], known: Sequence[str]) -> None:
    """Refuse keywords that `function` does not have; the error names the right one."""
    for name in unknown:
        said = SPELLINGS.get(name)
        if function.endswith("_varlen") and name in ("seqused_q", "seqused_k", "leftpad_k"):
            said = "the lengths of varlen sequences are those of cu_seqlens_q and cu_seqlens_k"
        if said is None:
            near = difflib.get_close_matches(name, known)
            said = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}: {said}")


def flag(name: str, value: Any) -> bool:
    """Return a bool, which may be 1, 0 or NumPy's.

    In the place of `causal` SDPA has its mask and FlashAttention its dropout, so the error names these.
    """
    if isinstance(value, (bool, torch.SymBool)) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    instead = ""
    if name == "causal" and isinstance(value, Tensor):
        instead = ": a mask is passed as attn_mask="
    elif name == "causal" and isinstance(value, float):
        instead = ": a probability of dropping is passed as dropout_p="
    raise TypeError(f"{name}: expected True or False, got {type(value).__name__}{instead}")


def tensor(name: str, x: object) -> Tensor:
    """Return a dense tensor whose values are in its memory, or whose operators know where they are.

    A subclass that overrides `__torch_function__` may keep anything in its memory (PyTorch's CausalBias keeps nothing).
    One with a `__torch_dispatch__` (fake tensors, DTensor) handles our operators itself.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}{_how_to_convert(x)}")
    kind = type(x)
    if x.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a NestedTensor of layout {x.layout}: flash_attention_n takes q, k, v"
            " that are all of layout torch.jagged and shape (N, H, length, E), and flash_attention_n_varlen the"
            " values() and offsets() of such"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}: pass {name}.to_dense()")
    if kind in PLAIN:
        return x
    # Tensor's own __torch_function__ keeps the subclass and changes no value; if disabled, it is not a method.
    own_function = getattr(kind.__torch_function__, "__func__", None)
    if own_function not in (None, getattr(Tensor.__torch_function__, "__func__", None)):
        raise TypeError(
            f"{name}: expected a plain torch.Tensor, got {kind.__module__}.{kind.__name__}, whose memory need not hold"
            f" its values{_how_to_convert(x) or f': if it does, pass {name}.as_subclass(torch.Tensor)'}"
        )
    return x


def same_kind(name: str, x: Tensor, q: Tensor) -> None:
    """Refuse a tensor that only operators can read (DTensor and the like) beside a plain q: kernels read its memory."""
    if type(x) in PLAIN or type(q) not in PLAIN or torch._C._len_torch_dispatch_stack() > 0:
        return
    if torch.compiler.is_compiling() or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return
    kind = type(x)
    instead = _how_to_convert(x) or ": pass what it holds here (of a DTensor to_local() or full_tensor())"
    raise TypeError(f"{name}: expected a plain torch.Tensor as q is, got {kind.__module__}.{kind.__name__}{instead}")


def same_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")


def _how_to_convert(x: object) -> str:
    """Return a hint how to convert a mask of another library to ours."""
    module, name = type(x).__module__, type(x).__name__
    if name == "BlockMask":
        return ": pass torch.nn.attention.flex_attention.create_mask(mask_mod, B, H, L, S), or causal= and window="
    if module.startswith(("xformers.", "mslk.")):
        return ": pass causal=True or window= for what it says, or its materialize((L, S))"
    if name == "MaskedTensor":
        return ": pass get_data(), and what is masked as attn_mask"
    return ""


def causal_bias(attn_mask: object, len_q: int, len_k: int) -> int | None:
    """Return the right side of the window of a `torch.nn.attention.bias.CausalBias`; None for any other mask.

    Such a mask has lengths and a corner, and nothing in its memory. Aligned top-left, query i sees the keys `j <= i`,
    which is `j <= p + L - S`.
    """
    if not _is_causal_bias(attn_mask):
        return None
    mask: Any = attn_mask
    if not hasattr(mask, "variant"):
        raise TypeError(
            "attn_mask: a CausalBias that has lost its lengths and its corner, as detach(), clone() and a reentrant"
            " checkpoint return it: make it inside of what is checkpointed, or pass causal=True, which is"
            " causal_lower_right"
        )
    if (mask.seq_len_q, mask.seq_len_kv) != (len_q, len_k):
        raise ValueError(
            f"attn_mask: expected a CausalBias of {len_q} queries and {len_k} keys, got one of {mask.seq_len_q} and"
            f" {mask.seq_len_kv}"
        )
    return 0 if mask.variant.name == "LOWER_RIGHT" else len_q - len_k


def no_causal_bias(attn_mask: object) -> None:
    if _is_causal_bias(attn_mask):
        raise TypeError(
            "attn_mask: a CausalBias has one pair of lengths, and varlen sequences have many: causal=True is"
            " causal_lower_right of each; for causal_upper_left pass"
            " torch.ones(max_seqlen_q, max_seqlen_k, dtype=torch.bool).tril()"
        )


def _is_causal_bias(attn_mask: object) -> bool:
    """Return True for a CausalBias, found by name because its module need not have been imported."""
    kind = type(attn_mask)
    return kind.__name__ == "CausalBias" and kind.__module__ == "torch.nn.attention.bias"


def floating(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {_dtype(x)}")
    return x


def for_operators(name: str, x: object) -> Tensor:
    """Return a floating tensor that torch's operators can read: a dense or a jagged one."""
    x = floating(name, x)
    if x.layout is not torch.jagged and (x.is_nested or x.layout is not torch.strided):
        kind = "a NestedTensor" if x.is_nested else "one"
        raise TypeError(f"{name}: expected a dense tensor, got {kind} of layout {x.layout}")
    if _is_causal_bias(x) or type(x).__name__ == "MaskedTensor":
        raise TypeError(f"{name}: expected a plain torch.Tensor, -inf where it is masked, got {type(x).__name__}")
    return x


def dtype(name: str, value: object) -> torch.dtype:
    """Return a dtype that `floating` accepts."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name}: expected None or a torch.dtype, got {type(value).__name__}")
    if value not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {_name(value)}")
    return value


def not_traced() -> None:
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise NotImplementedError(
            "torch.jit.trace: attn_n cannot be traced by TorchScript, which would record the kernels of one backend and"
            " one set of lengths.\nTo do: use torch.export.export or torch.compile."
        )


def readable(x: Tensor) -> bool:
    """Return True if reading the values of `x` is free, or asked for: it is a real tensor, and nothing traces."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:  # of make_fx, say
        return False
    return (READ_ALL or x.device.type == "cpu") and type(x) in PLAIN


def reads_values(x: Tensor) -> bool:
    """Return True if a known call, which nothing traces, checks the values of tensors beside x."""
    return x.is_cpu or READ_ALL


def qkv(q: Tensor, k: Tensor, v: Tensor, varlen: bool) -> None:
    """Check types, dtypes, devices and shapes of the three tensors."""
    if not varlen and _usual(q, k, v):
        return
    for name, x in (("q", q), ("k", k), ("v", v)):
        floating(name, tensor(name, x))
        if varlen and x.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions (T, H, E) of varlen sequences, got shape {_shape(x)}")
        if not 2 <= x.dim() <= 6:
            raise ValueError(f"{name}: expected 2 to 6 dimensions (N, ..., heads, length, E), got shape {_shape(x)}")
    for name, x in (("k", k), ("v", v)):
        same_kind(name, x, q)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {_dtype(q)}, got {_dtype(x)}")
        same_device(name, x, q)
        if x.dim() != q.dim():
            instead = ""
            if 2 <= x.dim() == q.dim() - 1:
                instead = f": {name}[None] if all of the batch share it, {name}.unsqueeze(-3) if it has no heads"
            raise ValueError(f"{name}: expected {q.dim()} dimensions as q {_shape(q)} has, got {_shape(x)}{instead}")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"q, v: expected head sizes of at least 1, got q {_shape(q)} and v {_shape(v)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k: expected the head size of q, {q.shape[-1]}, got {k.shape[-1]} (q {_shape(q)}, k {_shape(k)})"
        )
    length, heads = (0, 1) if varlen else (-2, -3)
    if v.shape[length] != k.shape[length]:
        raise ValueError(
            f"v: expected as many keys as k, {k.shape[length]}, got {v.shape[length]} (k {_shape(k)}, v {_shape(v)})"
        )
    if varlen or q.dim() > 2:
        if v.shape[heads] != k.shape[heads]:
            raise ValueError(
                f"v: expected as many heads as k, {k.shape[heads]}, got {v.shape[heads]} (k {_shape(k)}, v {_shape(v)})"
            )
        if q.shape[heads] != k.shape[heads] and (k.shape[heads] == 0 or q.shape[heads] % k.shape[heads]):
            raise ValueError(
                f"k: expected a number of heads that divides the {q.shape[heads]} heads of q, got {k.shape[heads]}"
                f" (q {_shape(q)}, k {_shape(k)})"
            )
    if not varlen:
        for name, x in (("k", k), ("v", v)):
            if not (_agree(x.shape[:-3], q.shape[:-3]) and _agree(x.shape[:-3], k.shape[:-3])):
                raise ValueError(
                    f"{name}: expected the leading dimensions of q, {tuple(q.shape[:-3])}, or 1, got"
                    f" {tuple(x.shape[:-3])} (q {_shape(q)}, k {_shape(k)}, v {_shape(v)})"
                )


def _usual(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return True if a usual call has no errors; finding out which error a call has takes `qkv` six times as long."""
    if type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN:
        return False
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES or not q.device == k.device == v.device:
        return False
    if not q.layout == k.layout == v.layout == torch.strided or q.is_nested or k.is_nested or v.is_nested:
        return False
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    if not len(of_q) == len(of_k) == len(of_v) == 4 or not of_q[0] == of_k[0] == of_v[0] or of_k[2] != of_v[2]:
        return False
    if of_k[1] != of_v[1] or of_k[1] == 0 or of_q[1] % of_k[1] or of_q[3] != of_k[3]:
        return False
    return of_q[3] > 0 and of_v[3] > 0


def scale(sm_scale: object, q: Tensor) -> float:
    if sm_scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    number = _number("sm_scale", sm_scale, "None or a finite number")
    largest = torch.finfo(_computed_in(q)).max
    if not -largest <= number <= largest:
        expected = f"None or a number that {_name(_computed_in(q))} holds, in which the logits are computed"
        raise ValueError(f"sm_scale: expected {expected}, got {sm_scale}")
    return number


def n_number(name: str, n: object) -> float:
    value = _number(name, n, "a finite number >= 0 or a tensor")
    if value < 0:
        raise ValueError(f"{name}: expected a finite number >= 0, got {n}")
    return value


def n_values(name: str, n: Tensor) -> None:
    """Check the values of a tensor n: floating, finite and >= 0."""
    floating(name, n)
    if readable(n) and n.numel():
        values = n.detach()
        if not (values.min().item() >= 0 and values.max().item() < math.inf):
            raise ValueError(f"{name}: expected finite numbers >= 0, got {values}")


def not_both(sm_n: object, sinks: object) -> None:
    if sinks is not None and sm_n is not None:
        raise ValueError("sinks: expected None together with sm_n (a sink is log n), got both")


def n_tensor(sm_n: object, sinks: object, q: Tensor, heads: int, rows: Sequence[int]) -> Tensor:
    """Return n as a tensor: `sm_n`, a scalar or one number a head, or `sinks`, one logit a head or a row.

    `rows` is the shape of the lse.
    """
    name = "sm_n" if sinks is None else "sinks"
    n = floating(name, tensor(name, sm_n if sinks is None else sinks))
    same_kind(name, n, q)
    if sinks is not None and n.dim() > 1:
        _sinks_a_row(n, heads, rows)
    elif tuple(n.shape) not in (((heads,),) if sinks is not None else ((), (heads,))):
        expected = f"({heads},)" if sinks is not None else f"() or ({heads},)"
        raise ValueError(f"{name}: expected shape {expected} for {heads} heads of q, got {_shape(n)}")
    same_device(name, n, q)
    if sinks is None:
        n_values(name, n)
    elif readable(n):
        sink_values(n, q)
    return n


def _sinks_a_row(sinks: Tensor, heads: int, rows: Sequence[int]) -> None:
    if sinks.dim() == len(rows) and all(size in (1, full) for size, full in zip(sinks.shape, rows, strict=True)):
        return
    said = (
        f"sinks: expected ({heads},), one a head, or one a row: the shape of the lse, {tuple(rows)}, or 1 for any of it"
    )
    if len(rows) == 3 and tuple(sinks.shape) == tuple(rows[:2]):
        raise ValueError(f"{said}; got {_shape(sinks)}: pass sinks[:, :, None]")
    raise ValueError(f"{said}; got {_shape(sinks)}")


_LARGEST_SINK = torch.finfo(torch.float32).max / 2


def sink_values(sinks: Tensor, q: Tensor) -> None:
    """Check that sinks do not overflow in base 2, in which kernels compute: there they are 1.44 times as large."""
    largest = _LARGEST_SINK if q.dtype is not torch.float64 else torch.finfo(torch.float64).max / 2
    values = sinks.detach() if sinks.requires_grad else sinks
    if sinks.numel() and not values.max().item() < largest:
        raise ValueError(f"sinks: expected logits below {largest:.1e} and no NaN (-inf is n = 0), got {values}")


def values_of_n(n: Tensor, is_logit: bool, q: Tensor) -> None:
    """Check the values of n or of sinks, which are on the CPU."""
    if is_logit:
        sink_values(n, q)
    else:
        n_values("sm_n", n)


def mask(attn_mask: object, q: Tensor, target: Sequence[int]) -> None:
    """Check a mask that has to broadcast to `target`, `(N, ..., heads, L, S)`."""
    attn_mask = tensor("attn_mask", attn_mask)
    same_kind("attn_mask", attn_mask, q)
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in DTYPES:
        raise TypeError(f"attn_mask: expected bool (True = attend) or a floating dtype, got {_dtype(attn_mask)}")
    same_device("attn_mask", attn_mask, q)
    if not broadcasts(attn_mask.shape, target):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {tuple(target)}, got {_shape(attn_mask)}")


def parts(outs: Sequence[object], lses: Sequence[object], varlen: bool) -> None:
    """Check the outs and lses of the parts of an attention, which are of one shape, dtype and device."""
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs, lses: expected as many of each, at least one, got {len(outs)} and {len(lses)}")
    like = floating("outs[0]", tensor("outs[0]", outs[0]))
    if not (like.dim() == 3 if varlen else 2 <= like.dim() <= 6):
        expected = "3 dimensions (T, H, Ev) of varlen sequences" if varlen else "2 to 6 dimensions (N, ..., H, L, Ev)"
        raise ValueError(f"outs[0]: expected {expected}, got shape {_shape(like)}")
    wide = _computed_in(like)
    for i, (one, lse) in enumerate(zip(outs, lses, strict=True)):
        out = floating(f"outs[{i}]", tensor(f"outs[{i}]", one))
        of_rows = floating(f"lses[{i}]", tensor(f"lses[{i}]", lse))
        for name, x, shape, dtypes in (
            (f"outs[{i}]", out, like.shape, (like.dtype,)),
            (f"lses[{i}]", of_rows, like.shape[:-1], (torch.float32, wide)),
        ):
            same_kind(name, x, like)
            if x.shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {_shape(x)}")
            if x.dtype not in dtypes:
                said = " or ".join(dict.fromkeys(map(_name, dtypes)))
                raise TypeError(f"{name}: expected {said}, got {_dtype(x)}")
            if x.device != like.device:
                raise ValueError(f"{name}: expected the device of outs[0], {like.device}, got {x.device}")


def window(value: object) -> tuple[int | None, int | None]:
    if value is None:
        return None, None
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray, memoryview)) or len(value) != 2:
        raise TypeError(f"window: expected None or a pair (left, right), got {value!r}")
    for side, size in zip(("left", "right"), value, strict=True):
        if size is None:
            continue
        if not _is_integer(size):
            raise TypeError(f"window: expected {side} to be None or an integer, got {size!r}")
        if size < 0:
            instead = ": FlashAttention's -1 is None here" if size == -1 else ""
            raise ValueError(f"window: expected {side} >= 0, or None for no limit on that side, got {size}{instead}")
    left, right = value
    return None if left is None else _integer(left), None if right is None else _integer(right)


def softcap(value: object, q: Tensor) -> float | None:
    """Return the softcap, bounded so that kernels can divide and multiply by it, and by log2(e), without overflow."""
    if value is None:
        return None
    cap = _number("softcap", value, "None or a finite number > 0")
    if cap <= 0:
        instead = ": FlashAttention's 0 for no cap is None here" if cap == 0 else ""
        raise ValueError(f"softcap: expected None or a finite number > 0, got {value}{instead}")
    smallest, largest = (1e-300, 1e300) if q.dtype == torch.float64 else (1e-30, 1e30)
    if not smallest <= cap <= largest:
        instead = ": no cap is None" if cap > largest else ""
        expected = f"None or a number from {smallest} to {largest} for inputs in {_dtype(q)}"
        raise ValueError(f"softcap: expected {expected}, got {value}{instead}")
    return cap


def dropout(value: object) -> float:
    p = _number("dropout_p", value, "a number in [0, 1)")
    if not 0 <= p < 1:
        instead = ": with 1, which SDPA takes, nothing is left of the values" if p == 1 else ""
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {value}{instead}")
    return p


def alibi(alibi_slopes: object, q: Tensor, batch: int, heads: int) -> Tensor:
    slopes = floating("alibi_slopes", tensor("alibi_slopes", alibi_slopes))
    same_kind("alibi_slopes", slopes, q)
    allowed = ((heads,), (batch, heads))
    if tuple(slopes.shape) not in allowed:
        raise ValueError(f"alibi_slopes: expected shape {' or '.join(map(str, allowed))}, got {_shape(slopes)}")
    same_device("alibi_slopes", slopes, q)
    if readable(slopes) and not bool(slopes.to(_computed_in(q)).isfinite().all()):
        raise ValueError(f"alibi_slopes: expected numbers finite in {_name(_computed_in(q))}, got {slopes.detach()}")
    return slopes


def lengths(name: str, value: object, q: Tensor) -> Tensor:
    """Check numbers of rows, one for each batch of q; `values_in_use` checks their values."""
    found = tensor(name, value)
    same_kind(name, found, q)
    batch = q.shape[0] if q.dim() > 3 else 1
    if found.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {_dtype(found)}")
    if tuple(found.shape) != (batch,):
        raise ValueError(f"{name}: expected shape ({batch},), one for each batch of q {_shape(q)}, got {_shape(found)}")
    same_device(name, found, q)
    return found


def values_in_use(
    seqused_q: Tensor | None, seqused_k: Tensor | None, leftpad_k: Tensor | None, len_q: int, len_k: int
) -> None:
    """Check the values of numbers of rows, which are on the CPU."""
    for name, x, longest, of in (
        ("seqused_q", seqused_q, len_q, "queries"), ("seqused_k", seqused_k, len_k, "keys"),
        ("leftpad_k", leftpad_k, len_k, "keys"),
    ):  # fmt: skip
        values = [] if x is None else x.tolist()
        if values and not (min(values) >= 0 and max(values) <= longest):
            raise ValueError(f"{name}: expected numbers from 0 to the {longest} {of}, got {values}")


def cu_seqlens(name: str, cu: object, q: Tensor) -> None:
    """Check type, shape and device of the sequence boundaries; `boundaries` checks their values."""
    cu = tensor(name, cu)
    same_kind(name, cu, q)
    if cu.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {_dtype(cu)}")
    if cu.dim() != 1 or cu.shape[0] == 0:
        raise ValueError(f"{name}: expected shape (sequences + 1,), got {_shape(cu)}")
    same_device(name, cu, q)


def boundaries(name: str, cu: Tensor, tokens: int, longest: int) -> list[int]:
    """Read cu_seqlens to the host, and check its values against the number of tokens and `max_seqlen`."""
    values: list[int] = cu.tolist()
    if values[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {values[0]}")
    lengths = [stop - start for start, stop in pairwise(values)]
    if any(length < 0 for length in lengths):
        raise ValueError(f"{name}: expected values that never decrease, got {values}")
    if values[-1] != tokens:
        raise ValueError(f"{name}: expected to end at the {tokens} tokens, got {values[-1]}")
    if max(lengths, default=0) > longest:
        side = name.removeprefix("cu_seqlens_")
        raise ValueError(f"max_seqlen_{side}: expected at least the longest sequence, {max(lengths)}, got {longest}")
    return values


def length(name: str, value: Any) -> int:
    if not _is_integer(value):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value}")
    return _integer(value)


def dimension(name: str, value: Any, x: Tensor) -> int:
    """Return a dimension of x, counted from either end."""
    if not _is_integer(value):
        raise TypeError(f"{name}: expected None or an integer, got {type(value).__name__}")
    most = max(x.dim(), 1)  # a number counts as one dimension, as in torch
    if not -most <= value < most:
        raise ValueError(f"{name}: expected a dimension of x {_shape(x)}, {-most} to {most - 1}, got {value}")
    return _integer(value)


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    if len(shape) > len(target):
        return False
    for i in range(1, len(shape) + 1):  # noqa: SIM110  (PyTorch 2.8 traces neither `all` here nor `zip`)
        if shape[-i] not in (target[-i], 1):
            return False
    return True


def _agree(sizes: Sequence[int], others: Sequence[int]) -> bool:
    """Return True if the sizes broadcast together."""
    return all(size == other or size == 1 or other == 1 for size, other in zip(sizes, others, strict=True))


def _number(name: str, value: Any, expected: str) -> float:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or _converts_to_float(value)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # from an integer, which can be too long to be printed
        raise ValueError(f"{name}: expected {expected}, got an integer beyond the range of float64") from None
    if not -math.inf < number < math.inf:  # torch.compile traces comparisons, but not math.isfinite
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return number


def _converts_to_float(value: Any) -> bool:
    """Return True if value is one real number; of NumPy's types, all of which have `__float__`, scalars alone are."""
    if isinstance(value, Tensor) or not hasattr(value, "__float__"):
        return False
    if type(value).__module__ != "numpy" or torch.compiler.is_compiling():  # where NumPy's are arrays of torch
        return True
    return value.ndim == 0 and value.dtype.kind in "iuf"


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt, numbers.Integral)) and not isinstance(value, bool)


def _integer(value: Any) -> int:
    """Return an integer as Python's own, which is all that backends know."""
    result: Any = value if isinstance(value, (int, torch.SymInt)) else int(value)
    return result  # type: ignore[no-any-return]


def _computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype of the logits and of the lse."""
    return torch.promote_types(x.dtype, torch.float32)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _dtype(x: Tensor) -> str:
    return _name(x.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
