"""The tile sizes of the portable kernels in one table, with the GPU that each part was measured on.

Nothing is tuned while a program runs. `python -m bench.kernels.tune` finds new rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from attn_n.backends.triton.kernel_key import KernelKey


class Config(NamedTuple):
    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # load tiles by tensor descriptors (TMA, on sm_90 and later) and not by pointers
    at_least: int = 0  # the row is for loops over at least so many queries or keys
    masked: bool = False  # the row is for calls with a mask alone, which takes registers and shared memory


Rows = tuple[Config, ...]  # the longest loops first; the last row is for any length and loads by pointers

# By kernel, then by width: the larger of E and Ev, rounded up to a power of two, at least 64.
Table = dict[str, dict[int, Rows]]

# Measured on an H200, bfloat16, 2026-11-22, PyTorch 2.11, Triton 3.6: the best at S = 512, 2048, 8192, causal or not.
# Rows for masks and "dmask" at 64: on an H100, 2026-11-28, biases of (1, 16, 4096, 4096) and (4, 1, 4096, 4096).
# Not measured: these for longer heads, and heads of 512.
SM_90: Table = {
    "forward": {
        64: (
            Config(64, 64, 4, 3, True, 1500, True),
            Config(64, 128, 4, 2, True, 1500),
            Config(128, 64, 8, 3, False, 400),
            Config(64, 64, 4, 3),
        ),
        128: (
            Config(64, 64, 4, 2, True, 400, True),
            Config(128, 64, 4, 2, True, 400),
            Config(64, 64, 4, 2, masked=True),
            Config(64, 64, 4, 3),
        ),
        256: (Config(64, 32, 4, 2, masked=True), Config(128, 64, 8, 2)),
        512: (Config(64, 32, 8, 2),),
    },
    "dq": {
        64: (Config(128, 64, 4, 3, True, 700, True), Config(128, 64, 8, 3, True, 700), Config(64, 32, 4, 3)),
        128: (Config(128, 64, 8, 3, True, 700), Config(64, 32, 4, 2, masked=True), Config(128, 32, 4, 3)),
        256: (
            Config(128, 32, 8, 2, True, 700, True),
            Config(128, 32, 8, 3, True, 700),
            Config(64, 32, 4, 2, masked=True),
            Config(128, 32, 8, 3),
        ),
        512: (Config(32, 32, 8, 1),),
    },
    "dk and dv": {
        64: (Config(64, 64, 4, 3, True, 1500, True), Config(32, 64, 4, 3, True, 1500), Config(32, 64, 4, 3)),
        128: (
            Config(32, 64, 4, 2, True, 700, True),
            Config(64, 64, 4, 2, True, 700),
            Config(32, 64, 4, 2, masked=True),
            Config(64, 64, 4, 2),
        ),
    },
    "dk": {
        256: (
            Config(32, 64, 4, 2, True, 700, True),
            Config(32, 128, 8, 3, True, 700),
            Config(32, 64, 4, 2, masked=True),
            Config(32, 128, 8, 3),
        ),
        512: (Config(32, 32, 8, 1),),
    },
    "dv": {
        256: (
            Config(32, 64, 8, 2, True, 700, True),
            Config(64, 64, 4, 3, True, 700),
            Config(32, 64, 8, 2, masked=True),
            Config(64, 128, 8, 2),
        ),
        512: (Config(32, 32, 8, 1),),
    },
    "dmask": {
        64: (Config(64, 128, 4, 2, True), Config(128, 64, 8, 1)),
        128: (Config(32, 64, 4, 1),),
        256: (Config(32, 64, 8, 1),),
        512: (Config(16, 32, 4, 1),),
    },
}

# Not measured: these fit the 163 KB of shared memory of an A100 and spill no registers on sm_80 and sm_100.
LARGE: Table = {
    "forward": {
        64: (Config(128, 64, 8, 3),),
        128: (Config(128, 64, 8, 2, masked=True), Config(128, 64, 8, 3)),
        256: (Config(64, 32, 4, 2),),
        512: (Config(64, 32, 8, 2),),
    },
    "dq": {
        64: (Config(64, 32, 4, 2, masked=True), Config(64, 64, 4, 2)),
        128: (Config(64, 32, 4, 2, masked=True), Config(64, 64, 4, 2)),
        256: (Config(64, 32, 8, 2),),
        512: (Config(32, 32, 8, 1),),
    },
    "dk and dv": {
        64: (Config(32, 64, 4, 2),),
        128: (Config(32, 32, 4, 2, masked=True), Config(32, 64, 4, 2)),
    },
    "dk": {256: (Config(32, 64, 8, 2),), 512: (Config(32, 32, 8, 1),)},
    "dv": {256: (Config(32, 64, 8, 2),), 512: (Config(32, 32, 8, 1),)},
    "dmask": {
        64: (Config(128, 64, 8, 1),),
        128: (Config(32, 64, 4, 1),),
        256: (Config(32, 64, 8, 1),),
        512: (Config(16, 32, 4, 1),),
    },
}

# Not measured: these fit 64 KB of shared memory (ROCm; consumer GPUs have 99 KB).
SMALL: Table = {
    "forward": {
        64: (Config(64, 32, 4, 2),),
        128: (Config(64, 32, 4, 1),),
        256: (Config(32, 32, 4, 1),),
        512: (Config(16, 32, 4, 1),),
    },
    "dq": {
        64: (Config(64, 32, 4, 1),),
        128: (Config(32, 32, 4, 1),),
        256: (Config(16, 32, 4, 1),),
        512: (Config(16, 16, 4, 1),),
    },
    "dk and dv": {64: (Config(32, 64, 4, 1),), 128: (Config(32, 32, 4, 1),)},
    "dk": {256: (Config(16, 32, 4, 1),), 512: (Config(16, 16, 4, 1),)},
    "dv": {256: (Config(16, 32, 4, 1),), 512: (Config(16, 32, 4, 1),)},
    "dmask": {
        64: (Config(64, 32, 4, 1),),
        128: (Config(32, 32, 4, 1),),
        256: (Config(16, 32, 4, 1),),
        512: (Config(16, 32, 4, 1),),
    },
}

# float32: exact matmuls run on CUDA cores, from registers, and not on tensor cores. Measured as above at S = 1024. The
# four tiles of a backward with heads of 512 would take 128 KB of shared memory.
FLOAT32: Table = {
    "forward": {
        64: (Config(64, 32, 4, 1),),
        128: (Config(32, 64, 4, 1),),
        256: (Config(32, 32, 4, 1),),
    },
    "dq": {
        64: (Config(32, 32, 8, 1),),
        128: (Config(16, 16, 8, 1),),
        256: (Config(16, 16, 8, 1),),
    },
    "dk and dv": {64: (Config(32, 64, 4, 1),), 128: (Config(16, 16, 4, 1),)},
    "dk": {256: (Config(16, 32, 8, 1),)},
    "dv": {256: (Config(16, 32, 8, 1),)},
    "dmask": {
        64: (Config(32, 32, 8, 1),),
        128: (Config(16, 16, 8, 1),),
        256: (Config(16, 16, 8, 1),),
    },
}

_LARGE = ((8, 0), (8, 7), (10, 0), (10, 3))


def find(kernel: str, key: KernelKey) -> Config:
    """Return the tiles of a kernel on the GPU of the key."""
    capability = _capability(key.device)
    descriptors = capability is not None and capability >= (9, 0) and key.fits_descriptors
    of_keys = kernel in ("dk", "dv", "dk and dv")
    length = key.queries_on_average if of_keys else key.keys_on_average
    rows = table(capability, key.dtype)[kernel][max(64, widest(key))]
    masked = key.strides_mask is not None
    return next(
        row for row in rows
        if length >= row.at_least and (descriptors or not row.descriptors) and (masked or not row.masked)
    )  # fmt: skip


@functools.cache  # PyTorch takes 5 us to ask for it
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability; None for ROCm and for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


def table(capability: tuple[int, int] | None, dtype: torch.dtype) -> Table:
    """Return the table of a GPU; `capability` is None for ROCm and for the interpreter."""
    if dtype == torch.float32:
        return FLOAT32
    return SM_90 if capability == (9, 0) else LARGE if capability in _LARGE else SMALL


def kernels_of_keys(key: KernelKey) -> tuple[str, ...]:
    """Return the kernels that compute dK and dV: one kernel, or two for heads of which registers hold only one."""
    return ("dk and dv",) if widest(key) <= 128 else ("dk", "dv")


def widest(key: KernelKey) -> int:
    """Return the width by which the table has its rows."""
    return max(tiles_of_widths(key))


def tiles_of_widths(key: KernelKey) -> tuple[int, int]:
    """Return the columns of the tiles of q and k, and those of v."""
    of_e, of_ev = [max(16, 1 << (width - 1).bit_length()) for width in (key.width, key.width_v)]
    # Where v's tile is narrower than q's and than 64 columns, ptxas (12.8, sm_90) miscompiles the forward; without
    # optimisation it is right. tests/test_triton.py has such widths.
    return of_e, max(of_ev, min(of_e, 64))
