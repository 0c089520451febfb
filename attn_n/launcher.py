"""Launches of Triton kernels: everything that depends on the metadata of a call alone is found once.

Triton takes some 60 us on the host to find the compiled kernel that fits its arguments. That is known from the kernel,
its constants, and which kinds of numbers it gets; it is asked only where a pointer is not aligned.
"""

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

# For each device one byte, so that `empty_like` allocates the workspace of a launch: `torch.empty` takes twice as long.
_workspaces: dict[tuple[int, int], Tensor] = {}


class Launch:
    """One kernel with its grid, its constants and its numbers; calling it with the tensors of a call launches it."""

    def __init__(
        self, kernel: Any, programs: int, device: torch.device, numbers: tuple[Any, ...], constants: dict[str, Any],
        options: dict[str, int], descriptors: bool,
    ) -> None:  # fmt: skip
        """`options` are those of the compiler; `descriptors`: the kernel makes tensor descriptors."""
        self.programs = programs
        self._kernel, self._device, self._numbers = kernel, device, numbers
        self._options, self._descriptors = options, descriptors
        self._constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self._rest = (*numbers, *self._constants.values())
        self._found: dict[tuple[type, ...], Any] = {}
        self._one_of_several = device.type == "cuda" and torch.cuda.device_count() > 1

    def __call__(self, *arguments: Tensor | float | None) -> None:
        if self._descriptors:
            triton.set_allocator(_workspace)  # of this thread, and backward has another than forward
        if self._one_of_several and self._device.index != torch.cuda.current_device():
            with torch.cuda.device(self._device):  # Triton launches on the current device
                self._launch(arguments)
        else:
            self._launch(arguments)

    def _launch(self, arguments: tuple[Tensor | float | None, ...]) -> None:
        # Addresses, where Triton's launcher would ask each tensor for its own, and the driver what it points to.
        pointers = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        aligned = not any([x & 15 for x in pointers if x.__class__ is int])
        kinds = tuple([x.__class__ for x in arguments])
        if aligned:
            found = self._found.get(kinds) or self._find(kinds, arguments)
            if found is not None:
                found(*pointers, *self._rest)
                return
        with _one_at_a_time:
            compiled = self._kernel[self.programs,](*arguments, *self._numbers, **self._constants, **self._options)
        if aligned and compiled is not None:  # Triton's interpreter compiles nothing
            self._found[kinds] = compiled[self.programs, 1, 1]
            key = self._specialization(arguments)
            if key is not None:
                _compiled[key] = compiled

    def _find(self, kinds: tuple[type, ...], arguments: tuple[Tensor | float | None, ...]) -> Any:
        """Return the kernel that was compiled for another launch of the same specialisation."""
        compiled = _compiled.get(self._specialization(arguments))  # type: ignore[arg-type]
        if compiled is not None:
            self._found[kinds] = compiled[self.programs, 1, 1]
        return self._found.get(kinds)

    def _specialization(self, arguments: tuple[Tensor | float | None, ...]) -> tuple[Any, ...] | None:
        """As fine as Triton's own, or finer: it leaves some of the numbers alone."""
        if torch.version.hip is not None:  # there it depends on the sizes of tensors too
            return None
        return (
            id(self._kernel), self._device, *self._constants.values(), *self._options.values(),
            *[x.dtype if isinstance(x, Tensor) else type(x) for x in arguments], *_kinds(self._numbers),
        )  # fmt: skip

    def compiled(self, *arguments: Tensor | float | None) -> Any:
        """The kernel, compiled but not launched."""
        return self._kernel.warmup(
            *arguments, *self._numbers, **self._constants, **self._options, grid=(self.programs,)
        )


def _kinds(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Integers that are 1, that are multiples of 16, and that need 64 bits have kernels of their own."""
    return tuple([
        (1 if x == 1 else (0 if x & 15 else 16) + (0 if -(2**31) <= x < 2**31 else 64)) if x.__class__ is int
        else _kinds(x) if isinstance(x, tuple)
        else x.__class__
        for x in numbers
    ])  # fmt: skip


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel writes for itself."""
    key = torch.cuda.current_device(), size
    like = _workspaces.get(key)
    if like is None:
        like = _workspaces[key] = torch.empty(1, dtype=torch.int8, device="cuda").expand(size)
    return torch.empty_like(like)
