"""The contenders of bench by the names that readers know."""

from __future__ import annotations

NAMES = {
    "attn_n n=1": "attn-n, n = 1",
    "attn_n triton:hopper n=1": "`triton:hopper`, n = 1",
    "attn_n triton:portable n=1": "`triton:portable`, n = 1",
    "flash-attn 4 sink n=1": "FlashAttention 4, its sink",
    "flash-attn 3 sink n=1": "FlashAttention 3, its sink",
    "flash-attn 2 n=0": "FlashAttention 2, n = 0",
    "torch sdpa cudnn n=0": "cuDNN, n = 0",
    "torch sdpa flash n=0": "PyTorch's FlashAttention 2, n = 0",
    "torch sdpa n=0": "PyTorch's SDPA, n = 0",
    "flex n=0": "FlexAttention, n = 0",
    "xformers n=0": "xFormers, n = 0",
    "fla sink n=1": "flash-linear-attention, its sink",
    "zero-padded sdpa n=1": "SDPA with a padded key, n = 1",
    "eager softmax_n n=1": "softmax_n in plain PyTorch",
}
AUTOMATIC, HOPPER, PORTABLE = "attn_n n=1", "attn_n triton:hopper n=1", "attn_n triton:portable n=1"
FA4, FA3, FA2 = "flash-attn 4 sink n=1", "flash-attn 3 sink n=1", "flash-attn 2 n=0"
CUDNN, FLEX, TORCHS_FA2 = "torch sdpa cudnn n=0", "flex n=0", "torch sdpa flash n=0"
TORCHS, EAGER = "torch sdpa n=0", "eager softmax_n n=1"
_LINES = {
    "attn_n": "attn-n", "flash-attn 2": "FlashAttention 2", "flash-attn 3": "FlashAttention 3",
    "flash-attn 4": "FlashAttention 4", "flash-attn 3 sink": "FlashAttention 3, its sink",
    "flash-attn 4 sink": "FlashAttention 4, its sink", "flex": "FlexAttention", "flex by lse": "FlexAttention by lse",
    "fla": "flash-linear-attention", "fla sink": "flash-linear-attention, its sink", "torch sdpa": "PyTorch's SDPA",
    "torch sdpa efficient": "PyTorch's efficient kernel", "torch sdpa flash": "PyTorch's FlashAttention 2",
    "torch sdpa cudnn": "cuDNN", "eager": "plain PyTorch",
}  # fmt: skip


def label(contender: str) -> str:
    """Return the name of a contender with its n."""
    before, _, n = contender.rpartition(" n=")
    return NAMES.get(
        contender, f"{label_of_line(before)}, n {n}" if n == "per head" else f"{label_of_line(before)}, n = {n}"
    )


def label_of_line(contender: str) -> str:
    """Return the name of a contender whose n was taken off."""
    of_backend = contender.removeprefix("attn_n ")
    return _LINES.get(contender, contender) if of_backend == contender else f"`{of_backend}`"
