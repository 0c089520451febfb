"""From the key of a call to the launches of the Hopper kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.backends.triton.hopper import configs
from attn_n.backends.triton.hopper.backward import backward_kernel
from attn_n.backends.triton.hopper.backward_apart import apart_kernel
from attn_n.backends.triton.hopper.backward_passes import postprocess_kernel, preprocess_kernel
from attn_n.backends.triton.hopper.backward_wide import wide_kernel
from attn_n.backends.triton.hopper.configs import BackwardSpec, Config, ForwardSpec, Widths
from attn_n.backends.triton.hopper.forward import STRIP, forward_kernel
from attn_n.backends.triton.hopper.schedule import BLOCK, HEADER, schedule_kernel
from attn_n.backends.triton.hopper.tma import UNBOUNDED
from attn_n.backends.triton.kernel_key import KernelKey, Strides
from attn_n.launcher import Launch


class Forward(NamedTuple):
    """The launches of a forward, in their order."""

    schedule: Launch | None  # only of sequences with lengths of their own: varlen, or of a padded batch
    main: Launch
    table: int  # elements of the table of `schedule.py`; of batches 1, the counter, or 0


def forward(key: KernelKey, out: Strides, config: Config | None = None) -> Forward:
    """Return the launches of a forward; `config` replaces that of the table."""
    p, widths = key, _widths(key)
    config = config or configs.find(key, widths.tile)
    left, right = p.window
    tile_q = config.tiles.consumers * STRIP.value
    tiles_of_head = _cdiv(p.len_q, tile_q)
    tiles = most_tiles(p, p.rows, tile_q) if p.varlen else p.batch * tiles_of_head
    items = p.heads * tiles
    at_once = _sm_count(p.device) * config.tiles.programs
    listed, swizzle = p.varlen or p.padded, None
    if config.counted and right is not None and not listed:
        # These heads take turns: as many as have 32 MB of keys and values, and enough for three rounds of all programs.
        swizzle = max((1 << 23) // (p.len_k * widths.tile) * (p.heads // p.heads_kv), _cdiv(3 * at_once, tiles_of_head))
        swizzle = _cdiv(p.batch * p.heads, max(1, p.batch * p.heads // swizzle))
    elif p.causal and not listed:
        items = p.heads * p.batch * _cdiv(tiles_of_head, 2)  # an item is a pair of tiles
    numbers = (
        *_strides(p, *p.strides, out), p.stride_n, None if p.varlen else p.batch, p.heads, p.len_q, p.len_k, left,
        right, p.scale, p.softcap, items, swizzle,
    )  # fmt: skip
    one_edge = left is None and (
        right is None or (p.more_keys is not None and (p.more_keys + right + 1) % STRIP.value <= 1)
    )
    constants = {"SPEC": ForwardSpec(config.tiles, widths, p.heads // p.heads_kv, one_edge, p.padded)}
    # The registers of the SM are divided among the consumers, the producer and the idle warps that complete its four.
    threads = 128 * (config.tiles.consumers + 1) * config.tiles.programs
    options = {"num_warps": 4, "maxnreg": (1 << 16) // threads // 8 * 8}
    programs = min(items, at_once)
    return Forward(
        _schedule(p, tile_q, p.len_q, p.len_k) if listed else None,
        Launch(forward_kernel, programs, p.device, numbers, constants, options, descriptors=True),
        HEADER.value + 2 * tiles if listed else int(swizzle is not None),
    )


def most_tiles(key: KernelKey, rows: int, tile: int) -> int:
    """Return how many tiles the rows of varlen sequences have at most; no tile spans two sequences."""
    return rows // tile + key.batch


def ragged(strides: Strides) -> Strides:
    """Return the strides of a padded batch as `tma.py` takes them: three numbers are added to the four.

    These are the unit in which TMA counts to the end of a sequence, and the strides of batch and row in that unit. It
    is their greatest common divisor, so that any two strides will do.
    """
    batch, _, row, _ = strides
    unit = math.gcd(batch, row)
    return *strides, unit, batch // unit, row // unit


def can_count(shape: Sequence[int], strides: Strides) -> bool:
    """Return True if 32 bits reach the end of each sequence of a padded batch, and of a dense one of that shape."""
    batch, heads, rows, _ = shape
    *_, batch_step, row_step = ragged(strides)
    return max((batch - 1) * batch_step + rows * row_step, batch * heads * rows) < int(UNBOUNDED.value)


def _strides(key: KernelKey, *each: Strides) -> tuple[Strides, ...]:
    return tuple([ragged(strides) for strides in each]) if key.padded else each


Extents = tuple[Tensor | None, Tensor | None, Tensor | None]  # the tensors of `schedule.Extents`


def list_of_tiles(launches: Forward | Backward, like: Tensor, of_tiles: Extents, of_others: Extents) -> Tensor:
    """Return the table of `schedule.py`, or for batches its counter alone.

    These are tiles of the rows that the first extents say; the others are those that each sequence meets.
    """
    if launches.schedule is None:
        return torch.zeros(launches.table, dtype=torch.int32, device=like.device)
    table = torch.empty(launches.table, dtype=torch.int32, device=like.device)
    launches.schedule(table, *of_tiles, *of_others)
    return table


def _schedule(key: KernelKey, tile: int, rows: int, other_rows: int) -> Launch:
    programs = _cdiv(key.batch, BLOCK.value)
    numbers = (key.batch, *((rows, other_rows) if key.padded else (None, None)))
    return Launch(schedule_kernel, programs, key.device, numbers, {"TILE": tile}, {"num_warps": 4}, False)


class Backward(NamedTuple):
    """The launches of a backward, in their order."""

    schedule: Launch | None  # as in a forward
    preprocess: Launch
    main: Launch
    postprocess: Launch  # dQ
    postprocess_kv: tuple[Launch, ...]  # dK and dV where several programs add to them; empty where one stores them
    table: int  # elements of what they share, see `schedule.py` and `backward_passes.py`
    stats: int
    dq_sum: int
    dkv_sum: int  # of each of the two


# By tile; and the registers of a thread before the roles divide them: of 12 warps 168, of 16 warps 128.
KERNELS = {64: (apart_kernel, 128), 128: (backward_kernel, 168), 192: (wide_kernel, 168), 256: (wide_kernel, 168)}


def backward(key: KernelKey, dq: Strides, dk: Strides, dv: Strides) -> Backward:
    """Return the launches of a backward; the strides are those of the gradients."""
    p, widths = key, _widths(key)
    tile_q, tile_k, pass_q = configs.BACKWARD[widths.tile]
    q, k, v, out, dout = p.strides
    kernel, registers = KERNELS[widths.tile]
    sm_count = _sm_count(p.device)
    team_heads = configs.heads_of_item(p, widths.tile, sm_count)
    teams = p.heads // p.heads_kv // team_heads
    spec = BackwardSpec(widths, tile_q, pass_q, team_heads, teams, p.padded)
    left, right = p.window
    if p.varlen:  # one batch, whole tiles for each sequence; only the GPU knows the lengths
        batch, tiles_q, tiles_k = 1, most_tiles(p, p.rows, pass_q), most_tiles(p, p.keys, tile_k)
        sequences, len_q, len_k, swizzle = p.batch, tiles_q * pass_q, 0, None
    else:
        batch, tiles_q, tiles_k = p.batch, _cdiv(p.len_q, pass_q), _cdiv(p.len_k, tile_k)
        sequences, len_q, len_k, swizzle = None, p.len_q, p.len_k, 1
        if p.padded:
            swizzle = None
        elif p.causal:
            # As many teams take turns as keep all SMs busy, so that a light tile is followed by a heavy one of the next
            # heads (+1 to 4 %, and 4 to 13 % with four query heads a KV head; L2 does not hold more heads).
            swizzle = max(2, min(16, sm_count // tiles_k))
    tiles, key_tiles, sum_rows = batch * p.heads * tiles_q, batch * p.heads_kv * tiles_k, tiles_k * tile_k
    numbers = (
        *_strides(p, q, k, v, dout, dk, dv), ragged(dq) if p.padded else None, batch, p.heads, len_q, len_k, sum_rows,
        left, right, p.scale, p.softcap, swizzle,
    )  # fmt: skip
    of_rows = (out, dout, sequences, p.stride_n, p.heads, len_q)
    small, behind = {"num_warps": 4}, {"num_warps": 4, "launch_pdl": True}

    def postprocess(
        strides: Strides, heads: int, length: int, scale: float, programs: int, tile: int, width: int
    ) -> Launch:
        of_sum, constants = (strides, sequences, heads, length, scale), {"E": width, "TILE": tile, "SPEC": spec}
        return Launch(postprocess_kernel, programs, p.device, of_sum, constants, behind, descriptors=False)

    def postprocess_keys(strides: Strides, scale: float, width: int) -> Launch:
        return postprocess(strides, p.heads_kv, sum_rows if p.varlen else len_k, scale, key_tiles, tile_k, width)

    return Backward(
        _schedule(p, tile_k, p.len_k, p.len_q) if p.varlen or p.padded else None,
        Launch(preprocess_kernel, tiles, p.device, of_rows, {"SPEC": spec}, small, descriptors=False),
        Launch(
            kernel, min(key_tiles * teams, sm_count), p.device, numbers, {"SPEC": spec},
            behind | {"maxnreg": registers}, descriptors=True,
        ),
        postprocess(dq, p.heads, len_q, p.scale, tiles, pass_q, p.width),
        (postprocess_keys(dk, p.scale, p.width), postprocess_keys(dv, 1.0, p.width_v)) if teams > 1 else (),
        HEADER.value + 2 * (tiles_k if p.varlen else p.batch * tiles_k) if p.varlen or p.padded else 0,
        2 * tiles * pass_q + 1,
        tiles * pass_q * widths.padded,
        key_tiles * tile_k * widths.padded,
    )  # fmt: skip


def _widths(key: KernelKey) -> Widths:
    widths = configs.widths(key.width, key.width_v)
    assert widths is not None
    return widths


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes 4 us on the host


@functools.cache
def _sm_count(device: torch.device) -> int:
    """Return the number of SMs: an H100's without a GPU, where kernels are only compiled."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
