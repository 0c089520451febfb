"""Compiles what the suite runs, many kernels at a time: python -m bench.warm [WORD...]

Triton, FlexAttention and, with FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1, FlashAttention 4 keep on disk what they have
compiled, so that a run of the suite behind this one spends its time on measuring. With words only the problems and
contenders whose names have all of them, as in `grid E128 hopper`; with --quick only those of `pytest bench --quick`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from bench.contenders import contenders
from bench.contenders.library import one_line
from bench.problem import FORWARD, make_inputs
from bench.suites import DEVICE, Case, cases


class Job(NamedTuple):
    """The names of a case and of a contender, which another process can look up."""

    case: str
    contender: str


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="all of which a problem and contender must have")
    parser.add_argument("--quick", action="store_true", help="only what `pytest bench --quick` measures")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    args = parser.parse_args(arguments)
    start = time.monotonic()
    jobs = [job for job in _jobs(args.quick) if all(word in f"{job}" for word in args.words)]
    if not jobs:
        parser.error(f"no problem and contender has all of the words {' '.join(args.words)!r}: name fewer")
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, failure in zip(jobs, pool.map(_run, jobs), strict=True):
            if failure is not None:
                print(f"{job.case}, {job.contender}: {failure}", flush=True)
    print(f"{len(jobs)} in {time.monotonic() - start:.0f} s")


def _jobs(quick: bool = False) -> list[Job]:
    """Every contender at every problem, but for those that compile nothing and take long."""
    return [
        Job(str(case), contender.name)
        for case in _cases(quick).values()
        for contender in contenders(DEVICE, quick)
        if not contender.apart and contender.why_not(case.problem) is None
    ]


def _cases(quick: bool = False) -> dict[str, Case]:
    """One for each problem: a job runs both passes."""
    found: dict[object, Case] = {}
    for case in cases(quick):
        found.setdefault((case.suite.name, case.problem), case)
    return {str(case): case for case in found.values()}


def _run(job: Job) -> str | None:
    """What went wrong."""
    case = _cases()[job.case]
    contender = next(each for each in contenders(DEVICE) if each.name == job.contender)
    try:
        passes = contender.prepare(make_inputs(case.problem))
        out = passes.forward()
        if case.suite.measures != FORWARD and "backward" in contender.measures:
            passes.backward(out)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as failure:  # of one contender; the suite reports it too
        return one_line(failure)
    return None


if __name__ == "__main__":
    main()
