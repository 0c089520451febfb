"""FlashInfer, whose plan is made once for all layers of a step and is not timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.contenders.base import Contender, sinks_of
from bench.contenders.cached.base import Decode, decoder, token_first
from bench.contenders.library import why_absent
from bench.workloads import Inputs, Workload

_BLOCK = 128  # it takes batches of contiguous caches as blocks in their order
_WORKSPACE = 256 << 20  # bytes, for the parts of split keys


def _decode(n: str, tensor_cores: bool) -> Decode:
    def of(inputs: Inputs) -> Callable[[], Tensor]:
        library, workload = importlib.import_module("flashinfer"), inputs.workload
        block = workload.block or _BLOCK
        pools = tuple(token_first(x).reshape(-1, block, *x.shape[1::2]) for x in (inputs.k, inputs.v))
        workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=workload.device)
        wrapper: Any
        arguments: tuple[Any, ...] = ()
        if n == "0":
            wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=tensor_cores)
        else:
            wrapper = library.BatchDecodeWithAttentionSinkWrapper(
                workspace, backend="fa2", q_data_type=workload.dtype, kv_data_type=workload.dtype,
                head_dim_qk=workload.width, head_dim_vo=workload.columns_of_v,
            )  # fmt: skip
            arguments = (sinks_of(workload, n).detach().float(), workload.width**-0.5)
        _plan(wrapper, inputs, block)
        q = token_first(inputs.q).reshape(-1, workload.heads, workload.width)
        shape = workload.batch, workload.length, workload.heads, workload.columns_of_v
        return lambda: wrapper.run(q, pools, *arguments).view(shape).transpose(1, 2)

    return of


def _plan(wrapper: Any, inputs: Inputs, block: int) -> None:
    workload = inputs.workload
    blocks = workload.len_k // block
    table = torch.arange(workload.batch * blocks, dtype=torch.int32) if inputs.table is None else inputs.table.flatten()
    wrapper.plan(
        torch.arange(workload.batch + 1, dtype=torch.int32) * blocks,
        table.to(workload.device),
        torch.full((workload.batch,), block, dtype=torch.int32),
        workload.heads, workload.num_heads_kv, workload.width, block,
        q_data_type=workload.dtype, q_len_per_req=workload.length,
    )  # fmt: skip


def _why_not(tensor_cores: bool) -> Callable[[Workload], str | None]:
    def why_not(workload: Workload) -> str | None:
        if workload.device != "cuda":
            return "no CPU kernel"
        if workload.length > 1 and not tensor_cores:
            return "several queries on tensor cores alone"
        if workload.heads // workload.num_heads_kv > 16 and not tensor_cores:
            return "up to 16 query heads to a KV head on CUDA cores"
        return why_absent("flashinfer")

    return why_not


def _contender(name: str, n: str, tensor_cores: bool) -> Contender:
    return decoder(f"{name} n={n}", n, _decode(n, tensor_cores), _why_not(tensor_cores))


CONTENDERS = (
    _contender("flashinfer", "0", False),
    _contender("flashinfer tensor cores", "0", True),
    _contender("flashinfer sink", "1", True),
)
