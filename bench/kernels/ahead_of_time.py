"""Compiles the Triton kernels for GPUs that are not there: registers, spills and shared memory.

`python -m bench.kernels.ahead_of_time sm_90` compiles every configuration that is shipped for that GPU and prints one
JSON line for each.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from attn_n.backends.triton import hopper
from attn_n.backends.triton.decode import prepare as decode
from attn_n.backends.triton.decode.configs import Gpu
from attn_n.backends.triton.hopper.configs import BACKWARD, FORWARD, TILE_V
from attn_n.backends.triton.kernel_key import describe, kernel_strides
from attn_n.backends.triton.portable import configs
from attn_n.backends.triton.portable.prepare import launch, launch_of_dmask, padded_rows
from attn_n.cache.fused import FusedAppend
from attn_n.call import CacheRequest, Options
from attn_n.sink import fused


class Target(NamedTuple):
    gpu: GPUTarget
    capability: tuple[int, int] | None
    shared: int  # bytes that one program may have


NO_N = (None, None)  # no gradient of n
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), (8, 0), 166912),
    "sm_89": Target(GPUTarget("cuda", 89, 32), (8, 9), 101376),
    "sm_90": Target(GPUTarget("cuda", 90, 32), (9, 0), 232448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), (10, 0), 232448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), None, 65536),
}


class Resources(NamedTuple):
    registers: int  # of a thread
    spills: int  # bytes of a thread (of a lane on AMD)
    shared: int  # bytes of a program
    warnings: tuple[str, ...]  # of ptxas, when it serialises wgmma


class _NoGpu:
    """Answers what Triton asks of a driver when it only compiles."""

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


def shipped(target: str) -> Iterator[tuple[str, int, Any, torch.dtype]]:
    """Yields kernel, width, configuration and dtype of all that is shipped for a GPU."""
    if target == "sm_90" and hopper.release() >= hopper.FIRST:
        for width, found in FORWARD.items():
            for config in found:
                yield "hopper forward", width, config, torch.bfloat16
        for width in BACKWARD:
            for kernel in ("preprocess", "main", "postprocess"):
                yield f"hopper backward {kernel}", width, None, torch.bfloat16
    for dtype in (torch.bfloat16, torch.float32):
        for kernel, widths in configs.table(TARGETS[target].capability, dtype).items():
            for width, rows in widths.items():
                for row in rows:
                    yield kernel, width, row, dtype


def compiled(
    target: str, kernel: str, width: int, config: Any, dtype: torch.dtype, options: Options,
    length: int = 256, log_n: float = 0.0, groups: int = 1, width_v: int | None = None,
) -> Any:  # fmt: skip
    """Compiles one of the kernels of `configs` for heads of `width`; without `config` it takes the tiles of the table.

    There are two KV heads, and `groups` query heads for each.
    """
    triton.runtime.driver.set_active(_NoGpu(TARGETS[target].gpu))

    def empty(heads: int, width: int) -> Tensor:
        shape = (1, heads, length, width) if options.cu_seqlens_q is None else (length, heads, width)
        return torch.empty(shape, dtype=dtype)

    if width_v is None:
        width_v = TILE_V[width] if kernel.startswith("hopper") else width
    q, k, v, out = empty(2 * groups, width), empty(2, width), empty(2, width_v), empty(2 * groups, width_v)
    tensors = (q, k, v, out, out, q, k, v)
    return launch_of(kernel, tensors, torch.empty(q.shape[:-1]), options, config, log_n, compile_only=True)()


def varlen(options: Options, same: bool = True) -> Options:
    """Returns the options for two varlen sequences of 128; with `same`, queries and keys share their boundaries."""
    starts = torch.tensor([0, 128, 256], dtype=torch.int32)
    return options.replaced(
        cu_seqlens_q=starts, cu_seqlens_k=starts if same else starts.clone(), max_seqlen_q=128, max_seqlen_k=128
    )


def padded(options: Options, *names: str) -> Options:
    """Returns the options for a padded batch; `seqused_q` and `seqused_k` are one tensor."""
    used = torch.tensor([200], dtype=torch.int32)
    return options.replaced(**{name: used for name in names or ("seqused_q", "seqused_k")})


def launch_of(
    kernel: str, tensors: Sequence[Tensor], lse: Tensor, options: Options, config: Any, log_n: float = 0.0,
    compile_only: bool = False,
) -> Callable[[], Any]:  # fmt: skip
    """Returns the call of one kernel; `tensors` are q, k, v, out, dout, dq, dk and dv, heads first or varlen."""
    q, k, v, out, dout, dq, dk, dv = tensors
    queries = options.cu_seqlens_q, options.seqused_q, None
    keys = options.cu_seqlens_k, options.seqused_k, options.leftpad_k
    gradients = [kernel_strides(x.stride()) for x in (dq, dk, dv)]
    if kernel == "hopper forward":
        from attn_n.backends.triton.hopper import prepare

        ready = prepare.forward(describe((q, k, v), log_n, options), kernel_strides(out.stride()), config)
        arguments = (q, k, v, out, lse, None, log_n, *queries[:2], *keys)
        if compile_only:
            table = q.new_empty(ready.table, dtype=torch.int32) if ready.table else None
            return functools.partial(ready.main.compiled, *arguments, table)
        # Each launch needs a new counter.
        return lambda: ready.main(*arguments, prepare.list_of_tiles(ready, q, queries, keys) if ready.table else None)
    if kernel.startswith("hopper backward"):
        from attn_n.backends.triton.hopper import prepare

        launches = prepare.backward(describe((q, k, v, out, dout), None, options), *gradients)
        stats, dq_sum = (q.new_empty(size, dtype=torch.float32) for size in (launches.stats, launches.dq_sum))
        table = None if launches.schedule is None else q.new_empty(launches.table, dtype=torch.int32)
        into = (dk, dv)
        if launches.postprocess_kv:
            into = tuple(q.new_empty(launches.dkv_sum, dtype=torch.float32) for _ in "kv")
        filled = (dq, dk, dv) if options.padded else (None, None, None)
        chosen, arguments = {
            "schedule": (launches.schedule, (table, *keys, *queries)),
            "preprocess": (launches.preprocess, (out, dout, lse, None, stats, dq_sum, None, None, *queries[:2])),
            "main": (launches.main, (q, k, v, dout, stats, dq_sum, *into, *filled, *queries[:2], *keys, table, *NO_N)),
            "postprocess": (launches.postprocess, (dq_sum, dq, *queries)),
        }[kernel.split()[-1]]
        return functools.partial(chosen.compiled if compile_only else chosen, *arguments)
    if (kernel == "dmask" or (config is not None and config.masked)) and options.mask is None:
        options = options.replaced(mask=torch.empty(1, 1, q.shape[2], k.shape[2], dtype=q.dtype))
    extras = options.mask, options.alibi_slopes, *(None,) * 6
    if kernel == "forward":
        key, arguments = describe((q, k, v), log_n, options), (q, k, v, out, lse, None, log_n, *extras)
        results = [kernel_strides(out.stride())]
    else:
        key, results = describe((q, k, v, out, dout), None, options), gradients
        lse_log2, delta, lost = q.new_zeros(3, key.heads, padded_rows(key), dtype=torch.float32)
        lost = lost if key.float_mask else None
        if kernel == "dq":
            arguments = (q, k, v, out, dout, lse, None, lse_log2, delta, lost, dq, None, None, None, *extras)
        elif kernel == "dmask":
            assert options.mask is not None
            arguments = (q, k, v, dout, lse_log2, delta, lost, torch.empty_like(options.mask), *extras)
            chosen = launch_of_dmask(key, options.mask.shape, config)
            return functools.partial(chosen.compiled if compile_only else chosen, *arguments)
        else:
            arguments = (q, k, v, dout, lse_log2, delta, lost, dk, dv, *extras)
    chosen = launch(kernel, key, results, config)
    return functools.partial(chosen.compiled if compile_only else chosen, *arguments)


def compiled_sinks(target: str) -> Iterator[tuple[str, int, Any]]:
    """Yields name, width and compiled kernel of the sink's rescaling and of the gradient of n."""
    triton.runtime.driver.set_active(_NoGpu(TARGETS[target].gpu))
    lse, sinks, shares = torch.empty(1, 2, 256), torch.empty(2), torch.empty(99)
    for width in (64, 96, 128, 256):
        out = torch.empty(1, 2, 256, width, dtype=torch.bfloat16)
        row, tile = lse.stride(), out.stride()
        rescale = fused.launch_for("scale", out.device, out.dtype, out.shape, (tile,), (row, row, None), 0)
        yield "rescaling", width, rescale.compiled(out, lse, lse, None, 1.0)
        gradient = fused.launch_for("gradient", out.device, out.dtype, out.shape, (tile, tile), (None, row, None), 1)
        yield "gradient of n", width, gradient.compiled(out, out, None, lse, sinks, shares)


