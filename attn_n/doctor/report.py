"""The report on this machine: versions, and for each device what backends serve, their errors and their speed."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

import attn_n
from attn_n.backends import registry
from attn_n.backends.base import Family
from attn_n.call import AttentionCall
from attn_n.dispatch import order, serving
from attn_n.doctor import selfcheck, timing
from attn_n.doctor.progress import Progress
from attn_n.doctor.warm_up import compile_kernels

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


@dataclass
class Report:
    """What `steps` has found so far; `left_out` says what was not done, and which option does it."""

    versions: dict[str, str | None] = field(default_factory=dict)
    devices: list[Device] = field(default_factory=list)
    support: list[Support] = field(default_factory=list)
    checks: list[selfcheck.Check] = field(default_factory=list)
    timings: list[timing.Timing] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    passed: bool = True


@dataclass(frozen=True)
class Extent:
    """How much is done, and how long each timing takes, about."""

    cases: tuple[selfcheck.Case, ...]
    timed: bool = True
    each_gpu: bool = False  # time GPUs of the same name, too
    workloads: dict[str, timing.Workload] = field(default_factory=lambda: timing.WORKLOADS)
    seconds: float = 0.2


QUICK = Extent(selfcheck.CASES[:1], timed=False)
USUAL = Extent(selfcheck.CASES[:3])
FULL = Extent(selfcheck.CASES, each_gpu=True)


class Section(NamedTuple):
    """A part of the report that is complete: the name of its field, and the device that it is about, if about one."""

    field: str
    device: str | None = None


def steps(found: Report, extent: Extent, progress: Progress) -> Iterator[Section]:
    """Fill an empty report, and yield each of its sections as soon as it is there."""
    found.versions = _versions()
    yield Section("versions")
    found.devices = devices()
    yield Section("devices")
    timed = _timed(found.devices, extent)
    for device in found.devices:
        found.support += _support(device)
        yield Section("support", device.device)
        checks = [(backend, dtype) for backend in _kernels(device) for dtype in selfcheck.TOLERANCE]
        lengths = extent.workloads[_place(device).type].lengths if device in timed else ()
        timings = [(backend, length) for backend in (timing.PEER, *_kernels(device)) for length in lengths]
        if _place(device).type == "cuda":
            compile_kernels([*_calls_checked(device, extent, checks), *_calls_timed(device, extent, timings)], progress)
        for done, (backend, dtype) in enumerate(checks):
            progress.show(done, len(checks), f"checking {backend} on {device.device}")
            check = selfcheck.check(backend, _place(device), dtype, extent.cases)
            if check is not None:
                found.checks.append(check)
                found.passed &= check.passed
        yield Section("checks", device.device)
        # A backend that is wrong here is not timed, since nobody should choose it for its speed.
        failed = {(check.device, check.backend) for check in found.checks if not check.passed}
        for done, (backend, length) in enumerate(timings):
            progress.show(done, len(timings), f"timing {backend} on {device.device}")
            if (device.device, backend) not in failed:
                workload = extent.workloads[_place(device).type]
                result = timing.measure(backend, _place(device), workload, length, extent.seconds)
                found.timings += [] if result is None else [result]
        if timings:
            yield Section("timings", device.device)
    found.left_out = _left_out(found.devices, extent)
    yield Section("left_out")


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


def _calls_checked(
    device: Device, extent: Extent, checks: list[tuple[str, torch.dtype]]
) -> Iterator[tuple[str, Callable[[], object]]]:
    for backend, dtype in checks:
        for case in extent.cases:
            yield backend, partial(selfcheck.run, case, backend, _place(device), dtype)


def _calls_timed(
    device: Device, extent: Extent, timings: list[tuple[str, int]]
) -> Iterator[tuple[str, Callable[[], object]]]:
    workload = extent.workloads[_place(device).type]
    for backend, length in timings:
        yield backend, partial(timing.run_once, backend, _place(device), workload, length)


def _timed(found: list[Device], extent: Extent) -> list[Device]:
    """Return the devices that are timed: of those with the same name the first one, unless each was asked for."""
    if not extent.timed:
        return []
    first = {device.name: device for device in reversed(found)}
    return [device for device in found if extent.each_gpu or device is first[device.name]]


def _left_out(found: list[Device], extent: Extent) -> list[str]:
    left_out = []
    cases, of = len(extent.cases), len(selfcheck.CASES)
    if cases < of:
        left_out.append(f"{of - cases} of the {of} cases of the self-check: --full checks them all")
    if not extent.timed:
        left_out.append("the timings: without --quick they are made")
    elif untimed := [device.device for device in found if device not in _timed(found, extent)]:
        left_out.append(f"timings on GPUs that are the same as others, {', '.join(untimed)}: --full makes them, too")
    return left_out


def _place(device: Device) -> torch.device:
    return torch.device(device.device)
