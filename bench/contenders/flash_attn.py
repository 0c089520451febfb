"""FlashAttention 2, 3 and 4."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_n.backends.flash_attn import version_3
from bench.contenders.base import Attend, Contender, by_autograd
from bench.contenders.library import why_absent
from bench.workloads import FORWARD, PASSES, Inputs, Workload


class Version(NamedTuple):
    """How the versions differ.

    Attributes:
        module: where `flash_attn_func` and `flash_attn_varlen_func` are.
        sink: their argument that takes the logits of the sinks.
        sink_dtype: what it must be; None is that of q.
        unbounded: the right end of a window that has none.
        splits: the arguments that let the library choose a split-KV kernel for few queries.
    """

    name: str
    module: str
    sink: str | None
    sink_dtype: torch.dtype | None
    unbounded: int | None
    splits: dict[str, int]


VERSION_2 = Version("flash-attn 2", "flash_attn.flash_attn_interface", None, None, -1, {})
# Sinks are an addition of some builds, tokenspeed-fa3 among them.
VERSION_3 = Version("flash-attn 3", "flash_attn_interface", "sinks", torch.bfloat16, -1, {"num_splits": 0})
# It has no split-KV on Hopper.
VERSION_4 = Version("flash-attn 4", "flash_attn.cute", "learnable_sink", None, None, {})


def _attend(version: Version) -> Callable[[Inputs], Attend]:
    def of(inputs: Inputs) -> Attend:
        library = importlib.import_module(version.module)
        workload, starts = inputs.workload, inputs.starts
        options = _options(version, workload)

        def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            return out_of(library.flash_attn_func(q, k, v, **options, **_sink(version, sinks)))

        def attend_packed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            longest = max(workload.sequences)
            lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
            return out_of(library.flash_attn_varlen_func(q, k, v, **lengths, **options, **_sink(version, sinks)))

        return attend if starts is None else attend_packed

    return of


def _options(version: Version, workload: Workload) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": workload.causal}
    if workload.window is not None:
        options["window_size"] = (workload.window, 0 if workload.causal else version.unbounded)
    if workload.length != workload.len_k:
        options |= version.splits
    return options


def _sink(version: Version, sinks: Tensor | None) -> dict[str, Tensor]:
    return {} if sinks is None else {str(version.sink): sinks.to(version.sink_dtype or sinks.dtype)}


def out_of(returned: Any) -> Tensor:
    """Returns the output, which FlashAttention 4 returns with the logsumexp."""
    out: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return out


def why_not(version: Version, n: str) -> Callable[[Workload], str | None]:
    def reason(workload: Workload) -> str | None:
        if workload.device != "cuda":
            return "no CPU kernel"
        if workload.dtype not in (torch.float16, torch.bfloat16):
            return "half precision only"
        if workload.width_v is not None and version is VERSION_2:
            return "E = Ev only"
        if workload.width > 256:
            return "heads up to 256"
        return why_absent(version.module) or (None if n == "0" else _why_no_sink(version))

    return reason


def _why_no_sink(version: Version) -> str | None:
    accepted = inspect.signature(importlib.import_module(version.module).flash_attn_func).parameters
    return None if version.sink in accepted else f"this build has no {version.sink}"


def _contender(version: Version, n: str, measures: tuple[str, ...] = PASSES) -> Contender:
    name = f"{version.name} n=0" if n == "0" else f"{version.name} sink n={n}"
    prepare = by_autograd(_attend(version), n, token_first=True)
    return Contender(name, n, prepare, why_not(version, n), measures)


# Version 3 is often built without a backward.
MEASURES_3 = FORWARD if version_3.left_out("BACKWARD") else PASSES

CONTENDERS = (
    _contender(VERSION_2, "0"),
    _contender(VERSION_3, "0", MEASURES_3),
    _contender(VERSION_3, "1", FORWARD),
    _contender(VERSION_4, "0"),
    _contender(VERSION_4, "1"),
    _contender(VERSION_4, "per head"),
)
