"""Who takes part in a benchmark, and how each of them is called."""

from __future__ import annotations

import functools
import itertools
from importlib.metadata import PackageNotFoundError, version

from bench.contenders import eager, fla, flash_attn, flex, ours, torch_sdpa, xformers_
from bench.contenders.base import Contender
from bench.workloads import Workload
from bench.workloads.calls import Call, calls

_PACKAGES = (
    "flash-attn", "flash-attn-3", "tokenspeed-fa3", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "xformers",
    "fla-core", "triton",
)  # fmt: skip


def contenders(device: str, quick: bool = False) -> tuple[Contender, ...]:
    """All that there are for a device, ours first; which of them are installed is asked workload by workload.

    The quick ones are all but those with a learned sink per head, who differ little from those with n = 1.
    """
    peers = (eager,) if device == "cpu" else (flex, flash_attn, xformers_, fla, eager)
    found = (
        *ours.contenders(device),
        *torch_sdpa.contenders(device),
        *(contender for peer in peers for contender in peer.CONTENDERS),
    )
    return tuple(contender for contender in found if not (quick and contender.n == "per head"))


def for_call(call: Call) -> tuple[Contender, ...]:
    """Who makes one kind of call: ours, PyTorch's SDPA with the same mask, and whoever else computes the same n."""
    return _for_call(call.workload, call.n)


@functools.cache  # the same contenders in all passes, which are prepared together
def _for_call(workload: Workload, n: str) -> tuple[Contender, ...]:
    device = workload.device
    plain = n != "per head" and workload.mask is None and workload.window is None
    torchs = torch_sdpa.VARLEN if workload.sequences else torch_sdpa.PLAIN if plain else torch_sdpa.MASKED
    peers = () if workload.mask else (each for each in contenders(device) if not each.ours and each.n == n)
    return tuple(dict.fromkeys((*ours.of_call(device, n), torchs, *peers)))


def named(name: str, device: str) -> Contender:
    everyone = itertools.chain(contenders(device), *map(for_call, calls(device)))
    return next(contender for contender in everyone if contender.name == name)


def installed() -> dict[str, str]:
    """The versions of the peers' packages, where they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
