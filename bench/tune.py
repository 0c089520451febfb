"""Tries tiles for the Triton kernels: python -m bench.tune compile|time OUT.json [--kernel forward] [--width 128] ...

`compile` needs no GPU: it writes registers, spills and shared memory of each configuration, compiled for `--target`.
`time` runs on a GPU those that a file of `compile` calls sound (`--sound FILE`), best first, and keeps what it has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from attn_n.backends import triton as backend
from attn_n.backends.triton import configs
from attn_n.call import Options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CHOICES = {
    "forward": ([(64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)], [4, 8], [2, 3, 4]),
    "dq": ([(64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)], [4, 8], [2, 3]),
    "kv": ([(32, 64), (64, 64), (32, 128), (64, 128), (128, 64)], [4, 8], [1, 2, 3]),
    "k": ([(32, 128), (64, 64), (32, 64)], [4, 8], [1, 2, 3]),
    "v": ([(32, 128), (64, 128), (64, 64), (128, 64)], [4, 8], [1, 2, 3]),
}


class NoDriver:
    """Triton's driver for a machine without the GPU it compiles for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def point(kernel: str, width: int, causal: bool, descriptors: bool, config: tuple[int, ...]) -> dict:
    return dict(kernel=kernel, width=width, causal=causal, descriptors=descriptors, config=list(config))


def points(args: argparse.Namespace) -> list[dict]:
    found = []
    for kernel in args.kernel:
        tiles, warps, stages = CHOICES[kernel]
        for width, causal, descriptors in itertools.product(args.width, args.causal, args.descriptors):
            for (tile_q, tile_k), w, s in itertools.product(tiles, warps, stages):
                if tile_q * tile_k <= 4096 and w == 8 and width < 256 or (width == 256) == (kernel == 'kv') and kernel in ('kv', 'k', 'v'):
                    continue
                found.append(point(kernel, width, causal, descriptors, (tile_q, tile_k, w, s)))
    return found


class Chosen:
    """The backend with one configuration and one kernel."""

    def __init__(self, p: dict) -> None:
        config = configs.Config(*p["config"])
        configs.forward = configs.dq = lambda *_: config
        configs.dkdv = lambda *_: {p["kernel"]: config}
        backend.fits_descriptor = lambda x: p["descriptors"]
        self.kernel = p["kernel"]

    def __enter__(self):
        self.kept = backend.dq_kernel, backend.dkdv_kernel
        if self.kernel == "dq":
            backend.dkdv_kernel = Nothing()
        if self.kernel in ("k", "v", "kv"):
            backend.dq_kernel = Nothing()
        return self

    def __exit__(self, *_):
        backend.dq_kernel, backend.dkdv_kernel = self.kept


