"""A workload: one shape of attention, and its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")  # what is timed
FORWARD = PASSES[:1]


@dataclass(frozen=True)
class Workload:
    """Attention of one shape.

    Attributes:
        length: L, the number of queries.
        width: E.
        width_v: Ev; None is E.
        keys: S; None is L.
        heads_kv: None is `heads`.
        window: how many keys before its own a query sees; None is all.
        sequences: the lengths of packed sequences, whose sum is `length`; then batch is 1 and L = S.
        mask: the dtype of a mask `(L, S)` in memory, "bool"; None is no mask.
        block: the keys of a block where they lie in a paged KV cache; 0 is a contiguous cache, None is no cache.
    """

    length: int
    causal: bool = False
    batch: int = 1
    heads: int = 8
    width: int = 64
    width_v: int | None = None
    keys: int | None = None
    heads_kv: int | None = None
    window: int | None = None
    sequences: tuple[int, ...] = ()
    mask: str | None = None
    block: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        parts = [f"E{self.width}", f"L{self.length}"]
        if self.width_v is not None:
            parts.insert(1, f"Ev{self.width_v}")
        if self.keys is not None:
            parts.append(f"S{self.keys}")
        if self.heads_kv is not None:
            parts.append(f"H{self.heads}:{self.heads_kv}")
        if self.sequences:
            parts.append(f"{len(self.sequences)}seqs-max{max(self.sequences)}")
        if self.window is not None:
            parts.append(f"window{self.window}")
        if self.mask is not None:
            parts.append(f"{self.mask}-mask")
        if self.block is not None:
            parts.append(f"paged{self.block}" if self.block else "contiguous")
        parts.append("causal" if self.causal else "full")
        return "-".join(parts)

    @property
    def len_k(self) -> int:
        return self.length if self.keys is None else self.keys

    @property
    def num_heads_kv(self) -> int:
        return self.heads if self.heads_kv is None else self.heads_kv

    @property
    def columns_of_v(self) -> int:
        return self.width if self.width_v is None else self.width_v

    @property
    def bytes_of_kv(self) -> int:
        columns = self.width + self.columns_of_v
        return self.batch * self.num_heads_kv * self.len_k * columns * self.dtype.itemsize

    def flops(self, measure: str) -> float:
        """Counts the operations of "forward", "backward" or "both", as FlashAttention does.

        For each visible pair of query and key the forward has a matmul of 2 E and one of 2 Ev operations (S and O), the
        backward three and two (S, dQ, dK and dP, dV).
        """
        forward, backward = self.width + self.columns_of_v, 3 * self.width + 2 * self.columns_of_v
        operations = {"forward": forward, "backward": backward, "both": forward + backward}[measure]
        lengths = [(length, length) for length in self.sequences] or [(self.length, self.len_k)]
        return 2.0 * operations * self.heads * self.batch * sum(self._pairs(*each) for each in lengths)

    def _pairs(self, len_q: int, len_k: int) -> float:
        if not self.causal:
            return len_q * len_k
        shape = torch.arange(len_q, dtype=torch.float64) + (len_k - len_q + 1)
        reach = math.inf if self.window is None else self.window + 1
        return float(shape.clamp(0, reach).sum())

    def fields(self) -> dict[str, Any]:
        """Returns all but the device, as results files hold it."""
        named = {name: value for name, value in vars(self).items() if name != "device" and value not in (None, ())}
        return {**named, "dtype": str(self.dtype).removeprefix("torch.")}


class Inputs(NamedTuple):
    """The tensors of a workload: q `(B, H, L, E)`, k and v `(B, Hkv, S, E or Ev)`, or packed `(T, H, E)`; dout as out.

    q, k and v require gradients. `starts` is cu_seqlens of packed sequences.

    In a cache `(B, S, Hkv, E)` lies in memory, of which k and v are views; in a paged one `(blocks, block, Hkv, E)`, of
    which they are views `(blocks, Hkv, block, E)`, and `table` `(B, S / block)` has the blocks of each sequence, in
    random order. `used` `(B,)` is S for each. Nothing requires gradients.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    starts: Tensor | None
    workload: Workload
    mask: Tensor | None = None
    table: Tensor | None = None
    used: Tensor | None = None


def make_inputs(workload: Workload) -> Inputs:
    """Draws normal tensors, the same for each call with the same workload.

    The means of q and k differ by so much that the logits lie around -log(S): all keys together weigh about as much
    as n = 1, and a contender that drops n is far off at any length and in any dtype.
    """
    generator = torch.Generator(workload.device).manual_seed(0)
    if workload.block is not None:
        return _with_cache(workload, generator)

    def normal(heads: int, length: int, width: int) -> Tensor:
        shape = (length, heads) if workload.sequences else (workload.batch, heads, length)
        return torch.randn(*shape, width, generator=generator, dtype=workload.dtype, device=workload.device)

    widths = workload.width, workload.columns_of_v
    q, dout = (normal(workload.heads, workload.length, width) for width in widths)
    k, v = (normal(workload.num_heads_kv, workload.len_k, width) for width in widths)
    _move_apart(q, k, max(workload.sequences or (workload.len_k,)))
    starts = None
    if workload.sequences:
        starts = torch.tensor([0, *workload.sequences], device=workload.device).cumsum(0).to(torch.int32)
    mask = None
    if workload.mask is not None:
        mask = torch.ones(workload.length, workload.len_k, dtype=torch.bool, device=workload.device)
        mask[:, ::8] = False
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, starts, workload, mask)


def _with_cache(workload: Workload, generator: torch.Generator) -> Inputs:
    batch, keys, block = workload.batch, workload.len_k, workload.block
    options: dict[str, Any] = {"device": workload.device, "generator": generator}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, **options, dtype=workload.dtype).transpose(1, 2)

    q = normal(batch, workload.length, workload.heads, workload.width)
    rows = (batch * keys // block, block) if block else (batch, keys)
    k, v = (normal(*rows, workload.num_heads_kv, width) for width in (workload.width, workload.columns_of_v))
    _move_apart(q, k, keys)
    table = torch.randperm(rows[0], **options).int().view(batch, -1) if block else None
    used = torch.full((batch,), keys, dtype=torch.int32, device=workload.device)
    return Inputs(q, k, v, torch.empty_like(q), None, workload, table=table, used=used)


def _move_apart(q: Tensor, k: Tensor, keys: int) -> None:
    """Moves the means of q and k, in place: a copy would raise the peak that bench.method.memory starts from."""
    mean = math.sqrt(math.log(keys) / math.sqrt(q.shape[-1]))
    q.add_(mean)
    k.sub_(mean)
