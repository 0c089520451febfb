"""FlashAttention 2, 3 and 4 over a KV cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.contenders import flash_attn
from bench.contenders.base import Contender, sinks_of
from bench.contenders.cached.base import Decode, decoder, token_first
from bench.contenders.flash_attn import Version
from bench.workloads import Inputs, Workload

# The names of the block table; FlashAttention 4 has no function for a cache, but reads one as varlen keys.
_TABLES = {"flash-attn 2": "block_table", "flash-attn 3": "page_table", "flash-attn 4": "page_table"}


def _decode(version: Version, n: str) -> Decode:
    def of(inputs: Inputs) -> Callable[[], Tensor]:
        library = importlib.import_module(version.module)
        q, k, v = map(token_first, (inputs.q, inputs.k, inputs.v))
        options: dict[str, Any] = {"causal": inputs.workload.causal, _TABLES[version.name]: inputs.table}
        if n != "0":
            sinks = sinks_of(inputs.workload, n).detach()
            options[str(version.sink)] = sinks.to(version.sink_dtype or sinks.dtype)
        if version is flash_attn.VERSION_4:
            function, options["seqused_k"] = library.flash_attn_varlen_func, inputs.used
            options["max_seqlen_k"] = inputs.workload.len_k
        else:
            function, options["cache_seqlens"] = library.flash_attn_with_kvcache, inputs.used
        return lambda: flash_attn.out_of(function(q, k, v, **options)).transpose(1, 2)

    return of


def _why_not(version: Version, n: str) -> Callable[[Workload], str | None]:
    def why_not(workload: Workload) -> str | None:
        if version is flash_attn.VERSION_2 and workload.block and workload.block % 256:
            return "blocks of a multiple of 256 keys"
        return flash_attn.why_not(version, n)(workload)

    return why_not


def _contender(version: Version, n: str) -> Contender:
    name = f"{version.name} n=0" if n == "0" else f"{version.name} sink n={n}"
    return decoder(name, n, _decode(version, n), _why_not(version, n))


CONTENDERS = (
    _contender(flash_attn.VERSION_2, "0"),
    *(_contender(version, n) for version in (flash_attn.VERSION_3, flash_attn.VERSION_4) for n in ("0", "1")),
)
