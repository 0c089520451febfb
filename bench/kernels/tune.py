"""Tries tiles for the Triton kernels on the GPU that is there: python -m bench.kernels.tune OUT.json [--kernel dq] ...

It compiles in parallel, leaves out what spills or does not fit, times the rest with the tokens, heads and lengths of
the grid, prints the best of each workload and writes everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from attn_n.backends.triton.hopper import configs as hopper
from attn_n.backends.triton.portable import PortableKernels, configs
from attn_n.call import Options
from bench.kernels import ahead_of_time
from bench.kernels.ahead_of_time import launch_of

TOKENS, HIDDEN = 16384, 2048
TILES = list(itertools.product((32, 64, 128), (32, 64, 128)))
# In one step of a kernel's loop.
MATMULS = {"forward": 2, "dq": 3, "dk and dv": 4, "dk": 3, "dv": 2, "hopper forward": 2}


class Try(dict[str, Any]):
    """Holds kernel, width, causal, dtype and config; later registers, spills, ...; at last tflops by length."""

    @property
    def key(self) -> tuple[str, int, Any, torch.dtype]:
        kernel = self["kernel"]
        config = (hopper.Config if kernel.startswith("hopper") else configs.Config)(*self["config"])
        return kernel, self["width"], config, getattr(torch, self["dtype"])

    def options(self) -> Options:
        return Options(self["width"] ** -0.5, None, 0 if self["causal"] else None)


def main() -> None:
    args = _arguments()
    start = time.monotonic()
    tries = [
        Try(kernel=kernel, width=width, causal=causal, dtype=args.dtype, config=config)
        for kernel, width, causal in itertools.product(args.kernel, args.width, (False, True))
        for config in _candidates(kernel, width)
    ]
    print(f"{len(tries)} to compile", flush=True)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        tries = [one for one in pool.imap_unordered(_compile, tries) if one]
    print(f"{len(tries)} sound after {time.monotonic() - start:.0f} s", flush=True)
    inputs = {(length, width): _inputs(length, width, args.dtype) for length in args.length for width in args.width}
    for one in tries:
        if time.monotonic() - start > args.seconds:
            print("out of time")
            break
        one["tflops"] = {length: _tflops(one, length, inputs[length, one["width"]]) for length in args.length}
    with open(args.out, "w") as file:
        json.dump(tries, file)
    for kernel, width, causal, length in itertools.product(args.kernel, args.width, (False, True), args.length):
        found = [
            (one["tflops"][length], one["config"])
            for one in tries
            if (one["kernel"], one["width"], one["causal"]) == (kernel, width, causal) and "tflops" in one
        ]
        best = [f"{speed:.0f} {config}" for speed, config in sorted(found, reverse=True)[:5]]
        print(kernel, width, "causal" if causal else "full", length, *best, sep="  ")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--kernel", nargs="+", default=list(MATMULS), choices=MATMULS)
    parser.add_argument("--width", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--length", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=500.0, help="after which no further one is timed")
    return parser.parse_args()


def _candidates(kernel: str, width: int) -> Iterator[tuple[Any, ...]]:
    if kernel == "hopper forward":
        places = ((False, False), (False, True), (True, True))  # of q_in_registers and out_apart
        softmax = ((False, False), (True, False), (True, True))  # of lazy and weights_first
        for *one, place, kind in itertools.product((1, 2, 3), (64, 128), (2, 3, 4), places, softmax):
            at_once = (2, 3) if one[0] == 1 else (1,)  # programs of an SM
            for programs, counted in itertools.product(at_once, (False, True)):
                yield hopper.Tiles(*one, *place, *kind, programs), counted
        return
    for tile, warps, stages, descriptors in itertools.product(TILES, (4, 8), (1, 2, 3, 4), (False, True)):
        if _plausible(kernel, width, tile, warps):
            yield *tile, warps, stages, descriptors


def _plausible(kernel: str, width: int, tile: tuple[int, int], warps: int) -> bool:
    apart = kernel in ("dk", "dv")
    if apart != (width > 128) and kernel.startswith(("dk", "dv")):
        return False
    rows = tile[1] if kernel.startswith(("dk", "dv")) else tile[0]
    return rows >= 64 and tile[0] * tile[1] >= (2048 if warps == 4 else 4096)


def _compile(one: Try) -> Try | None:
    kernel, width, config, dtype = one.key
    try:
        binary = ahead_of_time.compiled("sm_90", kernel, width, config, dtype, one.options())
        found = ahead_of_time.resources(binary, "sm_90")
    except Exception as error:  # the compiler's own failures are many, and a reason to leave a configuration out
        print(kernel, width, config, type(error).__name__, str(error)[:100])
        return None
    one.update(found._asdict())
    sound = found.spills <= 100 and found.shared <= ahead_of_time.TARGETS["sm_90"].shared and not found.warnings
    return one if sound else None


def _inputs(length: int, width: int, dtype: str) -> tuple[torch.Tensor, ...]:
    """Returns q, k, v, out, dout, dq, dk, dv, and lse."""
    shape = (TOKENS // length, HIDDEN // width, length, width)
    q, k, v, dout = (torch.randn(shape, dtype=getattr(torch, dtype), device="cuda") for _ in range(4))
    out, lse, _ = PortableKernels().forward(q, k, v, None, Options(width**-0.5))
    return q, k, v, out, dout, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), lse


def _tflops(one: Try, length: int, inputs: tuple[torch.Tensor, ...], rounds: int = 4) -> float:
    kernel, _, config, _ = one.key
    *tensors, lse = inputs
    launch = launch_of(kernel, tensors, lse, one.options(), config)
    cold, times = torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()
        torch.cuda._sleep(1_000_000)  # so that the host is ahead
        start.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
        time.sleep(0.01)
    flops = 2 * MATMULS[kernel] * TOKENS * length * HIDDEN / (2 if one["causal"] else 1)
    return flops / statistics.median(times) / 1e12


if __name__ == "__main__":
    main()
