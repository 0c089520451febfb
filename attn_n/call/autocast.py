"""torch.autocast around a call: it gives q, k and v their dtype, and reaches no operation of a backend.

It would cast the operands of matrix products, of those in float32 too, and with them a log n or a bias.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from attn_n.compilation import constant_when_compiled


def enabled(device: str) -> bool:
    return _known(device) and torch.is_autocast_enabled(device)


def suspended(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if enabled(device) else contextlib.nullcontext()


@constant_when_compiled  # PyTorch 2.11 cannot trace it
def _known(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
