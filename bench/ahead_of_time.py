"""Compiles the Triton kernels for GPUs that are not there, and says what they take: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from attn_n.backends import triton as backend
from attn_n.backends.triton import configs
from attn_n.call import Options


class Target(NamedTuple):
    gpu: GPUTarget
    capability: tuple[int, int] | None
    shared: int  # bytes that one program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), (8, 0), 166912),
    "sm_90": Target(GPUTarget("cuda", 90, 32), (9, 0), 232448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), (10, 0), 232448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), None, 65536),
}


class Resources(NamedTuple):
    registers: int  # of a thread
    spills: int  # bytes of a thread (of a lane on AMD)
    shared: int  # bytes of a program
    warnings: tuple[str, ...]  # of ptxas, when it runs matrix products one by one


class _NoGpu:
    """What Triton asks of a driver when it only compiles."""

    def __init__(self, gpu: GPUTarget) -> None:
        self._gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self._gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(
    target: str, kernel: str, width: int, config: configs.Config, dtype: torch.dtype, options: Options, n: float = 1.0
) -> Any:
    """The kernel of that name in `configs`, compiled for a head of `width`."""
    triton.runtime.driver.set_active(_NoGpu(TARGETS[target].gpu))
    found = []

    def warm_up(jit: Any, programs: int, config: configs.Config, constants: dict[str, Any], *arguments: Any) -> None:
        if config is not None:
            found.append(jit.warmup(*arguments, grid=(programs,), **constants, **config.keywords()))

    q, k, v = (torch.empty(1, 2, 256, width, dtype=dtype) for _ in range(3))
    with mock.patch.object(backend, "launch", warm_up), only(kernel, config):
        run(kernel, q, k, v, q, q, torch.empty(q.shape[:-1]), options, n)
    (one,) = found
    return one


@contextmanager
def only(kernel: str, config: configs.Config) -> Iterator[None]:
    """The backend with `config` for that kernel, and without the others."""
    problem, kinds = backend.Problem, (kernel,) if kernel.startswith("dk") or kernel == "dv" else ()
    with (
        mock.patch.object(problem, "config", lambda self, name, *tensors: config if name == kernel else None),
        mock.patch.object(problem, "kernels_of_keys", lambda self: kinds),
        mock.patch.object(problem, "programs_of_queries", _unless_left_out(problem.programs_of_queries)),
    ):
        yield


def _unless_left_out(programs: Any) -> Any:
    return lambda self, config: 0 if config is None else programs(self, config)


def run(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, options: Options, n: float
) -> None:
    """The pass that the kernel belongs to."""
    if kernel == "forward":
        backend.BACKEND.forward(q, k, v, n, options)
    else:
        backend.BACKEND.backward(dout, None, q, k, v, out, lse, None, options)


def resources(kernel: Any, target: str) -> Resources:
    shared = kernel.metadata.shared
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.findall(rf"{name}: *(\d+)", text)[0]) for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Resources(registers, spills, shared, ())
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = folder / "ptxas-blackwell"
    if target != "sm_100" or not ptxas.exists():
        ptxas = folder / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        gpu = target if target == "sm_80" else f"{target}a"
        said = subprocess.run(
            [str(ptxas), "-v", f"--gpu-name={gpu}", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    return Resources(
        int(re.findall(r"Used (\d+) registers", said)[0]),
        sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        shared,
        tuple(sorted(set(re.findall(r"C75\d\d", said)))),
    )
