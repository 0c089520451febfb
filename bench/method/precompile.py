"""Compiles what a run is going to measure, many kernels at a time, before the run starts.

Triton, FlexAttention and FlashAttention 4 keep on disk what they have compiled, where other processes find it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch

from bench.contenders import named
from bench.contenders.base import Contender
from bench.contenders.library import one_line
from bench.workloads import Workload, make_inputs
from bench.workloads.suites import Case, memory_workload

_BYTES_A_PROCESS = 5 << 30  # of the GPU: torch's context, and the inputs and gradients of the longest workloads
_BYTES_OF_KV = 5 << 29  # a larger cache leaves no room for other processes: its contenders compile when measured


class Job(NamedTuple):
    """One forward, with its backward or without gradients. The contender is named, for another process runs it."""

    contender: str
    workload: Workload
    backward: bool


def jobs(items: Iterable[Mapping[str, Any]]) -> list[Job]:
    """Returns what to compile for pytest items with these parameters; items that measure compiling need nothing."""
    return list(dict.fromkeys(job for parameters in items if (job := _job(parameters)) is not None))


def _job(parameters: Mapping[str, Any]) -> Job | None:
    contender: Contender | None = parameters.get("contender")
    case: Case | None = parameters.get("case")
    length: int | None = parameters.get("length")
    if contender is None or contender.apart:  # those measured apart compile nothing and take long
        return None
    if case is not None and (case.workload.bytes_of_kv > _BYTES_OF_KV or contender.why_not(case.workload) is not None):
        return None
    if case is not None:
        return Job(contender.name, case.workload, case.training)
    return Job(contender.name, memory_workload(length), True) if length is not None else None


def at_a_time() -> int:
    """Returns how many processes find a core of the host and enough memory of the GPU."""
    free, _ = torch.cuda.mem_get_info()
    return max(1, min((os.cpu_count() or 2) - 1, free // _BYTES_A_PROCESS))


def compile_all(jobs: Collection[Job], processes: int) -> list[str]:
    """Runs each job once and returns the failures, which the suite will meet again and report."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # it keeps nothing otherwise
    spawn = multiprocessing.get_context("spawn")
    failures = []
    with ProcessPoolExecutor(processes, spawn, initializer=_one_thread) as pool:
        try:
            for job, failure in zip(jobs, pool.map(run, jobs), strict=True):
                if failure is not None:
                    failures.append(f"{job.contender} at {job.workload}: {failure}")
        except BrokenProcessPool as crash:
            failures.append(one_line(crash))
    return failures


def _one_thread() -> None:
    """Keeps Inductor from starting a compiler for each core in every process."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def run(job: Job) -> str | None:
    """Runs the job; returns what went wrong, or None."""
    workload = job.workload
    try:
        contender = named(job.contender, workload.device)
        if contender.why_not(workload) is not None:
            return None
        passes = contender.prepare(make_inputs(workload))
        with torch.set_grad_enabled(job.backward):
            out = passes.forward()
        if job.backward and "backward" in contender.measures:
            passes.backward(out)
        if workload.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as failure:  # of one contender
        return one_line(failure)
    return None
