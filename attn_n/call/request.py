"""The arguments of a call, as they were passed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """The arguments that both public functions have, as they were passed."""

    causal: bool
    sm_scale: float | None
    sm_n: float | Tensor | None
    sinks: Tensor | None
    attn_mask: Tensor | None
    window: tuple[int | None, int | None] | None
    softcap: float | None
    alibi_slopes: Tensor | None
    dropout_p: float
    return_lse: bool
    backend: str | None