def compiled_decoding(target: str) -> Iterator[tuple[str, int, Any]]:
    """Yields name, width and compiled kernel of decoding: contiguous, and paged by tiles within and across blocks.

    The merging kernel is compiled for n = 0, a number and sinks, and the other for what does without it, too.
    """
    triton.runtime.driver.set_active(_NoGpu(TARGETS[target].gpu))
    gpu = Gpu(132, TARGETS[target].shared > 120000, target.startswith("sm_") and int(target[3:]) >= 90)
    for width, queries, splits in ((128, 1, 2), (128, 1, 1), (128, 32, 2), (256, 1, 2)):
        q, out = (torch.empty(1, 8, queries, width, dtype=torch.bfloat16) for _ in range(2))
        parts, parts_lse = torch.empty(8, 2, width), torch.empty(8, 2)
        for name, block in (("contiguous", 0), ("paged", 16), ("paged, large blocks", 128)):
            cache = torch.empty(4, 2, block or 1024, width, dtype=torch.bfloat16)
            table = torch.empty(1, 8, dtype=torch.int32) if block else None
            options = Options(0.1, window_right=0, block_table=table, num_splits=splits)
            call = decode.DecodeCall(decode.key_of(q, cache, cache, None, options), q, gpu)
            rest = None, None, None, None, table, None, None, None
            yield f"decode, {name}", width, call.split.compiled(q, cache, cache, parts, parts_lse, None, *rest)
    for n in (None, 0.0, torch.empty(8)):
        call = decode.DecodeCall(decode.key_of(q, cache, cache, n, options), q, gpu)
        assert call.merge is not None
        of_n = (n, None) if isinstance(n, Tensor) else (None, n)
        yield "decode merge", width, call.merge.compiled(parts, parts_lse, out, parts_lse, *of_n)


