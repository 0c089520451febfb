"""The description of a call by metadata alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_n.call.passes import Options

# The arguments beyond attention with a scale and with n (one number, or one a head), each with its name in refusals.
FEATURES = {
    "causal": "causal mask",
    "window": "window",
    "negative window": "window whose right side is negative (causal_upper_left, L < S)",
    "softcap": "softcap",
    "dropout": "dropout",
    "mask": "attn_mask",
    "mask gradient": "gradient of attn_mask",
    "alibi": "alibi_slopes",
    "alibi gradient": "gradient of alibi_slopes",
    "varlen": "varlen sequences",
    "lse gradient": "gradient of lse",
    "n a row": "n or sinks of more than one dimension",
    "seqused": "seqused_q or seqused_k",
    "leftpad": "leftpad_k",
    "cache": "KV cache",
    "block table": "block table of a paged KV cache",
}


@dataclass(unsafe_hash=True)  # frozen it would take three times as long to make, 5 us in each call of new lengths
class AttentionCall:
    """One call, described by metadata alone so that the choice of a backend can be tested on any machine.

    Shapes and strides are those of the canonical tensors: `(B, H, L, E)`, or varlen `(T, H, E)`.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    q_stride: tuple[int, ...]
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    window_left: int | None = None
    window_right: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    mask_shape: tuple[int, ...] | None = None
    mask_dtype: torch.dtype | None = None
    alibi: bool = False
    n_kind: str = "none"  # "none" (n = 0), "float", "scalar tensor", "per head" or "per row"
    sequences: int | None = None  # the number of varlen sequences; None for batches
    return_lse: bool = False
    needs_grad: bool = False
    mask_needs_grad: bool = False
    alibi_needs_grad: bool = False
    transform: str | None = None  # how the call is differentiated, if not by one backward pass
    seqused: bool = False
    leftpad: bool = False
    seqused_q: bool = False
    cache: bool = False  # k and v are a cache that is read in place: float8, or with rows of its own
    cache_dtype: torch.dtype | None = None
    block_table: int = 0  # how many blocks of a paged cache a sequence may have; 0 if it is not paged

    @property
    def features(self) -> frozenset[str]:
        """The names in `FEATURES` that the call asks for."""
        found = set()
        left, right = self.window_left, self.window_right
        if left is not None or right is not None:
            found.add("causal" if left is None and right == 0 else "window")
            if right is not None and right < 0:
                found.add("negative window")
        if self.softcap is not None:
            found.add("softcap")
        if self.dropout_p:
            found.add("dropout")
        if self.mask_shape is not None:
            found.add("mask")
        if self.mask_needs_grad:
            found.add("mask gradient")
        if self.alibi:
            found.add("alibi")
        if self.alibi_needs_grad:
            found.add("alibi gradient")
        if self.sequences is not None:
            found.add("varlen")
        if self.return_lse and self.needs_grad:
            found.add("lse gradient")
        if self.n_kind == "per row":
            found.add("n a row")
        if self.seqused:
            found.add("seqused")
        if self.leftpad:
            found.add("leftpad")
        if self.cache:
            found.add("cache")
        if self.block_table:
            found.add("block table")
        return frozenset(found)

    @property
    def varlen(self) -> bool:
        return self.sequences is not None

    @property
    def padded(self) -> bool:
        """True if some rows of a batch do not exist."""
        return self.seqused or self.leftpad

    @property
    def cached(self) -> bool:
        """True if k and v are a KV cache that is not a batch in the order of the sequences and in the dtype of q."""
        return self.cache or self.block_table > 0

    @property
    def most_keys(self) -> int:
        """The most keys that a sequence of a batch may have."""
        return self.k_shape[-2] * max(self.block_table, 1)

    @property
    def keys_seen(self) -> int:
        """The most keys that a query sees, by its sequence (the average one for varlen) and by its window."""
        keys = self.most_keys if self.sequences is None else self.k_shape[0] // max(self.sequences, 1)
        left, right = self.window_left, self.window_right
        if right is not None and right < 0:
            keys = max(0, keys + right)
        return keys if left is None or right is None else max(0, min(keys, left + right + 1))

    @property
    def heads_q(self) -> int:
        return self.q_shape[1]

    @property
    def heads_kv(self) -> int:
        return self.k_shape[1]

    @property
    def head_dim(self) -> int:
        return self.q_shape[-1]

    @property
    def head_dim_v(self) -> int:
        return self.v_shape[-1]

    @property
    def causal(self) -> bool:
        """True if the visible keys are exactly those of a causal mask."""
        return self.window_left is None and self.window_right == 0

    @property
    def windowed(self) -> bool:
        """True if a window bounds the visible keys otherwise than a causal mask does."""
        return self.window_left is not None or self.window_right not in (None, 0)

    def _sizes(self) -> str:
        """Return the sizes as they were read from the shapes, which shows (B, L, H, E) passed for (B, H, L, E)."""
        heads = {"Hq": self.heads_q, "Hkv": self.heads_kv}
        if self.sequences is None:
            sizes = {"B": self.q_shape[0], **heads, "L": self.q_shape[2], "S": self.k_shape[2]}
        else:
            sizes = {"sequences": self.sequences, **heads, "Tq": self.q_shape[0], "Tk": self.k_shape[0]}
        sizes |= {"E": self.head_dim, "Ev": self.head_dim_v}
        return f"read as {', '.join(f'{name} = {size}' for name, size in sizes.items())}"

    def __str__(self) -> str:
        device = self.device if self.capability is None else f"{self.device} sm_{''.join(map(str, self.capability))}"
        parts = [
            f"{'varlen ' if self.varlen else ''}q {self.q_shape}, k {self.k_shape}, v {self.v_shape}",
            self._sizes(),
            f"{str(self.dtype).removeprefix('torch.')} on {device}",
        ]
        if self.causal:
            parts.append("causal")
        elif self.windowed:
            parts.append(f"window ({self.window_left}, {self.window_right})")
        if self.softcap is not None:
            parts.append(f"softcap {self.softcap:g}")
        if self.mask_shape is not None:
            parts.append(f"{str(self.mask_dtype).removeprefix('torch.')} mask {self.mask_shape}")
        if self.alibi:
            parts.append("ALiBi")
        parts += [words for words, asked in (("seqused", self.seqused), ("leftpad_k", self.leftpad)) if asked]
        if self.cached:
            parts.append("paged KV cache" if self.block_table else "KV cache")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p:g}")
        if self.n_kind != "none":
            parts.append(f"n: {self.n_kind}")
        if self.return_lse:
            parts.append("returns lse")
        if self.needs_grad:
            parts.append("needs gradients")
        if self.transform is not None:
            parts.append(self.transform)
        return ", ".join(parts)


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    n_kind: str,
    return_lse: bool,
    needs_grad: bool,
    mask_needs_grad: bool = False,
    alibi_needs_grad: bool = False,
    transform: str | None = None,
) -> AttentionCall:
    """Return the description of a call of canonical tensors."""
    mask = options.mask
    return AttentionCall(
        device=q.device.type,
        capability=torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None,
        dtype=q.dtype,
        q_shape=tuple(q.shape),
        k_shape=tuple(k.shape),
        v_shape=tuple(v.shape),
        q_stride=q.stride(),
        k_stride=k.stride(),
        v_stride=v.stride(),
        window_left=options.window_left,
        window_right=options.window_right,
        softcap=options.softcap,
        dropout_p=options.dropout_p,
        mask_shape=None if mask is None else tuple(mask.shape),
        mask_dtype=None if mask is None else mask.dtype,
        alibi=options.alibi_slopes is not None,
        n_kind=n_kind,
        sequences=None if options.cu_seqlens_q is None else options.cu_seqlens_q.shape[0] - 1,
        return_lse=return_lse,
        needs_grad=needs_grad,
        mask_needs_grad=mask_needs_grad,
        alibi_needs_grad=alibi_needs_grad,
        transform=transform,
        seqused=options.seqused_q is not None or options.seqused_k is not None,
        leftpad=options.leftpad_k is not None,
        seqused_q=options.seqused_q is not None,
        cache=options.cache_batch_idx is not None or k.dtype != q.dtype,
        cache_dtype=None if k.dtype == q.dtype else k.dtype,
        block_table=0 if options.block_table is None else options.block_table.shape[1],
    )
