"""Describes the machine and the commit that a benchmark ran on."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.contenders import installed


def machine(device: str) -> dict[str, Any]:
    """Returns the fields of `Run.machine`; on a GPU they include its measured ceilings."""
    common = {
        "kind": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": installed(),
    }
    if device == "cpu":
        return {"device": f"{_processor()}, {torch.get_num_threads()} threads", **common}
    return {
        "device": torch.cuda.get_device_name(),
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda,
        **common,
        "ceilings": _ceilings(),
    }


def commit() -> str:
    """Returns the commit of this checkout, with a + if there are changes, or ATTN_N_COMMIT where git is missing."""
    if "ATTN_N_COMMIT" in os.environ:
        return os.environ["ATTN_N_COMMIT"]
    # --always without tags is the abbreviated commit.
    return _said_by("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _ceilings() -> dict[str, float]:
    """Measures a large matmul (FLOP/s) and a large copy (bytes read and written a second)."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {
        "matmul_flops": 2 * 8192**3 / _median_seconds(lambda: a @ b),
        "copy_bytes": 2 * source.nbytes / _median_seconds(lambda: target.copy_(source)),
    }


def _median_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[2:])


def _said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
