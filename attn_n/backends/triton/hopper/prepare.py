"""From a problem to the launches of the Hopper kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.backends.triton.hopper import configs
from attn_n.backends.triton.hopper.backward import backward_kernel
from attn_n.backends.triton.hopper.backward_passes import postprocess_kernel, preprocess_kernel
from attn_n.backends.triton.hopper.backward_wide import wide_kernel
from attn_n.backends.triton.hopper.configs import BackwardSpec, Config, ForwardSpec
from attn_n.backends.triton.hopper.forward import STRIP, forward_kernel
from attn_n.backends.triton.hopper.schedule import BLOCK, HEADER, schedule_kernel
from attn_n.backends.triton.kernel_key import KernelKey, Strides
from attn_n.launcher import Launch


class Forward(NamedTuple):
    """The launches of a forward, in their order."""

    order: Launch | None  # of packed sequences
    main: Launch
    table: int  # numbers of the table that they share, see `packed`; of batches 1, the counter, or 0


def forward(problem: KernelKey, out: Strides, config: Config | None = None) -> Forward:
    """The launches of the forward; `config` in place of that of the table."""
    p, config = problem, config or configs.find(problem)
    left, right = p.window
    tile_q = config.tiles.consumers * STRIP.value
    of_head = _cdiv(p.len_q, tile_q)
    tiles = most_tiles(p, p.rows, tile_q) if p.varlen else p.batch * of_head
    items = p.heads * tiles
    most = _processors(p.device) * (2 if config.tiles.consumers == 1 else 1)
    together = None
    if config.counted and right is not None and not p.varlen:
        # Heads whose keys and values take 32 MB, and enough of them for three rounds of all programs.
        together = max((1 << 23) // (p.len_k * p.width) * (p.heads // p.heads_kv), _cdiv(3 * most, of_head))
        together = _cdiv(p.batch * p.heads, max(1, p.batch * p.heads // together))
    elif p.causal and not p.varlen:
        items = p.heads * p.batch * _cdiv(of_head, 2)  # an item is a pair of tiles
    numbers = (
        *p.strides, out, p.stride_n, None if p.varlen else p.batch, p.heads, p.len_q, p.len_k, left, right, p.scale,
        p.softcap, items, together,
    )  # fmt: skip
    one_edge = left is None and (
        right is None or (p.more_keys is not None and (p.more_keys + right + 1) % STRIP.value <= 1)
    )
    constants = {"SPEC": ForwardSpec(config.tiles, p.width, p.heads // p.heads_kv, one_edge)}
    # The registers of the SM, shared among the consumers, the producer and the warps that round them up to 4.
    options = {"num_warps": 4, "maxnreg": {1: 128, 2: 168, 3: 128}[config.tiles.consumers]}
    programs = min(items, most)
    return Forward(
        _order(p, tile_q) if p.varlen else None,
        Launch(forward_kernel, programs, p.device, numbers, constants, options, descriptors=True),
        HEADER.value + 2 * tiles if p.varlen else int(together is not None),
    )


def most_tiles(problem: KernelKey, rows: int, tile: int) -> int:
    """As many tiles may the rows of packed sequences have, none of which spans two of them."""
    return rows // tile + problem.batch


def list_of_tiles(
    launches: Forward | Backward, like: Tensor, starts: Tensor | None, others: Tensor | None
) -> Tensor | None:
    """The table of `packed`, for the sequences whose tiles are taken and those that they meet; of batches its counter.

    None where programs take tiles in turn.
    """
    if not launches.table:
        return None
    if launches.order is None:
        return torch.zeros(launches.table, dtype=torch.int32, device=like.device)
    table = torch.empty(launches.table, dtype=torch.int32, device=like.device)
    launches.order(table, starts, others)
    return table


def _order(problem: KernelKey, tile: int) -> Launch:
    programs = _cdiv(problem.batch, BLOCK.value)
    return Launch(schedule_kernel, programs, problem.device, (problem.batch,), {"TILE": tile}, {"num_warps": 4}, False)


class Backward(NamedTuple):
    """The launches of a backward, in their order."""

    order: Launch | None  # of packed sequences
    prepare: Launch
    main: Launch
    round: Launch
    round_kv: tuple[Launch, ...]  # dK and dV, where programs add to them; none where one program writes them
    table: int  # elements of what they share, see `packed` and `passes`
    stats: int
    dq_sum: int
    dkv_sum: int  # of each of the two


def backward(problem: KernelKey, dq: Strides, dk: Strides, dv: Strides) -> Backward:
    """The launches of the backward; the strides are those of the gradients."""
    p, (tile_q, tile_k) = problem, configs.BACKWARD[problem.width]
    q, k, v, out, dout = p.strides
    kernel = backward_kernel if p.width <= 128 else wide_kernel
    processors = _processors(p.device)
    groups = configs.heads_of_item(p, processors)
    shares = p.heads // p.heads_kv // groups
    constants = {"SPEC": BackwardSpec(p.width, tile_q, groups, shares), "E": p.width, "TILE_Q": tile_q}
    left, right = p.window
    if p.varlen:  # as one of a batch, with whole tiles for each sequence; how many keys one has only the GPU knows
        batch, tiles_q, tiles_k = 1, most_tiles(p, p.rows, tile_q), most_tiles(p, p.keys, tile_k)
        sequences, len_q, len_k, together = p.batch, tiles_q * tile_q, 0, None
    else:
        batch, tiles_q, tiles_k = p.batch, _cdiv(p.len_q, tile_q), _cdiv(p.len_k, tile_k)
        sequences, len_q, len_k, together = None, p.len_q, p.len_k, 1
        if p.causal:
            # As many as all programs take at once, so that a light tile is followed by a heavy one of the next heads
            # (+1 to 4 %, and 4 to 13 % with four query heads a key head; of more heads a cache holds too little).
            together = max(2, min(16, processors // tiles_k))
    tiles, key_tiles, sum_rows = batch * p.heads * tiles_q, batch * p.heads_kv * tiles_k, tiles_k * tile_k
    numbers = (q, k, v, dout, dk, dv, batch, p.heads, len_q, len_k, sum_rows, left, right, p.scale, p.softcap, together)
    before = (out, dout, sequences, p.stride_n, p.heads, len_q)
    small = {"num_warps": 4}

    def rounding(strides: Strides, heads: int, length: int, scale: float, programs: int, tile: int) -> Launch:
        of_sum = (strides, sequences, heads, length, scale)
        return Launch(
            postprocess_kernel, programs, p.device, of_sum, constants | {"TILE": tile}, small, descriptors=False
        )

    def rounding_of_keys(strides: Strides, scale: float) -> Launch:
        return rounding(strides, p.heads_kv, sum_rows if p.varlen else len_k, scale, key_tiles, tile_k)

    return Backward(
        _order(p, tile_k) if p.varlen else None,
        Launch(preprocess_kernel, tiles, p.device, before, constants, small, descriptors=False),
        Launch(
            kernel, min(key_tiles * shares, processors), p.device, numbers, constants, small | {"maxnreg": 168},
            descriptors=True,
        ),
        rounding(dq, p.heads, len_q, p.scale, tiles, tile_q),
        (rounding_of_keys(dk, p.scale), rounding_of_keys(dv, 1.0)) if shares > 1 else (),
        HEADER.value + 2 * tiles_k if p.varlen else 0,
        2 * tiles * tile_q + 1,
        tiles * tile_q * p.width,
        key_tiles * tile_k * p.width,
    )  # fmt: skip


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes 4 us on the host


@functools.cache
def _processors(device: torch.device) -> int:
    """As many programs run at once; without a GPU kernels are but compiled."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
