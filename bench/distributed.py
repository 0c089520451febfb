"""Times attention over several GPUs: torchrun --nproc-per-node 2 -m bench.distributed OUT.json, on one host.

One causal sequence, 32 query heads, 8 KV heads, E = 128, bfloat16, forward and backward. Of each length every GPU first
attends to the whole by itself, all at the same time: the rate of one GPU alone, against which efficiency counts. Then
the contenders attend to it together, in turns. A pass begins when all ranks are ready, and lasts as long as on the
slowest one. TFLOP/s are of one GPU, by FlashAttention's count of operations under a causal mask.

`--trace FOLDER` profiles one forward and backward of each contender at the last length: a Chrome trace of each rank,
and in the results, by rank, the milliseconds of kernels that compute, of those that communicate, and of both at once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_n import flash_attention_n
from attn_n.distributed import ring_attention_n, shard, ulysses_attention_n
from bench.contenders.library import one_line
from bench.method.machine import commit, machine

HEADS, HEADS_KV, SIZE = 32, 8, 128
LENGTHS = tuple(1 << power for power in range(14, 20))  # 16k to 512k tokens
MOST_SECONDS = 4.0  # of the rounds of one contender at one length
ALONE = "attn_n, one GPU"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Contender(NamedTuple):
    """Attention of the tokens of a rank.

    Attributes:
        n: the n that it computes with.
        attend: of q `(1, Hq, L_r, E)` and k, v `(1, Hkv, L_r, E)`.
        within: entered around all of its passes.
        in_chunks: a rank has the tokens that `shard` gives it; otherwise the r-th part of the sequence.
    """

    name: str
    n: float
    attend: Attend
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    in_chunks: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--only", help="contenders whose name has this in it")
    parser.add_argument("--trace", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", timeout=timedelta(minutes=2))
    mesh = init_device_mesh("cuda", (int(os.environ["WORLD_SIZE"]),))
    chosen = [each for each in contenders(mesh) if args.only is None or args.only in each.name]
    lines = []
    for length in args.lengths:
        for line in measure(length, chosen, mesh, args.trace if length == args.lengths[-1] else None):
            lines.append(line)
            if rank == 0:
                print(json.dumps(line), flush=True)
    if rank == 0:
        command = "torchrun -m bench.distributed " + " ".join(sys.argv[1:])
        found = {"machine": machine("cuda"), "commit": commit(), "command": command, "lines": lines}
        args.out.write_text(json.dumps(found, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def contenders(mesh: DeviceMesh) -> tuple[Contender, ...]:
    """Returns ours with n = 1, and without n as the peers are; those peers are PyTorch's ring and a plain Ulysses."""
    ours = tuple(
        Contender(f"attn_n {how} n={n:g}", n, _ours(function, n))
        for how, function in (("ring", ring_attention_n), ("ulysses", ulysses_attention_n))
        for n in (1.0, 0.0)
    )
    rings = tuple(
        Contender(
            f"torch context_parallel {method}, {kernel.name}", 0.0, _sdpa, _context_parallel(mesh, method, kernel)
        )
        for method in ("alltoall", "allgather")
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    )
    return (
        *ours, *rings,
        Contender("all-to-all, cuDNN", 0.0, _all_to_all(_cudnn), in_chunks=False),
        Contender("all-to-all, FlashAttention 4", 0.0, _all_to_all(_flash_attention_4), in_chunks=False),
    )  # fmt: skip


