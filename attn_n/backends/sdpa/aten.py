"""What the fused kernels of PyTorch share."""

from __future__ import annotations

from attn_n.call import AttentionCall


def unserved_field(call: AttentionCall) -> str | None:
    """Why none of PyTorch's fused kernels serves the call, whatever the device."""
    if call.softcap is not None:
        return "PyTorch's fused kernels have no softcap"
    if call.mask_needs_grad:
        return "no gradient of attn_mask"
    if call.alibi_needs_grad:
        return "no gradient of alibi_slopes"
    return None
