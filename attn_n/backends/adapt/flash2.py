"""The semantics of FlashAttention 2, which PyTorch, flash-attn and xFormers carry."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from attn_n.backends.adapt.flash import Sequences
from attn_n.call import AttentionCall, Options


class WindowArguments(NamedTuple):
    """The kernels' arguments for causal masks and windows; a side of -1 is unlimited."""

    causal: bool
    left: int
    right: int
    max_k: int


def window_arguments(options: Options, lengths: Sequences) -> WindowArguments:
    """Return the window of a call as the kernels take it."""
    left, right, max_k = options.window_left, options.window_right, lengths.max_k
    if options.causal:
        if options.alibi_slopes is None:
            return WindowArguments(True, -1, -1, max_k)
        # Under causal=True their ALiBi adds `slope * j`: equal weights but another lse. With a window it is as ours.
        return WindowArguments(False, max_k - 1, 0, max_k)
    if lengths.starts_q is not None and (left, right) != (None, None):
        # max_k bounds a side without a bound (see `why_not_window`); in varlen it may be overstated.
        max_k = max(max_k, lengths.max_q)
    return WindowArguments(False, -1 if left is None else left, -1 if right is None else right, max_k)


def why_not_window(call: AttentionCall, in_place: bool = False) -> str | None:
    """Return the reason why the kernels do not serve the window of the call, or None.

    A right side without a bound, or with one from S on, counts as S, which hides keys from queries far before the first
    key. A padded batch is packed as varlen sequences, unless its keys are read `in_place`.
    """
    if call.varlen or not call.windowed or call.q_shape[2] <= call.most_keys + 1:
        return None
    if (call.padded or call.cached) and not in_place:
        return None
    if call.window_right is None or call.window_right >= call.most_keys:
        return "FlashAttention 2 takes a window that is open to the right only for L <= S + 1"
    return None


def rows_without_keys(lse: Tensor, options: Options, lengths: Sequences) -> Tensor:
    """Replace the +inf that the kernels store as the lse of rows without visible keys by -inf."""
    ahead = options.window_right is not None and lengths.max_q > lengths.max_k
    if lengths.starts_q is None and not ahead:
        return lse
    return minus_infinity_(lse)


def minus_infinity_(lse: Tensor) -> Tensor:
    """Replace +inf by -inf in place, in one launch."""
    return lse.nan_to_num_(nan=math.nan, posinf=-math.inf, neginf=-math.inf)
