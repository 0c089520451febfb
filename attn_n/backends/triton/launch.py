"""From a problem to the launch of a kernel, prepared once for all calls that look the same."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from attn_n.backends.triton import configs
from attn_n.backends.triton.backward import dkdv_kernel, dq_kernel
from attn_n.backends.triton.configs import Config
from attn_n.backends.triton.forward import forward_kernel
from attn_n.backends.triton.problem import Problem
from attn_n.backends.triton.tile import ROW_PADDING


class Launch:
    """One kernel with its tiles and numbers; calling it with the tensors (and log n) of a call launches it.

    Triton takes tens of microseconds to find the compiled kernel that fits its arguments. That depends on the problem,
    on which arguments are None, and on the alignment of pointers: for aligned ones what was found is remembered.
    """

    def __init__(
        self, kernel: Any, programs: int, config: Config, device: torch.device, numbers: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:  # fmt: skip
        constants = constants | config.constants()
        self.programs = programs
        self._kernel, self._config, self._device, self._numbers = kernel, config, device, numbers
        self._constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self._found: dict[tuple[type, ...], Any] = {}

    def __call__(self, *arguments: Tensor | float | None) -> None:
        if self._config.descriptors:
            triton.set_allocator(_workspace)  # of this thread, and backward has another than forward
        if self._device.type == "cuda" and self._device.index != torch.cuda.current_device():
            with torch.cuda.device(self._device):  # Triton launches on the current device
                self._launch(arguments)
        else:
            self._launch(arguments)

    def _launch(self, arguments: tuple[Tensor | float | None, ...]) -> None:
        aligned = not any(x.data_ptr() % 16 for x in arguments if isinstance(x, Tensor))
        kinds = tuple(map(type, arguments))
        found = self._found.get(kinds) if aligned else None
        if found is not None:
            found(*arguments, *self._numbers, *self._constants.values())
            return
        compiled = self._kernel[self.programs,](
            *arguments, *self._numbers, **self._constants,
            num_warps=self._config.num_warps, num_stages=self._config.num_stages,
        )  # fmt: skip
        if aligned and compiled is not None:  # Triton's interpreter compiles nothing
            self._found[kinds] = compiled[self.programs, 1, 1]

    def compiled(self, *arguments: Tensor | float | None) -> Any:
        """The kernel, compiled but not launched."""
        return self._kernel.warmup(
            *arguments, *self._numbers, **self._constants, grid=(self.programs,),
            num_warps=self._config.num_warps, num_stages=self._config.num_stages,
        )  # fmt: skip


@functools.lru_cache(1024)
def prepared(kernel: str, problem: Problem, config: Config | None = None) -> Launch:
    """The launch of one of the kernels of `configs`; `config` in place of that of the table."""
    p, config = problem, config or configs.find(kernel, problem)
    tile_e, tile_v = configs.tiles_of_widths(p)
    constants = {
        "GROUPS": p.heads // p.heads_kv, "WIDTH": p.width, "WIDTH_V": p.width_v, "TILE_E": tile_e, "TILE_V": tile_v,
        "LINEAR": p.linear, "PRECISION": "tf32" if p.tf32 else "ieee",
    }  # fmt: skip
    # A wider window sees nothing more, and its edges would overflow.
    left, right = (None if side is None else min(side, p.len_q + p.len_k) for side in (p.left, p.right))
    numbers: tuple[Any, ...] = (
        p.heads, p.len_q, p.len_k, left, right, p.scale, p.softcap,
        min(int(p.dropout_p * 2**31), 2**31 - 1), 1 / (1 - p.dropout_p),
    )  # fmt: skip
    extras = p.strides_mask, p.strides_slopes
    programs_of_queries = p.batch * p.heads * triton.cdiv(p.len_q, config.tile_q)
    if kernel == "forward":
        numbers = *p.strides, *extras, p.stride_n, *numbers
        return Launch(forward_kernel, programs_of_queries, config, p.device, numbers, constants)
    q, k, v, out, dout, dq, dk, dv = p.strides
    numbers = padded_rows(p), *numbers
    if kernel == "dq":
        numbers = q, k, v, out, dout, dq, *extras, p.stride_n, *numbers
        return Launch(dq_kernel, programs_of_queries, config, p.device, numbers, constants)
    programs_of_keys = p.batch * p.heads_kv * triton.cdiv(p.len_k, config.tile_k)
    numbers = q, k, v, dout, dk, dv, *extras, *numbers
    constants |= {"DK": "dk" in kernel, "DV": "dv" in kernel}
    return Launch(dkdv_kernel, programs_of_keys, config, p.device, numbers, constants)


def padded_rows(problem: Problem) -> int:
    """The length of the backward's own `(H, rows)` tensors."""
    return problem.rows + problem.batch * int(ROW_PADDING.value)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel writes for itself."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
