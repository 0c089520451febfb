"""What is special to FlashAttention 2, in whichever package carries it: PyTorch, flash-attn, xFormers."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from attn_n.backends.adapt.flash import Sequences
from attn_n.call import AttentionCall, Options


class Visible(NamedTuple):
    """What the kernels are told of the keys that a query sees: a side of -1 is unlimited."""

    causal: bool
    left: int
    right: int
    max_k: int


def visible(options: Options, lengths: Sequences) -> Visible:
    """The window of a call as the kernels take it."""
    left, right, max_k = options.window_left, options.window_right, lengths.max_k
    if left is None and right == 0:
        if options.alibi_slopes is None:
            return Visible(True, -1, -1, max_k)
        # Their causal ALiBi is `slope * j`: the same weights, but with another lse. Beside a window it is ours.
        return Visible(False, max_k - 1, 0, max_k)
    if lengths.starts_q is not None and (left, right) != (None, None):
        # The longest keys bound a side without a bound (see `why_not_window`) and may be overstated for varlen.
        max_k = max(max_k, lengths.max_q)
    return Visible(False, -1 if left is None else left, -1 if right is None else right, max_k)


def why_not_window(call: AttentionCall) -> str | None:
    """Why the kernels do not serve the window of the call.

    A right side without a bound, or with one from S on, counts as S, which hides keys from queries far before the first
    key.
    """
    if call.varlen or not call.windowed or call.q_shape[2] <= call.k_shape[2] + 1:
        return None
    if call.window_right is None or call.window_right >= call.k_shape[2]:
        return "FlashAttention 2 takes a window that is open to the right only for L <= S + 1"
    return None


def rows_without_keys(lse: Tensor, options: Options, lengths: Sequences) -> Tensor:
    """-inf in place of the +inf that the kernels write for rows without visible keys, where there can be any."""
    ahead = options.window_right is not None and lengths.max_q > lengths.max_k
    if lengths.starts_q is None and not ahead:
        return lse
    return lse.masked_fill(lse == math.inf, -math.inf)
