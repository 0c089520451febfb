"""The report on this machine: versions, and for each device what backends serve, their errors and their speed."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import attn_n
from attn_n.backends import registry
from attn_n.backends.base import Family
from attn_n.call import AttentionCall
from attn_n.dispatch import order, serving
from attn_n.doctor import selfcheck, timing

DISTRIBUTIONS = ("triton", "flash-attn", "flash-attn-3", "tokenspeed-fa3", "flash-attn-4", "xformers", "mslk-cuda")


@dataclass(frozen=True)
class Device:
    """A device and its name; threads of a CPU, compute capability and memory of a GPU."""

    device: str
    name: str
    threads: int | None = None
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Support:
    """The reasons why a backend does not serve each of the typical calls on a device; none if it does.

    A family has the reasons of all its members. `rank` is its place in the automatic order of the device, from 1.
    """

    device: str
    backend: str
    rank: int | None
    reasons: dict[str, list[str]]


@dataclass(frozen=True)
class Report:
    versions: dict[str, str | None]
    devices: list[Device]
    support: list[Support]
    checks: list[selfcheck.Check]
    timings: list[timing.Timing]
    passed: bool


def collect(workloads: dict[str, timing.Workload] = timing.WORKLOADS, seconds: float = 0.2) -> Report:
    """Make the whole report; each timing takes about `seconds`."""
    found = devices()
    support = [row for device in found for row in _support(device)]
    checks = [check for device in found for check in _checks(device)]
    # A backend that is wrong here is not timed, since nobody should choose it for its speed.
    failed = {(check.device, check.backend) for check in checks if not check.passed}
    timings = [
        result
        for device in found
        for backend in (timing.PEER, *_kernels(device))
        if (device.device, backend) not in failed
        for result in _timings(backend, device, workloads, seconds)
    ]
    return Report(_versions(), found, support, checks, timings, not failed)


def devices() -> list[Device]:
    cpu = Device("cpu", f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", torch.get_num_threads())
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = properties.major, properties.minor
        memory = properties.total_memory
        gpus.append(Device(f"cuda:{index}", properties.name, capability=capability, memory_bytes=memory))
    return [cpu, *gpus]


def typical_calls(device: Device) -> dict[str, AttentionCall]:
    """Return the calls of the table of support, by what is special about each."""
    batch, heads, length, size = 2, 8, 1024, 64
    plain = AttentionCall(
        device=device.device.partition(":")[0],
        capability=device.capability,
        dtype=torch.bfloat16,
        **_self_attention(batch, heads, length, size),
        n_kind="float",
        needs_grad=True,
    )
    return {
        "bf16": plain,
        "fp32": replace(plain, dtype=torch.float32),
        "fp64": replace(plain, dtype=torch.float64),
        "causal": replace(plain, window_right=0),
        "window": replace(plain, window_left=128, window_right=0),
        "bool mask": replace(plain, mask_shape=(batch, 1, length, length), mask_dtype=torch.bool),
        "ALiBi": replace(plain, alibi=True),
        "softcap": replace(plain, softcap=30.0),
        "dropout": replace(plain, dropout_p=0.1),
        "varlen": replace(plain, sequences=batch, **_self_attention(batch * length, heads, size)),
        "lse gradient": replace(plain, return_lse=True),
    }


def _self_attention(*shape: int) -> dict[str, Any]:
    stride = torch.empty(shape, device="meta").stride()
    return {f"{x}_shape": shape for x in "qkv"} | {f"{x}_stride": stride for x in "qkv"}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "attn_n": attn_n.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions | {"platform": platform.platform()}


def _support(device: Device) -> Iterator[Support]:
    calls = typical_calls(device)
    automatic = order.automatic(calls["bf16"])
    for name in registry.names():
        rank = automatic.index(name) + 1 if name in automatic else None
        members = _members(name, device)
        yield Support(device.device, name, rank, {kind: _reasons(name, members, call) for kind, call in calls.items()})
        for member in members:
            yield Support(
                device.device, member, None, {kind: _reasons(member, [], call) for kind, call in calls.items()}
            )


def _reasons(name: str, members: list[str], call: AttentionCall) -> list[str]:
    reason = serving.why_not(name, call)
    if reason is None:
        return []
    refusals = dict.fromkeys(refusal for member in members if (refusal := serving.why_not(member, call)))
    return list(refusals) or [reason]


def _members(name: str, device: Device) -> list[str]:
    """Return the members of a family for the device, also those that run only by name."""
    backend, _ = registry.find(name)
    if not isinstance(backend, Family):
        return []
    call = typical_calls(device)["bf16"]
    return [f"{name}:{member}" for member in (*backend.priority(call), *backend.by_name(call))]


def _kernels(device: Device) -> list[str]:
    """Return the backends of the device, each family replaced by its members."""
    return [kernel for name in registry.names() for kernel in _members(name, device) or [name]]


def _checks(device: Device) -> Iterator[selfcheck.Check]:
    for backend in _kernels(device):
        for dtype in selfcheck.TOLERANCE:
            check = selfcheck.check(backend, torch.device(device.device), dtype)
            if check is not None:
                yield check


def _timings(
    backend: str, device: Device, workloads: dict[str, timing.Workload], seconds: float
) -> Iterator[timing.Timing]:
    place = torch.device(device.device)
    workload = workloads[place.type]
    for length in workload.lengths:
        result = timing.measure(backend, place, workload, length, seconds)
        if result is not None:
            yield result
