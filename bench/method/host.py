"""What a call costs the host, and what the first call of a process costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.contenders import named
from bench.contenders.base import Contender
from bench.method.clocks import Run
from bench.workloads import make_inputs
from bench.workloads.suites import DEVICE, tiny_workload

_CALLS, _BATCHES = 20, 15


def seconds_a_call(run: Run) -> list[float]:
    """Host seconds of a call, whose work takes the device no time to speak of; each value a mean of several calls."""
    run()
    values = []
    for _ in range(_BATCHES):
        _wait()
        start = time.perf_counter()
        for _ in range(_CALLS):
            run()
        values.append((time.perf_counter() - start) / _CALLS)
    return values


def first_call(contender: Contender) -> float:
    """Seconds of the first forward and backward in a new process, with empty caches of compiled kernels."""
    command = [sys.executable, "-m", "bench.method.host", contender.name]
    with tempfile.TemporaryDirectory() as folder:
        names = "TRITON", "TORCHINDUCTOR", "FLASH_ATTENTION_CUTE_DSL"
        caches = {f"{name}_CACHE_DIR": f"{folder}/{name}" for name in names}
        root = Path(__file__).parents[2]
        said = subprocess.run(command, cwd=root, env=os.environ | caches, stdout=subprocess.PIPE, check=True).stdout
    return float(said.split()[-1])


def _first_call_of_this_process(contender: Contender) -> float:
    inputs = make_inputs(tiny_workload())
    _wait()
    start = time.perf_counter()
    passes = contender.prepare(inputs)
    passes.backward(passes.forward())
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(_first_call_of_this_process(named(sys.argv[1], DEVICE)))
