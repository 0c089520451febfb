"""The automatic order in which backends are tried, made from measurements by bench/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attn_n.call import AttentionCall

# The backends to try, in this order, when none is forced. cuDNN is in no order: it takes 50 ms for every new shape.
DEFAULT = {
    "cpu": ("sdpa", "reference"),
    "cuda": ("sdpa", "triton", "flash_attn", "xformers", "reference"),
}
ELSEWHERE = ("reference",)

# By the major compute capability of other GPUs, which we have not measured. sm_80 to sm_89: FlashAttention 2 was made
# for them, and Triton's compiler does not beat its backward there. sm_100 to sm_110: FlashAttention 4 alone uses their
# tensor memory. sm_120 has none and no kernel of its own in any of these libraries, and takes `DEFAULT`.
UNMEASURED = {
    8: ("sdpa", "flash_attn", "triton", "xformers", "reference"),
    10: ("flash_attn:4", "sdpa", "triton", "flash_attn", "xformers", "reference"),
    11: ("flash_attn:4", "sdpa", "triton", "flash_attn", "xformers", "reference"),
}

# For calls without gradients over a KV cache, or over keys of which some do not exist: first who reads them in place.
# FlashAttention 3 splits keys, 4 does so on Blackwell alone, and 2 wants blocks of 256 keys. By h100-2026-11-28-decode
# and h100-2026-11-28-decode-fa4 our decoding kernels take the least time, or 1.03 times the least, but for many rows
# over many keys.
IN_PLACE = ("triton:decode", "triton", "flash_attn:3", "flash_attn:4", "flash_attn:2")
IN_PLACE_MANY_ROWS = ("flash_attn:3", *[name for name in IN_PLACE if name != "flash_attn:3"])

# A few queries over many keys need other kernels than many queries do: split-KV, or one tile for all query heads that
# share a KV head.
MANY, FEW, ONE = "many queries", "few queries", "one query"
FEW_QUERIES = 128  # fewer than these
MANY_KEYS = 1025
MANY_ROWS = 65  # queries of all query heads of a KV head: from here on to multiply takes longer than to load keys

SHORT = 1e10  # operations of a forward: they take an H100 about 20 us, less than any backend takes the host
OPERATIONS = f"{SHORT:.0e} operations".replace("e+", "e")


class Row(NamedTuple):
    """Backends to try before the default order, for calls that match this row."""

    training: bool | None  # the call needs gradients, so both passes count; None matches either
    with_n: bool | None  # n > 0, which costs other libraries one more pass over `out`; None matches either
    widest: int  # head sizes up to this
    keys: int  # a query sees at least so many keys
    first: tuple[str, ...]
    varlen: bool = False
    causal: bool = False  # True matches only causal calls
    queries: str = MANY
    short: bool = False  # True matches only calls that `is_short` finds to take the host longer than the GPU
    many_rows: bool = False  # True matches only calls with `MANY_ROWS`

    @property
    def kinds(self) -> list[str]:
        """The kinds of calls that the row is for, but for the pass and n."""
        kinds = {
            "varlen": self.varlen, self.queries: self.queries != MANY, "causal": self.causal,
            f"at most {OPERATIONS}": self.short,
            f"from {MANY_ROWS} queries of a KV head on": self.many_rows,
        }  # fmt: skip
        return [name for name, is_so in kinds.items() if is_so]

    def __str__(self) -> str:
        passes = {None: [], True: ["training"], False: ["inference"]}[self.training]
        n = {None: [], True: ["with n"], False: ["n = 0"]}[self.with_n]
        return ", ".join([*passes, *n, *self.kinds, f"heads up to {self.widest}", f"from {self.keys} keys on"])


# An H100, bfloat16, 2026-11-26: PyTorch 2.11, Triton 3.6, FlashAttention 2 (2.8.3.post2), 3 (tokenspeed-fa3
# 3.0.0.post20260810, without a backward) and 4 (4.0.0b36), xFormers 0.0.35; h100-2026-11-26-grid.json in
# bench/results. By these rows the choice has at least 0.97 of the speed of the fastest installed backend, for E = 64,
# 128, 256, S = 512 to 16,384, causal and not.
#
# Varlen sequences and windows: h100-2026-11-26-varlen-window.json. At E = 128, sequences of 64 keys train 1.12 times as
# fast on the portable kernels as on the Hopper ones; sequences of 512 keys train 1.33 times as fast on the Hopper ones.
# With n, windows of 256 and 1,024 keys are 1.08 and 1.01 times as fast on those as on FlashAttention 4.
#
# Few queries: h100-2026-11-28-few-queries.json. Our decoding kernels take the least time but for many rows over many
# keys, which FlashAttention 3 multiplies faster. One query and fewer than 4,096 keys take each of them less time than
# the host for a new length, which comes with each step of a decoder; h100-2026-11-28-lengths.json has what each takes.
#
# Short calls without n: the host takes as long for a known length on each backend, and for a new one half as long on
# PyTorch's FlashAttention-2, which prepares nothing: h100-2026-11-28-host.json and h100-2026-11-28-lengths.json.
#
# The portable kernels are 1.2 to 1.9 times as fast as PyTorch's FlashAttention-2 at every point of the grid. Hence they
# come before it for calls that the Hopper kernels do not serve.
FEW_ROWS = "triton:decode", "flash_attn:3", "flash_attn:4", "triton"
SM_90 = (
    Row(False, None, 256, 4096, ("triton:decode", "sdpa:flash", "flash_attn:3", "triton"), queries=ONE),
    Row(False, True, 256, 0, ("triton:decode", "triton"), queries=ONE),
    Row(None, None, 256, 4096, ("sdpa:flash", "flash_attn:3", "flash_attn:4", "triton"), queries=ONE),
    Row(None, True, 256, 0, ("triton",), queries=ONE),
    Row(False, False, 256, 0, ("sdpa:flash", "triton:decode", "flash_attn:3", "triton"), queries=ONE),
    Row(None, False, 256, 0, ("sdpa:flash", "flash_attn:3", "flash_attn:4", "triton"), queries=ONE),
    Row(False, None, 256, MANY_KEYS, FEW_ROWS, queries=FEW, short=True),
    Row(False, None, 256, MANY_KEYS, ("flash_attn:3", "triton:decode", "triton"), queries=FEW, many_rows=True),
    Row(False, None, 256, MANY_KEYS, FEW_ROWS, queries=FEW),
    Row(None, None, 256, MANY_KEYS, ("triton",), queries=FEW),
    Row(False, False, 256, 0, ("sdpa:flash", "triton"), short=True),
    Row(True, True, 128, 6000, ("flash_attn:4", "triton")),
    Row(True, True, 64, 1500, ("triton:hopper", "flash_attn:4", "triton"), causal=True),
    Row(True, True, 64, 1500, ("flash_attn:4", "triton")),
    Row(True, False, 128, 1500, ("flash_attn:4", "triton")),
    Row(False, False, 128, 1500, ("flash_attn:3", "triton:hopper", "flash_attn:4", "triton"), causal=True),
    Row(False, None, 256, MANY_KEYS, ("triton:hopper", "flash_attn:3", "flash_attn:4", "triton")),
    Row(True, None, 64, 700, ("triton",), causal=True),
    Row(True, None, 64, 0, ("triton:portable",), causal=True),
    Row(None, None, 256, 0, ("triton",)),
    Row(True, None, 128, 128, ("triton",), varlen=True),
    Row(True, None, 128, 0, ("triton:portable",), varlen=True),
    Row(None, None, 256, 0, ("triton",), varlen=True),
)


# The lengths at which the order changes: see `_queries`, and the rows.
LENGTHS = tuple(sorted({2, FEW_QUERIES, MANY_KEYS, *(row.keys for row in SM_90 if row.keys)}))

_BY_KIND = {
    (varlen, queries): tuple(row for row in SM_90 if row.varlen == varlen and row.queries == queries)
    for varlen in (False, True)
    for queries in (MANY, FEW, ONE)
}


def automatic(call: AttentionCall) -> tuple[str, ...]:
    """Return the backends to try, in order, for a call that forces none."""
    row, default = _row(call), _default(call)
    if _reads_in_place(call):
        first = IN_PLACE_MANY_ROWS if has_many_rows(call.q_shape, call.k_shape) and not _is_short(call) else IN_PLACE
        return (*first, *[name for name in default if name not in first])
    if (row is None or call.padded) and _why_triton_first(call) is not None and "triton" in default:
        default = ("triton", *[name for name in default if name != "triton"])
    first = () if row is None else row.first
    if call.padded:
        first = tuple([name for name in first if name.startswith("triton")])
    return (*first, *[name for name in default if name not in first])


def reason(call: AttentionCall) -> str:
    """Return the reason for the automatic order of a call."""
    row, why_triton_first = _row(call), _why_triton_first(call)
    if _reads_in_place(call):
        return "automatic, first who reads keys where they lie"
    by_speed = f"by speed on an H100: {row}"
    if why_triton_first is not None and (row is None or call.padded):
        return f"automatic, triton first: {why_triton_first}" + (f"; {by_speed}" if row is not None else "")
    if row is not None:
        return f"automatic, {by_speed}"
    major, minor = call.capability or (9, 0)
    return "automatic" if major == 9 else f"automatic, not measured here: compute capability {major}.{minor}"


def _reads_in_place(call: AttentionCall) -> bool:
    in_place = (call.cached or call.padded) and not call.seqused_q
    return call.device == "cuda" and in_place and not call.needs_grad


def _default(call: AttentionCall) -> tuple[str, ...]:
    if call.capability is not None and torch.version.hip is None and call.capability[0] in UNMEASURED:
        return UNMEASURED[call.capability[0]]
    return DEFAULT.get(call.device, ELSEWHERE)


def is_short(queries: int, keys: int, columns: int) -> bool:
    """Return True if a forward takes the host longer than the GPU.

    `queries` are those of all heads, each of which sees `keys`, and `columns` are those of a key and of its value.
    """
    return 2 * queries * keys * columns <= SHORT


def has_many_rows(q_shape: Sequence[int], k_shape: Sequence[int]) -> bool:
    """Return True if all query heads of a KV head have `MANY_ROWS` queries together."""
    return q_shape[2] * q_shape[1] >= MANY_ROWS * k_shape[1]


def _is_short(call: AttentionCall) -> bool:
    batch, heads, len_q, _ = call.q_shape
    return is_short(batch * heads * len_q, call.keys_seen, call.head_dim + call.head_dim_v)


def _why_triton_first(call: AttentionCall) -> str | None:
    """Return the reason why `triton` comes first on a GPU, whatever the speed; None if there is none."""
    if call.device != "cuda":
        return None
    if call.padded:
        return "its kernels read the lengths in use, and others need a packed copy"
    # Rows may be masked by finite numbers such as -65504. There the gradients of the memory-efficient kernels carry the
    # rounding of a large lse.
    mask = call.mask_dtype
    if call.needs_grad and call.dtype.itemsize == 2 and mask is not None and mask.is_floating_point:
        return "the gradients beside a floating mask are more accurate there"
    return None


def _row(call: AttentionCall) -> Row | None:
    """Return the first row that matches the call."""
    if call.capability != (9, 0) or torch.version.hip is not None or call.dtype.itemsize != 2:
        return None
    if call.dropout_p:  # not measured; the portable kernels draw more random numbers than FlashAttention
        return None
    for row in _BY_KIND[call.varlen, _queries(call)]:
        if _fits(row, call):
            return row
    return None


def _queries(call: AttentionCall) -> str:
    """Return the class of the number of queries.

    It branches, since under torch.compile a comparison of lengths is no bool that could be compared with another.
    """
    if call.varlen:
        return MANY
    if call.q_shape[-2] == 1 and not call.windowed:
        return ONE
    if call.q_shape[-2] < FEW_QUERIES and call.keys_seen >= MANY_KEYS:
        return FEW
    return MANY


def _fits(row: Row, call: AttentionCall) -> bool:
    """Return True if the row matches the call.

    It is not a method, since torch.compile of PyTorch 2.8 does not trace every method of a NamedTuple.
    """
    with_n = call.n_kind != "none"
    if row.training not in (None, call.needs_grad) or row.with_n not in (None, with_n):
        return False
    if row.causal and not call.causal:
        return False
    if row.short and not _is_short(call):
        return False
    if row.many_rows and not has_many_rows(call.q_shape, call.k_shape):
        return False
    if call.head_dim > row.widest or call.head_dim_v > row.widest:
        return False
    return call.keys_seen >= row.keys
