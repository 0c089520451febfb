"""The memory that one forward and backward takes beyond its inputs, at the peak.

Each point is a process of its own, `python -m bench.memory "attn_n n=1" 2048`: the peak of a process never falls.
The resident set also counts what a library allocates behind torch's back.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

from bench.contenders import CPU, Contender
from bench.problem import Problem, make_inputs


@functools.cache
def peak(contender: Contender, length: int) -> int:
    """Bytes at the peak of the contender, less those before it started."""
    command = [sys.executable, "-m", "bench.memory", contender.name, str(length)]
    root = Path(__file__).parents[1]
    return int(subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True).stdout)


def _peak_of_this_process(contender: Contender, problem: Problem) -> int:
    # The code of the kernels and the threads become resident at first use; they are no part of the problem's memory.
    _once(contender, Problem(length=64))
    return _once(contender, problem)


def _once(contender: Contender, problem: Problem) -> int:
    passes = contender.prepare(make_inputs(problem), contender.n)
    before = _resident_peak()
    passes.backward(passes.forward())
    return _resident_peak() - before


def _resident_peak() -> int:
    # Not getrusage, whose ru_maxrss a process inherits from the one that starts it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].removesuffix("kB")) * 1024


if __name__ == "__main__":
    name, length = sys.argv[1:]
    print(_peak_of_this_process({contender.name: contender for contender in CPU}[name], Problem(int(length))))
