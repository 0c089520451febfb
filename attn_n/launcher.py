"""The launch of a kernel, prepared once for all calls that look the same."""

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
from torch import Tensor

# Triton's own launch is not for several threads at a time: while one of them loads a kernel onto the GPU another takes
# it for loaded, and the interpreter keeps the program that it is in where all threads find it.
_one_at_a_time = threading.RLock()


# Compiled kernels by Triton's specialisation, so that a new length reuses a kernel compiled for another length.
_compiled: dict[tuple[Any, ...], Any] = {}


class Launch:
    """One kernel with its tiles and numbers; calling it with the tensors (and log n) of a call launches it.

    Triton takes some 60 us to find the compiled kernel that fits its arguments. That depends on the problem, on which
    arguments are None, and on the alignment of pointers: for aligned ones what was found is remembered.
    """

    def __init__(
        self, kernel: Any, programs: int, device: torch.device, numbers: tuple[Any, ...], constants: dict[str, Any],
        options: dict[str, int], descriptors: bool,
    ) -> None:  # fmt: skip
        """`options` are those of the compiler; `descriptors`: the kernel makes tensor descriptors."""
        self.programs = programs
        self._kernel, self._device, self._numbers = kernel, device, numbers
        self._options, self._descriptors = options, descriptors
        self._constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self._found: dict[tuple[type, ...], Any] = {}

    def __call__(self, *arguments: Tensor | float | None) -> None:
        if self._descriptors:
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
        key = self._specialization(arguments) if aligned else None
        compiled = _compiled.get(key) if key is not None else None
        if compiled is not None:
            self._found[kinds] = found = compiled[self.programs, 1, 1]
            found(*arguments, *self._numbers, *self._constants.values())
            return
        with _one_at_a_time:
            compiled = self._kernel[self.programs,](*arguments, *self._numbers, **self._constants, **self._options)
            if aligned and compiled is not None:  # Triton's interpreter compiles nothing
                self._found[kinds] = compiled[self.programs, 1, 1]
                if key is not None:
                    _compiled[key] = compiled

    def _specialization(self, arguments: tuple[Tensor | float | None, ...]) -> tuple[Any, ...] | None:
        """As fine as Triton's own, or finer: it leaves some of the numbers alone."""
        if torch.version.hip is not None:  # there it depends on the sizes of tensors too
            return None
        return (
            id(self._kernel), self._device, *self._constants.values(), *self._options.values(),
            *(x.dtype if isinstance(x, Tensor) else type(x) for x in arguments), *map(_kind, self._numbers),
        )  # fmt: skip

    def compiled(self, *arguments: Tensor | float | None) -> Any:
        """The kernel, compiled but not launched."""
        return self._kernel.warmup(
            *arguments, *self._numbers, **self._constants, **self._options, grid=(self.programs,)
        )


def _kind(x: Any) -> Any:
    """Integers that are 1, that are multiples of 16, and that need 64 bits have kernels of their own."""
    if type(x) is int:
        return 1 if x == 1 else (16 if x % 16 == 0 else 0) + (0 if -(2**31) <= x < 2**31 else 64)
    return tuple(map(_kind, x)) if isinstance(x, tuple) else type(x)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel writes for itself."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
