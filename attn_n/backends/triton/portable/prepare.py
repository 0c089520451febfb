"""From a problem to the launch of a portable kernel."""

from __future__ import annotations

import functools
from typing import Any

from attn_n.backends.triton.portable import configs
from attn_n.backends.triton.portable.backward import dkdv_kernel, dq_kernel
from attn_n.backends.triton.portable.configs import Config
from attn_n.backends.triton.portable.forward import forward_kernel
from attn_n.backends.triton.portable.tile import ROW_PADDING
from attn_n.backends.triton.problem import Problem
from attn_n.launcher import Launch


@functools.lru_cache(1024)
def prepared(kernel: str, problem: Problem, config: Config | None = None) -> Launch:
    """The launch of one of the kernels of `configs`; `config` in place of that of the table."""
    p, config = problem, config or configs.find(kernel, problem)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    tile_e, tile_v = configs.tiles_of_widths(p)
    constants = {
        "GROUPS": p.heads // p.heads_kv, "WIDTH": p.width, "WIDTH_V": p.width_v, "TILE_E": tile_e, "TILE_V": tile_v,
        "LINEAR": p.linear, "FLOAT_MASK": p.float_mask, "PRECISION": "tf32" if p.tf32 else "ieee",
        "TILE_Q": config.tile_q, "TILE_K": config.tile_k, "DESCRIPTORS": config.descriptors,
    }  # fmt: skip
    numbers: tuple[Any, ...] = (
        p.heads, p.len_q, p.len_k, *p.window, p.scale, p.softcap,
        min(int(p.dropout_p * 2**31), 2**31 - 1), 1 / (1 - p.dropout_p),
    )  # fmt: skip
    extras = p.strides_mask, p.strides_slopes
    programs_of_queries = p.batch * p.heads * -(-p.len_q // config.tile_q)
    if kernel == "forward":
        numbers = *p.strides, *extras, p.stride_n, *numbers
        return Launch(forward_kernel, programs_of_queries, p.device, numbers, constants, options, config.descriptors)
    q, k, v, out, dout, dq, dk, dv = p.strides
    numbers = padded_rows(p), *numbers
    if kernel == "dq":
        numbers = q, k, v, out, dout, dq, *extras, p.stride_n, *numbers
        return Launch(dq_kernel, programs_of_queries, p.device, numbers, constants, options, config.descriptors)
    programs_of_keys = p.batch * p.heads_kv * -(-p.len_k // config.tile_k)
    numbers = q, k, v, dout, dk, dv, *extras, *numbers
    constants |= {"DK": "dk" in kernel, "DV": "dv" in kernel}
    return Launch(dkdv_kernel, programs_of_keys, p.device, numbers, constants, options, config.descriptors)


def padded_rows(problem: Problem) -> int:
    """The length of the backward's own `(H, rows)` tensors."""
    return problem.rows + problem.batch * int(ROW_PADDING.value)
