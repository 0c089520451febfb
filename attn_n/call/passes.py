"""The records that the forward and the backward of a backend take and return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_type_hints

from torch import Tensor


class Options(NamedTuple):
    """Everything but q, k, v and n, as a backend's forward and backward receive it.

    Query i of a sequence has position `p = i + S - L`, so that the last query is at the last key; where `seqused_q` or
    `seqused_k` say how many there are, these are L and S. It sees the keys from
    `p - window_left` to `p + window_right`. None is unlimited, and `window_right = 0` is causal attention. The right
    side may be negative, but not for varlen sequences: `L - S` is a causal mask aligned top-left, for S > L.
    """

    scale: float
    window_left: int | None = None
    window_right: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    # (B or 1, Hq or 1, L or 1, S or 1), bool (True = attend) or floating (added to the logits)
    mask: Tensor | None = None
    # (B, Hq), float32 (float64 for float64 inputs); adds -slope * |p - j|
    alibi_slopes: Tensor | None = None
    # (B + 1,), int32: varlen sequences; q, k and v are then (T, H, E)
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    # (B,), int32: of batch b only the queries i < seqused_q[b] and the keys leftpad_k[b] <= j < seqused_k[b] exist
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    # A KV cache that is read in place. Of a paged one, k and v are `(blocks, Hkv, block, E)`, and the blocks of each
    # sequence `(B, most)`, int32; else `(B,)`, int32, may say in which row of k and v each sequence lies.
    block_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    # (B, Hkv): the keys and values of a float8 cache are multiplied by these
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    num_splits: int = 0  # into how many parts keys are split; 0 lets a backend choose

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that may be tensors, in their order."""
        fields: tuple[Any, ...] = self
        return tuple([fields[place] for place in _TENSORS])

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Options:
        fields: list[Any] = list(self)
        for place, x in zip(_TENSORS, tensors, strict=True):
            fields[place] = x
        return Options(*fields)

    def without_tensors(self) -> Options:
        return self.with_tensors([None] * len(_TENSORS))

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def padded(self) -> bool:
        """True if some rows of a batch do not exist."""
        return self.seqused_q is not None or self.seqused_k is not None or self.leftpad_k is not None

    @property
    def cached(self) -> bool:
        """True if a table or numbers of rows say where in k and v the keys of a sequence lie."""
        return self.block_table is not None or self.cache_batch_idx is not None

    @property
    def causal(self) -> bool:
        """True if the visible keys are exactly those of a causal mask."""
        return self.window_left is None and self.window_right == 0

    def replaced(self, **changes: Any) -> Options:
        """Do as `_replace`, which torch.compile of PyTorch 2.8 cannot trace."""
        return Options(**{**dict(zip(Options._fields, self, strict=True)), **changes})


_TENSORS = [place for place, hint in enumerate(get_type_hints(Options).values()) if hint == Tensor | None]


class Saved(NamedTuple):
    """The tensors that a backward needs of its forward: `out` and `lse` have n inside."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor  # +inf for rows without visible keys at n = 0, which makes their weights zero
    log_n: float | Tensor | None = None  # a number, (Hq,), or of the shape of lse; None for n = 0
    rng_state: Tensor | None = None  # the state of the dropout generator


class Grads(NamedTuple):
    """The gradients of the results, and which gradients a backward has to return beyond dq, dk and dv."""

    dout: Tensor
    dlse: Tensor | None = None
    of_n: Literal["n", "log n"] | None = None
    of_mask: bool = False
    of_slopes: bool = False


class Gradients(NamedTuple):
    """The gradients that a backward returns. dk and dv may have Hq heads: the caller adds up those of a group.

    Attributes:
        dn: the gradient `(Hq,)` of n or of log n, whichever was asked for. None leaves it to the caller.
        dmask: the gradient of a floating mask, in its shape and dtype, if it was asked for.
        dslopes: the gradient of the ALiBi slopes, `(B, Hq)`, if it was asked for.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dn: Tensor | None = None
    dmask: Tensor | None = None
    dslopes: Tensor | None = None
