"""How the operators run on DTensors: which placements of the inputs give which ones of the results.

Attention is sharded by its batches or by its heads; each of them is computed alone, so that nothing is exchanged. What
a shard adds to the gradient of a tensor that others have too (n, a mask for all batches, one KV head) is a partial sum.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch

from attn_n.call.errors import UnsupportedError
from attn_n.compilation import constant_when_compiled

# The dimensions of batches and of heads.
_BATCHES = dict.fromkeys(
    ("q", "k", "v", "out", "lse", "dout", "dlse", "n", "mask", "alibi_slopes", "seqused_q", "seqused_k", "leftpad_k"), 0
)
_HEADS = dict.fromkeys(
    ("q", "k", "v", "out", "lse", "dout", "dlse", "n", "mask", "alibi_slopes", "k_descale", "v_descale"), 1
)
_SIZES_OF_Q = ("q", "out", "lse", "dout", "dlse", "alibi_slopes")
# The inputs whose placements the results have, and the arguments that ask for these.
_FORWARD = {"out": ("q", None), "lse": ("q", None), "rng_state": None}
_BACKWARD = {
    "dq": ("q", None), "dk": ("k", None), "dv": ("v", None), "dn": ("n", "needs_n_grad"),
    "dmask": ("mask", "needs_mask_grad"), "dslopes": ("alibi_slopes", "needs_slopes_grad"),
}  # fmt: skip


@constant_when_compiled  # runs it once, while it traces
def register() -> None:
    """Register the placements if DTensor has been imported; importing it here would take a second."""
    if "torch.distributed.tensor" in sys.modules:
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    forward, backward = torch.ops.attn_n.forward.default, torch.ops.attn_n.backward.default
    register_sharding(forward)(functools.partial(_acceptable, _names(forward), _FORWARD))
    register_sharding(backward)(functools.partial(_acceptable, _names(backward), _BACKWARD))
    register_sharding(torch.ops.attn_n.forward_with_dropout.default)(_no_dropout)


def _names(operator: Any) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


def _no_dropout(*arguments: object) -> Any:
    raise UnsupportedError(
        "dropout_p: the weights that are dropped would depend on how DTensors are sharded.\nTo do: pass 0."
    )


def _acceptable(
    names: list[str], results: Mapping[str, tuple[str, str | None] | None], *arguments: Any
) -> list[tuple[list[Any], list[Any]]]:
    """Return what `register_sharding` wants: placements in one dimension of a mesh, of the results and the inputs."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    named = dict(zip(names, arguments, strict=True))
    tensors = {name: x for name, x in named.items() if hasattr(x, "placements")}
    found = []
    for dims in _shardings(tensors):
        dim_of = {name: _dim(name, x, dims) for name, x in tensors.items()}
        sharded = {name: Replicate() if dim is None else Shard(dim) for name, dim in dim_of.items()}
        outputs: list[Any] = []
        for source in results.values():
            name, asked_by = source or (None, None)
            if not dims or name not in tensors or not (asked_by is None or named[asked_by]):
                outputs.append(Replicate())
            else:
                outputs.append(Partial() if dim_of[name] is None else sharded[name])
        found.append((outputs, [sharded.get(name) for name in names]))
    return found


def _shardings(tensors: Mapping[str, Any]) -> list[dict[str, int]]:
    """Return in which dimensions a call may be sharded: first in none."""
    found: list[dict[str, int]] = [{}]
    if not tensors.keys() & {"cu_seqlens_q", "block_table", "cache_batch_idx"}:
        found.append(_BATCHES)
    heads_kv = tensors["k"].shape[1]
    if heads_kv == 1 or heads_kv % _shards_of_heads(tensors) == 0:  # else the groups of query heads would be torn
        found.append(_HEADS)
    return found


def _shards_of_heads(tensors: Mapping[str, Any]) -> int:
    """Return into how many shards q, k or v are divided by their heads."""
    return math.prod(
        ranks
        for place, ranks in enumerate(tensors["q"].mesh.shape)
        if any(tensors[name].placements[place].is_shard(1) for name in ("q", "k", "v"))
    )


def _dim(name: str, x: Any, dims: Mapping[str, int]) -> int | None:
    """Return the dimension in which an input is sharded; None if each rank has it whole."""
    if name not in dims or (name == "n" and x.ndim < 2):
        return 0 if name == "n" and x.ndim == 1 and dims is _HEADS else None
    dim = dims[name]
    return None if x.shape[dim] == 1 and name not in _SIZES_OF_Q else dim
