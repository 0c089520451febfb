"""torch.autocast around a call: it decides the dtype of q, k and v, and is off while a backend runs.

Within a backend it would cast the operands of every matmul, of float32 ones too, and with them log n or a bias.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from attn_n.compilation import constant_when_compiled


def enabled(device: str) -> bool:
    """Return True if autocast is on for this type of device."""
    return (device in ("cpu", "cuda") or _known(device)) and torch.is_autocast_enabled(device)


def dtype(device: str) -> torch.dtype | None:
    """Return the dtype that autocast casts to on this type of device; None if it is off."""
    return torch.get_autocast_dtype(device) if enabled(device) else None


def suspended(device: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autocast is off."""
    return torch.autocast(device, enabled=False) if enabled(device) else contextlib.nullcontext()


@constant_when_compiled  # PyTorch 2.11 cannot trace it
def _known(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
