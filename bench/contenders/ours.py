"""attn_n: the automatic choice, and each backend by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import attn_n
from attn_n.backends import registry
from attn_n.backends.base import Family
from attn_n.call import AttentionCall
from attn_n.dispatch import choose, serving
from bench.contenders.base import KINDS_OF_N, Attend, Contender, Passes, by_autograd, too_large_for_quadratic
from bench.contenders.flash_attn import MEASURES_3
from bench.workloads import FORWARD, PASSES, Inputs, Workload


def contenders(device: str) -> tuple[Contender, ...]:
    if device == "cpu":  # where the automatic choice is the only kernel
        return (*automatic(), _contender("reference", "1"))
    return (*automatic(), *(_contender(name, n) for name, kinds in _names() for n in kinds))


def automatic() -> tuple[Contender, ...]:
    return tuple(_contender(None, n) for n in KINDS_OF_N)


def of_call(device: str, n: str) -> tuple[Contender, ...]:
    """Returns those whose host time is measured: the automatic choice, and on a GPU what it usually chooses from."""
    names = (None, "triton:hopper", "triton:portable", "sdpa") if device == "cuda" else (None,)
    return tuple(_contender(name, n) for name in names)


def by_backend(device: str) -> Iterator[dict[str, Contender]]:
    """Yields the automatic choice and each backend by name, families by member, with a contender a kind of n."""
    names: list[str | None] = [None, "sdpa:cpu", "reference"]
    if device != "cpu":
        names = [None, "triton", *(name for name, _ in _names())]
    for name in names:
        yield {n: _contender(name, n) for n in KINDS_OF_N}


def _names() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields every backend that can be named, families by member, and the kinds of n to measure it with."""
    for name in attn_n.backends():
        backend, _ = registry.find(name)
        kinds = KINDS_OF_N if backend is not None and backend.applies_n else KINDS_OF_N[:2]
        if isinstance(backend, Family):
            yield from ((f"{name}:{member}", kinds) for member in backend.members if member != "cpu")
        else:
            yield name, kinds


def _contender(backend: str | None, n: str) -> Contender:
    measures = MEASURES_3 if backend == "flash_attn:3" else PASSES
    training = measures != FORWARD

    def prepare(inputs: Inputs) -> Passes:
        passes = by_autograd(_attend(backend, n), n)(inputs)
        return passes if training else passes._replace(forward=torch.no_grad()(passes.forward))

    def why_not(workload: Workload) -> str | None:
        reason = serving.why_not(backend, _call(workload, n, training)) if backend is not None else None
        return reason or (too_large_for_quadratic(workload) if backend == "reference" else None)

    return Contender(
        f"attn_n{'' if backend is None else ' ' + backend} n={n}",
        n,
        prepare,
        why_not,
        measures,
        backend=lambda workload, gradients: choose.choose(_call(workload, n, gradients and training), backend)[0],
        ours=True,
        apart=backend == "reference",
    )


def _attend(backend: str | None, n: str) -> Callable[[Inputs], Attend]:
    def of(inputs: Inputs) -> Attend:
        workload, starts, mask = inputs.workload, inputs.starts, inputs.mask
        window = None if workload.window is None else (workload.window, None)
        number = 1.0 if n == "1" else None

        def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            learned = sinks if n == "per head" else None
            return attn_n.flash_attention_n(
                q, k, v, workload.causal, None, number,
                sinks=learned, attn_mask=mask, window=window, backend=backend,
            )  # fmt: skip

        def attend_packed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            assert starts is not None
            longest, learned = max(workload.sequences), sinks if n == "per head" else None
            return attn_n.flash_attention_n_varlen(
                q, k, v, starts, starts, longest, longest, workload.causal, None, number,
                sinks=learned, window=window, backend=backend,
            )  # fmt: skip

        return attend if starts is None else attend_packed

    return of


def _call(workload: Workload, n: str, needs_grad: bool) -> AttentionCall:
    """Describes the call that the library will see, with contiguous tensors."""
    heads, heads_kv, width, width_v = workload.heads, workload.num_heads_kv, workload.width, workload.columns_of_v
    shapes: tuple[tuple[int, ...], ...] = tuple(
        (length, count, columns) if workload.sequences else (workload.batch, count, length, columns)
        for count, length, columns in (
            (heads, workload.length, width), (heads_kv, workload.len_k, width), (heads_kv, workload.len_k, width_v)
        )
    )  # fmt: skip
    of_q, of_k, of_v = (torch.empty(shape, device="meta").stride() for shape in shapes)
    cuda = workload.device == "cuda"
    return AttentionCall(
        device=workload.device,
        capability=torch.cuda.get_device_capability() if cuda else None,
        dtype=workload.dtype,
        q_shape=shapes[0],
        k_shape=shapes[1],
        v_shape=shapes[2],
        q_stride=of_q,
        k_stride=of_k,
        v_stride=of_v,
        window_left=workload.window,
        window_right=0 if workload.causal else None,
        mask_shape=None if workload.mask is None else (workload.length, workload.len_k),
        mask_dtype=None if workload.mask is None else getattr(torch, workload.mask),
        n_kind={"0": "none", "1": "float", "per head": "per head"}[n],
        sequences=len(workload.sequences) or None,
        needs_grad=needs_grad,
    )
