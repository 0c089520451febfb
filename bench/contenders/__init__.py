"""Who takes part in a benchmark, and how each of them is called."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from bench.contenders import eager, fla, flash_attn, flex, ours, torch_sdpa, xformers_
from bench.contenders.base import Contender

_PACKAGES = (
    "flash-attn", "flash-attn-3", "tokenspeed-fa3", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "xformers",
    "fla-core", "triton",
)  # fmt: skip


def contenders(device: str) -> tuple[Contender, ...]:
    """All that there are for a device, ours first; which of them are installed is asked problem by problem."""
    anywhere = (*ours.contenders(device), *torch_sdpa.contenders(device))
    if device == "cpu":
        return (*anywhere, *eager.CONTENDERS)
    peers = (flex, flash_attn, xformers_, fla, eager)
    return (*anywhere, *(contender for peer in peers for contender in peer.CONTENDERS))


def named(name: str, device: str) -> Contender:
    return next(contender for contender in contenders(device) if contender.name == name)


def installed() -> dict[str, str]:
    """The versions of the peers' packages, where they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
