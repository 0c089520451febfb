"""Measures the first call in a new process."""

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
from bench.workloads import make_inputs
from bench.workloads.suites import DEVICE, tiny_workload


def first_call(contender: Contender) -> float:
    """Returns the seconds of the first forward and backward in a new process with empty caches of compiled kernels."""
    command = [sys.executable, "-m", "bench.method.first_call", contender.name]
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
