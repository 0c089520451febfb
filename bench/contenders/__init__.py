"""The contenders, a file for each library."""

from __future__ import annotations

import functools
import itertools
from importlib.metadata import PackageNotFoundError, version

from bench.contenders import cached, eager, fla, flash_attn, flex, ours, torch_sdpa, xformers_
from bench.contenders.base import Contender
from bench.workloads import Workload
from bench.workloads.calls import Call, calls

_PACKAGES = (
    "flash-attn", "flash-attn-3", "tokenspeed-fa3", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "xformers",
    "mslk-cuda", "fla-core", "flashinfer-python", "triton",
)  # fmt: skip


def contenders(device: str, quick: bool = False) -> tuple[Contender, ...]:
    """Returns all contenders for a device, ours first, whether installed or not; each says so for a workload.

    The quick ones leave out learned sinks per head, which differ little from n = 1.
    """
    peers = (eager,) if device == "cpu" else (flex, flash_attn, xformers_, fla, eager)
    found = (
        *ours.contenders(device),
        *torch_sdpa.contenders(device),
        *(contender for peer in peers for contender in peer.CONTENDERS),
    )
    return tuple(contender for contender in found if not (quick and contender.n == "per head"))


def for_call(call: Call) -> tuple[Contender, ...]:
    """Returns who is measured in one kind of call: ours, PyTorch's SDPA with the same mask, others with the same n."""
    return _for_call(call.workload, call.n)


@functools.cache  # the same contenders in all passes, which are prepared together
def _for_call(workload: Workload, n: str) -> tuple[Contender, ...]:
    device = workload.device
    plain = n != "per head" and workload.mask is None and workload.window is None
    torchs = torch_sdpa.VARLEN if workload.sequences else torch_sdpa.PLAIN if plain else torch_sdpa.MASKED
    peers = () if workload.mask else (each for each in contenders(device) if not each.ours and each.n == n)
    return tuple(dict.fromkeys((*ours.of_call(device, n), torchs, *peers)))


def named(name: str, device: str) -> Contender:
    everyone = itertools.chain(contenders(device), *map(for_call, calls(device)), cached.contenders(device))
    return next(contender for contender in everyone if contender.name == name)


def installed() -> dict[str, str]:
    """Returns the versions of the peers' packages that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
