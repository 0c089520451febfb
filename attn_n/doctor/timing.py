"""The timing of attention on this machine: each backend with n = 1, and PyTorch's own SDPA, which has no n."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_n.call.errors import UnsupportedError
from attn_n.functional import flash_attention_n

PEER = "torch SDPA, n = 0"
MOST_REPEATS = 100


@dataclass(frozen=True)
class Workload:
    """A causal call with as many queries as keys."""

    dtype: torch.dtype
    batch: int
    heads: int
    size: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, causal, batch {self.batch}, {self.heads} heads of size {self.size}"


WORKLOADS = {
    "cpu": Workload(torch.float32, 1, 8, 64, (512, 1024)),
    "cuda": Workload(torch.bfloat16, 1, 16, 128, (2048, 8192)),
}


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one backend at one length, or the failure that kept it from being timed."""

    device: str
    backend: str
    workload: str
    length: int
    forward_ms: float | None
    forward_backward_ms: float | None
    failure: str | None


def measure(backend: str, device: torch.device, workload: Workload, length: int, seconds: float) -> Timing | None:
    """Time one backend, or `PEER`, for about `seconds` a number; return None if it does not serve the workload."""
    try:
        forward, forward_backward = passes(backend, device, workload, length)
        numbers = _median_ms(forward, device, seconds), _median_ms(forward_backward, device, seconds)
        return Timing(str(device), backend, str(workload), length, *numbers, None)
    except UnsupportedError:
        return None
    except Exception as raised:  # out of memory, for one; the other backends are still worth a number
        failure = f"{type(raised).__name__}: {raised}"
        return Timing(str(device), backend, str(workload), length, None, None, failure)


def run_once(backend: str, device: torch.device, workload: Workload, length: int) -> None:
    """Run what is measured."""
    for run in passes(backend, device, workload, length):
        run()


def passes(
    backend: str, device: torch.device, workload: Workload, length: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what runs the forward, and the forward with its backward."""
    shape = (workload.batch, workload.heads, length, workload.size)
    q, k, v, dout = (torch.randn(shape, dtype=workload.dtype, device=device) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def attend() -> Tensor:
        if backend == PEER:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return flash_attention_n(q, k, v, causal=True, sm_n=1.0, backend=backend)

    def forward() -> None:
        with torch.no_grad():
            attend()

    def forward_backward() -> None:
        torch.autograd.grad(attend(), inputs, dout)

    return forward, forward_backward


def _median_ms(run: Callable[[], None], device: torch.device, seconds: float) -> float:
    clock = _cuda_ms if device.type == "cuda" else _host_ms
    clock(run, device, 1)  # the first run compiles, tunes and allocates
    (once,) = clock(run, device, 1)
    repeats = min(MOST_REPEATS, int(1e3 * seconds / once))
    return statistics.median([once, *clock(run, device, repeats)])


def _host_ms(run: Callable[[], None], device: torch.device, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_ms(run: Callable[[], None], device: torch.device, repeats: int) -> list[float]:
    """Time from event to event without synchronizing in between, so that the host runs ahead as it does in a model."""
    with torch.cuda.device(device):
        events = [torch.Event(device, enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        events[-1].synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
