"""attn_n: over the cache, by the automatic choice and by the decoding kernels, and as a plain call with few queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import attn_n
from attn_n.call import AttentionCall, CacheRequest, Request, canonical
from attn_n.dispatch import choose, serving
from bench.contenders import ours
from bench.contenders.base import KINDS_OF_N, Contender, sinks_of
from bench.contenders.cached.base import decoder, over_contiguous
from bench.workloads import Inputs, Workload

DECODE = "triton:decode"


def contenders(device: str) -> tuple[Contender, ...]:
    backends = (None,) if device == "cpu" else (None, DECODE)
    cached = tuple(_contender(backend, n) for backend in backends for n in KINDS_OF_N)
    return (*cached, *(over_contiguous(each) for each in ours.automatic()))


def _contender(backend: str | None, n: str) -> Contender:
    def served_by(workload: Workload, gradients: bool) -> str | None:
        return _served_by(workload, n, backend)

    name = "attn_n kvcache" if backend is None else f"attn_n kvcache {backend}"
    contender = decoder(f"{name} n={n}", n, _decode(backend, n), _why_not(backend, n))
    return dataclasses.replace(contender, ours=True, backend=served_by)


def _decode(backend: str | None, n: str) -> Callable[[Inputs], Callable[[], Tensor]]:
    def of(inputs: Inputs) -> Callable[[], Tensor]:
        q, k, v, causal = inputs.q, inputs.k, inputs.v, inputs.workload.causal
        number = 1.0 if n == "1" else None
        sinks = sinks_of(inputs.workload, n).detach() if n == "per head" else None

        def decode() -> Tensor:
            return attn_n.flash_attention_n_with_kvcache(
                q, k, v, cache_seqlens=inputs.used, block_table=inputs.table, causal=causal, sm_n=number, sinks=sinks,
                backend=backend,
            )  # fmt: skip

        return decode

    return of


def _why_not(backend: str | None, n: str) -> Callable[[Workload], str | None]:
    return lambda workload: None if backend is None else serving.why_not(backend, _call(workload, n))


def _served_by(workload: Workload, n: str, backend: str | None) -> str:
    chosen = choose.chosen(_call(workload, n), backend)
    if chosen is None:  # none reads the cache in place
        chosen = choose.choose(_call(dataclasses.replace(workload, block=0), n), backend)
    return chosen[0]


def _call(workload: Workload, n: str) -> AttentionCall:
    """Describes the call that the library will see, from tensors without memory."""
    batch, heads_kv, width, block = workload.batch, workload.num_heads_kv, workload.width, workload.block

    def empty(*shape: int, dtype: torch.dtype = workload.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = empty(batch, workload.length, workload.heads, width).transpose(1, 2)
    blocks = workload.len_k // block if block else 0
    rows = (batch * blocks, block) if block else (batch, workload.len_k)
    k = empty(*rows, heads_kv, width).transpose(1, 2)
    v = empty(*rows, heads_kv, workload.columns_of_v).transpose(1, 2)
    request = Request(
        workload.causal, None, 1.0 if n == "1" else None, empty(workload.heads) if n == "per head" else None, None,
        None, None, None, 0.0, False, None, seqused_k=empty(batch, dtype=torch.int32),
    )  # fmt: skip
    if block:
        table = empty(batch, blocks, dtype=torch.int32)
        cache = CacheRequest(None, None, request.seqused_k, None, table, None, None, True, None, None, 0)
        call = canonical.cached(q, k, v, request, cache).call
    else:
        call = canonical.batch(q, k, v, request).call
    cuda = workload.device == "cuda"
    return dataclasses.replace(
        call, device=workload.device, capability=torch.cuda.get_device_capability() if cuda else None
    )
