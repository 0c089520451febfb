"""From a problem to the launch of a Hopper kernel."""

from __future__ import annotations

import functools

import torch
import triton

from attn_n.backends.triton.hopper import configs
from attn_n.backends.triton.hopper.configs import Config
from attn_n.backends.triton.hopper.forward import STRIP, forward_kernel
from attn_n.backends.triton.launch import Launch
from attn_n.backends.triton.problem import Problem


@functools.lru_cache(1024)
def prepared(problem: Problem, config: Config | None = None) -> Launch:
    """The launch of the forward; `config` in place of that of the table."""
    p, config = problem, config or configs.find(problem)
    # A wider window sees nothing more, and its edges would overflow.
    left, right = (None if side is None else min(side, p.len_q + p.len_k) for side in (p.left, p.right))
    tiles = triton.cdiv(p.len_q, config.consumers * STRIP.value)
    if left is None and right is not None:
        tiles = triton.cdiv(tiles, 2)  # an item is a pair of them
    items = p.batch * p.heads * tiles
    numbers = (
        *p.strides[:4], p.stride_n, p.batch, p.heads, p.len_q, p.len_k, left, right, p.scale, p.softcap, items,
    )  # fmt: skip
    constants = {
        "GROUPS": p.heads // p.heads_kv, "E": p.width, "CONSUMERS": config.consumers, "TILE_K": config.tile_k,
        "STAGES": config.stages, "Q_IN_REGISTERS": config.q_in_registers, "OUT_APART": config.out_apart,
        "ONE_EDGE": left is None and (right is None or (p.len_k - p.len_q + right + 1) % STRIP.value <= 1),
    }  # fmt: skip
    # The registers of the SM, shared among the consumers, the producer and the warps that round them up to 4.
    options = {"num_warps": 4, "maxnreg": {2: 168, 3: 128}[config.consumers]}
    processors = torch.cuda.get_device_properties(p.device).multi_processor_count if p.device.type == "cuda" else 132
    return Launch(forward_kernel, min(items, processors), p.device, numbers, constants, options, descriptors=True)
