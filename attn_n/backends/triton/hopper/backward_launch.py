"""Which backward calls Hopper's kernels serve, and their launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from attn_n.backends.base import empty_in_order, memory_order
from attn_n.backends.triton.hopper.backward import backward_kernel, prepare_kernel, round_kernel
from attn_n.backends.triton.launch import _workspace
from attn_n.backends.triton.portable.prepare import padded_rows
from attn_n.backends.triton.problem import Problem, describe
from attn_n.call import Options

TILES_Q = {64: 128, 128: 64}
PART = 64  # queries of one product of the kernel
LOG2E = 1.4426950408889634
ROWS = 64  # of the two small passes


def serves(problem: Problem) -> bool:
    """Whether TMA can address the tensors, and what the call asks for is in the kernel."""
    p, step = problem, 16 // problem.dtype.itemsize
    return (
        p.dtype in (torch.float16, torch.bfloat16)
        and p.width == p.width_v
        and p.width in TILES_Q
        and p.strides_mask is None
        and p.strides_slopes is None
        and p.dropout_p == 0
        and p.aligned
        and all(
            column == 1 and head > 0 and row > 0 and not (batch % step or head % step or row % step)
            for batch, head, row, column in p.strides
        )
    )


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    log_n: Tensor | None, options: Options, dn_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv, and if wanted the share of each tile of rows in the gradient of n, `(B, Hq, tiles)`."""
    dq, dk, dv = (empty_in_order(x, x.shape, memory_order(x)) for x in (q, k, v))
    p = describe((q, k, v, out, dout, dq, dk, dv), log_n, options)
    of_q, of_k, of_v, of_out, of_dout, of_dq, of_dk, of_dv = p.strides
    padded = -(-padded_rows(p) // 4) * 4  # rows of stats at multiples of 16 bytes
    stats = torch.empty(2, p.heads, padded, dtype=torch.float32, device=p.device)
    dq_sum = torch.empty(p.heads, padded, p.width, dtype=torch.float32, device=p.device)
    counter = torch.empty(1, dtype=torch.int32, device=p.device)
    left, right = (None if side is None else min(side, p.len_q + p.len_k) for side in (p.left, p.right))
    tile_q = TILES_Q[p.width]

    programs = p.batch * p.heads * triton.cdiv(p.len_q, tile_q)
    shares = torch.zeros(programs, dtype=torch.float32, device=p.device) if dn_wanted else None
    prepare_kernel[programs,](
        out, dout, lse, dlse, stats, dq_sum, counter, log_n, shares, of_out, of_dout, p.stride_n,
        padded, p.heads, p.len_q, p.width, tile_q, num_warps=4,
    )  # fmt: skip
    items = p.batch * p.heads_kv * triton.cdiv(p.len_k, 128)
    processors = torch.cuda.get_device_properties(p.device).multi_processor_count
    triton.set_allocator(_workspace)
    backward_kernel[min(items, processors),](
        q, k, v, dout, stats, dq_sum, dk, dv, counter,
        of_q, of_k, of_v, of_dout, of_dk, of_dv, padded, p.batch, p.heads_kv, p.len_q, p.len_k, left, right,
        p.scale * LOG2E, None if p.softcap is None else p.softcap * LOG2E, p.heads // p.heads_kv, p.width, tile_q, PART,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
    round_kernel[programs,](
        dq_sum, dq, of_dq, padded, p.heads, p.len_q, p.scale, p.width, tile_q, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, None if shares is None else shares.view(p.batch, p.heads, -1)
