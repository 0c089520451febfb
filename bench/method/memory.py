"""Measures the peak memory of one forward and backward beyond its inputs.

On a GPU it is what torch's allocator counts. On a CPU each point is a process of its own, whose peak never falls:
`python -m bench.method.memory "attn_n n=1" 2048`; its resident set also counts what a
library allocates behind torch's back.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.contenders import named
from bench.contenders.base import Contender
from bench.workloads import Workload, make_inputs
from bench.workloads.suites import DEVICE, memory_workload


def peak(contender: Contender, workload: Workload) -> int:
    """Returns the bytes at the peak of the contender, less those before it started."""
    if workload.device == "cuda":
        return _allocated(contender, workload)
    command = [sys.executable, "-m", "bench.method.memory", contender.name, str(workload.length)]
    root = Path(__file__).parents[2]
    return int(subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True).stdout)


def allocated(run: Callable[[], object]) -> int:
    """Returns the bytes that the allocator of the GPU holds at most during a run, less those before."""
    run()  # compilers and libraries keep workspaces from their first call on
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _allocated(contender: Contender, workload: Workload) -> int:
    passes = contender.prepare(make_inputs(workload))
    return allocated(lambda: passes.backward(passes.forward()))


def _peak_of_this_process(contender: Contender, workload: Workload) -> int:
    # The code of the kernels and the threads become resident at first use; they are no part of the workload's memory.
    _once(contender, memory_workload(64))
    return _once(contender, workload)


def _once(contender: Contender, workload: Workload) -> int:
    passes = contender.prepare(make_inputs(workload))
    before = _resident_peak()
    passes.backward(passes.forward())
    return _resident_peak() - before


def _resident_peak() -> int:
    # Not getrusage, whose ru_maxrss a process inherits from the one that starts it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].removesuffix("kB")) * 1024


if __name__ == "__main__":
    name, length = sys.argv[1:]
    print(_peak_of_this_process(named(name, DEVICE), memory_workload(int(length))))