def compiled_append(target: str) -> Iterator[tuple[str, int, Any]]:
    """Yields name, width and compiled kernel of appending to a cache: with rotary embedding, and to a float8 cache."""
    triton.runtime.driver.set_active(_NoGpu(TARGETS[target].gpu))
    table, lengths, angles = torch.empty(1, 8, dtype=torch.int32), torch.empty(1, dtype=torch.int32), torch.empty(64, 8)
    for width in (128, 256):
        q, k = (torch.empty(1, heads, 1, width, dtype=torch.bfloat16) for heads in (8, 2))
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            scaled = dtype != torch.bfloat16
            if scaled and target == "sm_80":  # torch appends there
                continue
            pages, factors = torch.empty(4, 2, 16, width, dtype=dtype), torch.empty(1, 2) if scaled else None
            rest = None, table, angles, angles, False, factors, factors, 0
            append = FusedAppend(q, pages, pages, CacheRequest(k, k, lengths, *rest), True)
            of_call = q, q, angles, angles, table, None, factors, factors
            yield f"append, {dtype}", width, append.launch.compiled(k, k, pages, pages, lengths, lengths, *of_call)


def resources(kernel: Any, target: str) -> Resources:
    shared = kernel.metadata.shared
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.findall(rf"{name}: *(\d+)", text)[0]) for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Resources(registers, spills, shared, ())
    from triton.backends.nvidia.compiler import get_ptxas

    # Since 3.5 Triton chooses ptxas by the architecture.
    arguments = [TARGETS[target].gpu.arch] if inspect.signature(get_ptxas).parameters else []
    ptxas = get_ptxas(*arguments).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        gpu = f"{target}a" if target in ("sm_90", "sm_100") else target
        said = subprocess.run(
            [ptxas, "-v", f"--gpu-name={gpu}", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    return Resources(
        int(re.findall(r"Used (\d+) registers", said)[0]),
        sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        shared,
        tuple(sorted(set(re.findall(r"C75\d\d", said)))),
    )


PARTS = ("hopper", "portable", "others")


def main(target: str, part: str | None = None) -> None:
    """Compiles all kernels for a GPU, or a part of them, and prints a line of JSON for each."""
    causal = Options(0.1, window_right=0)
    for kernel, width, config, dtype in shipped(target):
        if part not in (None, "hopper" if kernel.startswith("hopper") else "portable"):
            continue
        # Most kernels are the same for varlen sequences, but for the pointers to where these begin.
        for options in (causal, varlen(causal)) if kernel.startswith("hopper") else (causal,):
            found = resources(compiled(target, kernel, width, config, dtype, options), target)
            line = {
                "kernel": kernel, "width": width, "config": config, "dtype": str(dtype),
                "varlen": options is not causal, **found._asdict(),
            }  # fmt: skip
            print(json.dumps(line), flush=True)
    if part not in (None, "others"):
        return
    for kernel, width, binary in (*compiled_sinks(target), *compiled_decoding(target), *compiled_append(target)):
        found = resources(binary, target)
        print(json.dumps({"kernel": kernel, "width": width, "dtype": "torch.bfloat16", **found._asdict()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
