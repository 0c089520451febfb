"""Who decodes from a KV cache, a file for each library."""

from __future__ import annotations

from bench.contenders.base import Contender
from bench.contenders.cached import flash_attn, flashinfer, others, ours


def contenders(device: str) -> tuple[Contender, ...]:
    """Returns all contenders for a device, ours first, whether installed or not; each says so for a workload."""
    peers = (others.contenders(device),) if device == "cpu" else (
        flash_attn.CONTENDERS, flashinfer.CONTENDERS, others.contenders(device)
    )  # fmt: skip
    return (*ours.contenders(device), *(contender for peer in peers for contender in peer))
