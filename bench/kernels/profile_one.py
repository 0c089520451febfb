"""Runs one pass of one contender for a profiler or a sanitizer:

    profile="python -m bench.kernels.profile_one"
    ncu --profile-from-start off --set full $profile "attn_n triton:hopper n=1" backward --causal
    compute-sanitizer --tool racecheck $profile "attn_n triton:hopper n=1" backward --length 300

A first run, in which kernels are compiled, comes before the profiler is switched on. On a GPU the dtype is bfloat16.
"""

from __future__ import annotations

import argparse

import torch

from bench.contenders import contenders, named
from bench.method.prepared import Prepared
from bench.workloads import PASSES, Workload, make_inputs
from bench.workloads.suites import DEVICE


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=[each.name for each in contenders(DEVICE)], metavar="contender")
    parser.add_argument("measure", choices=PASSES)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--heads-kv", type=int)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--sequences", type=int, nargs="*", default=[], help="the lengths of packed ones")
    given = vars(parser.parse_args(arguments))
    contender, measure = named(given.pop("contender"), DEVICE), given.pop("measure")
    if sequences := tuple(given.pop("sequences")):
        given |= {"sequences": sequences, "length": sum(sequences), "batch": 1}
    workload = Workload(**given, device=DEVICE, dtype=torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    reason = contender.why_absent(workload, measure)
    if reason is not None:
        raise SystemExit(f"{contender.name}: {reason}")
    run = Prepared(contender, "measured", passes=contender.prepare(make_inputs(workload))).run(measure)
    run()
    _profiler("start")
    run()
    _profiler("stop")


def _profiler(switch: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        getattr(torch.cuda.profiler, switch)()


if __name__ == "__main__":
    main()