class Nothing:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def compiled(p: dict, target: str, report: bool = True) -> dict:
    triton.runtime.driver.set_active(NoDriver(TARGETS[target]))
    found = []
    run = JITFunction.run

    def warm(self, *args, grid, warmup, **kwargs):
        found.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    q, k, v = (torch.empty(1, 2, 256, p["width"], dtype=torch.bfloat16) for _ in range(3))
    options = Options(0.1, None, 0 if p["causal"] else None)
    JITFunction.run = warm
    start = time.time()
    try:
        with Chosen(p):
            if p["kernel"] == "forward":
                backend.BACKEND.forward(q, k, v, 0.0, options)
            else:
                lse = torch.empty(q.shape[:-1])
                backend.BACKEND.backward(q, None, q, k, v, q, lse, None, options)
    except Exception as error:
        return {**p, "error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        JITFunction.run = run
    return {**p, "seconds": round(time.time() - start, 1), **(resources(found[0], target) if report else {})}


def resources(kernel, target: str) -> dict:
    found = {"shared": kernel.metadata.shared}
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        found["registers"] = int(re.findall(r"vgpr_count: *(\d+)", text)[0])
        found["spills"] = int(re.findall(r"vgpr_spill_count: *(\d+)", text)[0])
        return found
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas = folder / ("ptxas-blackwell" if target == "sm_100" and (folder / "ptxas-blackwell").exists() else "ptxas")
    architecture = target + ("" if target == "sm_80" else "a")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        run = subprocess.run(
            [str(ptxas), "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"], capture_output=True, text=True
        )
    found["registers"] = int(re.findall(r"Used (\d+) registers", run.stderr)[0])
    found["spills"] = sum(map(int, re.findall(r"(\d+) bytes spill", run.stderr)))
    found["warnings"] = sorted(set(re.findall(r"C75\d\d", run.stderr)))
    return found


def bench(p: dict, length: int, tensors: dict, flush: torch.Tensor, rounds: int) -> float:
    q, k, v, dout, out, lse = tensors[length, p["width"]]
    options = Options(q.shape[-1] ** -0.5, None, 0 if p["causal"] else None)
    with Chosen(p):
        def call():
            if p["kernel"] == "forward":
                backend.BACKEND.forward(q, k, v, 0.0, options)
            else:
                backend.BACKEND.backward(dout, None, q, k, v, out, lse, None, options)
        call()
        torch.cuda.synchronize()
        times = []
        for _ in range(rounds):
            flush.zero_()
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(1_000_000)  # so that the host is ahead
            a.record()
            call()
            b.record()
            torch.cuda.synchronize()
            times.append(a.elapsed_time(b) * 1e-3)
            time.sleep(0.01)
    return statistics.median(times)


FLOPS = {"forward": 2, "dq": 3, "kv": 4, "k": 3, "v": 2}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("compile", "time"))
    parser.add_argument("out")
    parser.add_argument("--kernel", nargs="+", default=list(CHOICES))
    parser.add_argument("--width", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--causal", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--descriptors", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--length", nargs="+", type=int, default=[512, 8192])
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--sound")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=1e9)
    args = parser.parse_args()
    begun = time.time()
    todo = points(args)
    if args.sound:
        sound = {json.dumps([p[x] for x in ("kernel", "width", "descriptors", "config")]): p for p in json.load(open(args.sound))}
        def good(p):
            s = sound.get(json.dumps([p[x] for x in ("kernel", "width", "descriptors", "config")]))
            return s and "error" not in s and s["spills"] <= 100 and s["shared"] <= 232448 and not s["warnings"]
        todo = [p for p in todo if good(p)]
    print(len(todo), "configurations", flush=True)
    done = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for i, p in enumerate(pool.imap_unordered(Compile(args.target, args.what == "compile"), todo)):
            done.append(p)
            if args.what == "compile" and i % 10 == 0:
                print(i, p, flush=True)
                json.dump(done, open(args.out, "w"))
    json.dump(done, open(args.out, "w"))
    print("compiled", round(time.time() - begun), "s", flush=True)
    if args.what == "compile":
        return
    tensors = {}
    for length, width in itertools.product(args.length, args.width):
        shape = (16384 // length, 2048 // width, length, width)
        q, k, v, dout = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4))
        with Chosen(point("forward", width, False, False, (64, 32, 4, 2))):
            tensors[length, width] = q, k, v, dout, *backend.BACKEND.forward(q, k, v, 0.0, Options(width**-0.5))[:2]
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    torch.zeros(1, device="cuda")
    for p in done:
        if time.time() - begun > args.seconds:
            print("out of time")
            break
        if "error" in p:
            continue
        for length in args.length:
            try:
                seconds = bench(p, length, tensors, flush, args.rounds)
            except Exception as error:
                p["error"] = str(error)[:200]
                break
            flops = FLOPS[p["kernel"]] * 2 * 16384 * length * 2048 / (2 if p["causal"] else 1)
            p[f"tflops_{length}"] = round(flops / seconds / 1e12, 1)
    json.dump(done, open(args.out, "w"))
    groups = {}
    for p in done:
        for length in args.length:
            if f"tflops_{length}" in p:
                groups.setdefault((p["kernel"], p["width"], p["causal"], length), []).append((p[f"tflops_{length}"], p["descriptors"], p["config"]))
    for key in sorted(groups):
        print(key, *[f"{t:.0f}:{'D' if d else 'p'}{','.join(map(str, c))}" for t, d, c in sorted(groups[key], reverse=True)[:7]])
    print([p["error"] for p in done if "error" in p][:3])
    print("all", round(time.time() - begun), "s")


class Compile:
    def __init__(self, target, report):
        self.target, self.report = target, report

    def __call__(self, p):
        return compiled(p, self.target, self.report)


if __name__ == "__main__":
    main()