def measure(length: int, chosen: list[Contender], mesh: DeviceMesh, trace: Path | None) -> Iterator[dict[str, Any]]:
    ranks, rank = mesh.size(), mesh.get_local_rank()
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (HEADS, HEADS_KV, HEADS_KV, HEADS)
    whole = [
        torch.randn(1, heads, length, SIZE, dtype=torch.bfloat16, device="cuda", generator=generator)
        for heads in shapes
    ]  # fmt: skip
    alone = Contender(ALONE, 1.0, lambda q, k, v: _out(flash_attention_n(q, k, v, True, sm_n=1.0)))
    expected = {n: _out(flash_attention_n(*whole[:3], True, sm_n=n)) for n in (0.0, 1.0)}
    parts = {
        True: [shard(x).contiguous() for x in whole],
        False: [x.chunk(ranks, 2)[rank].contiguous() for x in whole],
    }
    mine = {n: {True: shard(x), False: x.chunk(ranks, 2)[rank].clone()} for n, x in expected.items()}
    del expected
    timed: list[Contender] = []
    for each in chosen:
        reason = _why_not(each, parts[each.in_chunks], mine[each.n][each.in_chunks])
        if reason is None:
            timed.append(each)
        else:
            yield {"tokens": length, "ranks": ranks, "contender": each.name, "not timed": reason}
    del mine
    seconds = _rounds({ALONE: (alone, whole)} | {each.name: (each, parts[each.in_chunks]) for each in timed})
    taken = {
        name: {of: statistics.median(map(max, rounds)) for of, rounds in by_pass.items()}
        for name, by_pass in seconds.items()
    }
    for each, tensors in ((alone, whole), *((each, parts[each.in_chunks]) for each in timed)):
        sharers = 1 if each is alone else ranks
        line: dict[str, Any] = {"tokens": length, "ranks": ranks, "contender": each.name, "n": each.n}
        for of, lasted in taken[each.name].items():
            line[f"{of}, ms"] = round(lasted * 1e3, 3)
            line[f"{of}, TFLOP/s a GPU"] = round(flops(length, of) / sharers / lasted / 1e12, 1)
            line[f"{of}, efficiency"] = round(taken[ALONE][of] / sharers / lasted, 3)
        line["peak with its inputs, MB, by rank"] = [round(x / 1e6, 1) for x in _gathered(_peak(each, tensors))]
        if trace is not None and each is not alone:
            line |= _traced(each, tensors, trace)
        yield line


def flops(length: int, of: str) -> float:
    """Counts the operations of a pass, as FlashAttention does: half of the logits are visible."""
    matmuls = {"forward": 2, "backward": 5, "both": 7}[of]
    return matmuls * 2 * HEADS * SIZE * length * (length + 1) / 2


def _why_not(each: Contender, tensors: list[Tensor], expected: Tensor) -> str | None:
    """Returns the reason why a contender is not timed, the same on all ranks: it cannot run, or it is wrong."""
    reason = ""
    try:
        with each.within():
            forward, backward = _passes(each, tensors)
            out = forward()
            backward(out)
            torch.cuda.synchronize()
        worst = (out - expected).abs().max().item()
        if not worst < 0.05:
            reason = f"wrong: out is off by {worst:.2g}"
    except Exception as error:
        reason = one_line(error)
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, reason)
    return next(filter(None, said), None)


def _passes(each: Contender, tensors: list[Tensor]) -> tuple[Callable[[], Tensor], Callable[[Tensor], object]]:
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    return lambda: each.attend(q, k, v), lambda out: torch.autograd.grad(out, (q, k, v), tensors[3])


def _rounds(entries: dict[str, tuple[Contender, list[Tensor]]]) -> dict[str, dict[str, list[list[float]]]]:
    """Returns, of each contender and pass, the seconds of each round by rank. Contenders take turns, in any order."""
    found: dict[str, dict[str, list[list[float]]]] = {
        name: {"forward": [], "backward": [], "both": []} for name in entries
    }
    shuffle, names = random.Random(0).shuffle, list(entries)
    rounds = 3
    for turn in range(1000):
        shuffle(names)
        for name in names:
            forward, backward = _once(*entries[name])
            by_pass = {"forward": forward, "backward": backward, "both": forward + backward}
            for of, took in by_pass.items():
                found[name][of].append(_gathered(took))
        if turn == 0:  # the first one is a warm-up
            slowest = max(max(by_pass["both"][0]) for by_pass in found.values())
            rounds = max(3, min(20, int(MOST_SECONDS / slowest)))
        if turn == rounds:
            break
    return {name: {of: taken[1:] for of, taken in by_pass.items()} for name, by_pass in found.items()}


def _once(each: Contender, tensors: list[Tensor]) -> tuple[float, float]:
    """Returns the seconds of this rank's GPU in a forward and in a backward."""
    forward, backward = _passes(each, tensors)
    with each.within():
        out, of_forward = _timed(forward)
        _, of_backward = _timed(lambda: backward(out))
    return of_forward, of_backward


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize()
    start.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    return result, start.elapsed_time(end) / 1e3


def _gathered(value: float) -> list[float]:
    """Returns the values of all ranks."""
    mine = torch.tensor([value], dtype=torch.float64, device="cuda")
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [x.item() for x in found]


def _peak(each: Contender, tensors: list[Tensor]) -> int:
    """Returns the most bytes that a forward and a backward need at once, their inputs among them."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _once(each, tensors)
    return torch.cuda.max_memory_allocated() - before + sum(x.nbytes for x in tensors)


def _traced(each: Contender, tensors: list[Tensor], folder: Path) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    folder.mkdir(parents=True, exist_ok=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _once(each, tensors)
    name = "".join(c if c.isalnum() else "-" for c in each.name)
    path = folder / f"{name}-rank{dist.get_rank()}.json"
    profiler.export_chrome_trace(str(path))
    kernels = [x for x in json.loads(path.read_text())["traceEvents"] if x.get("cat") == "kernel"]
    spans = {
        "communicates": _union([(x["ts"], x["ts"] + x["dur"]) for x in kernels if "nccl" in x["name"].lower()]),
        "computes": _union([(x["ts"], x["ts"] + x["dur"]) for x in kernels if "nccl" not in x["name"].lower()]),
    }
    total = {of: sum(stop - start for start, stop in there) for of, there in spans.items()}
    either = sum(stop - start for start, stop in _union([*spans["communicates"], *spans["computes"]]))
    total["both at once"] = total["communicates"] + total["computes"] - either
    return {f"{of}, ms, by rank": [round(x, 3) for x in _gathered(us / 1e3)] for of, us in total.items()}


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


def _out(found: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def _ours(function: Callable[..., Any], n: float) -> Attend:
    return lambda q, k, v: _out(function(q, k, v, True, sm_n=n))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = HEADS // HEADS_KV  # PyTorch's ring takes as many KV heads as query heads
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _context_parallel(
    mesh: DeviceMesh, method: str, kernel: SDPBackend
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """PyTorch's ring; its balance under a causal mask orders tokens as `shard` does."""

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        experimental = importlib.import_module("torch.distributed.tensor.experimental")
        importlib.import_module("torch.distributed.tensor.experimental._attention").set_rotate_method(method)
        tokens = torch.zeros(2 * mesh.size(), device="cuda")
        plain = F.scaled_dot_product_attention
        try:
            with experimental.context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[0]), sdpa_kernel(kernel):
                yield
        finally:
            F.scaled_dot_product_attention = plain  # PyTorch 2.11 leaves its own there after an error

    return within


class _Exchange(torch.autograd.Function):
    """All heads of some tokens `(H, L / R, E)` for all tokens of some heads `(H / R, L, E)`, or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_heads: bool) -> Tensor:
        ctx.to_heads, ranks = to_heads, dist.get_world_size()
        heads, tokens, size = x.shape
        if not to_heads:
            x = x.view(heads, ranks, tokens // ranks, size).transpose(0, 1).contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x)
        if not to_heads:
            return received.view(heads * ranks, tokens // ranks, size)
        return received.view(ranks, heads // ranks, tokens, size).transpose(0, 1).reshape(heads // ranks, -1, size)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return _Exchange.apply(dx.contiguous(), not ctx.to_heads), None  # type: ignore[no-untyped-call]


def _all_to_all(attend: Attend) -> Attend:
    def exchanged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_Exchange.apply(x[0], True)[None] for x in (q, k, v))  # type: ignore[no-untyped-call]
        out: Tensor = _Exchange.apply(attend(q, k, v)[0].contiguous(), False)  # type: ignore[no-untyped-call]
        return out[None]

    return exchanged


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    library = importlib.import_module("flash_attn.cute")
    found = library.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out.transpose(1, 2)


if __name__ == "__main__":
    main()
