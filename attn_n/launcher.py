"""Launches of Triton kernels: everything that depends on the metadata of a call alone is found once.

Triton takes some 60 us on the host to find the compiled kernel that fits its arguments. That is known from the kernel,
its constants, and which kinds of numbers it gets; Triton is asked only where a pointer is not aligned. Its launcher is
called as PyTorch's compiler calls it: `kernel[grid](...)` on a compiled kernel makes a record for profilers of Triton
first, which takes as long as the launch, and is left to them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

# Triton's own launch is not for several threads at a time: while one of them loads a kernel onto the GPU another takes
# it for loaded, and the interpreter keeps the program that it is in where all threads find it.
_one_at_a_time = threading.RLock()

# Compiled kernels by Triton's specialisation, so that a new length reuses a kernel compiled for another length.
_compiled: dict[tuple[Any, ...], Any] = {}

# Within `compiling_only`, what compiles.
_compilations: Compilations | None = None


@contextlib.contextmanager
def compiling_only(pool: Executor) -> Iterator[Compilations]:
    """Compile in threads of the pool what calls would launch within, and launch nothing: their results are undefined.

    This holds in all threads, since a backward has one of its own. A later launch finds what was compiled.
    """
    global _compilations
    _compilations = Compilations(pool)
    try:
        yield _compilations
    finally:
        _compilations = None


class Compilations:
    """This compiles launches in the threads of a pool, each kernel once."""

    def __init__(self, pool: Executor) -> None:
        self.futures: list[Future[Any]] = []
        self._pool = pool
        self._seen: set[tuple[Any, ...]] = set()

    def add(self, key: tuple[Any, ...] | None, launch: Launch, arguments: tuple[Argument, ...]) -> None:
        """Compile a launch, unless one of the same key was; None is no key."""
        if key in self._seen:
            return
        if key is not None:
            self._seen.add(key)
        self.futures.append(self._pool.submit(launch.loaded, *_tensors(arguments)))


class Part:
    """A part of a tensor of one dimension: an address takes the host a tenth of the time of a view."""

    __slots__ = ("_of", "_size", "_start", "address")

    def __init__(self, of: Tensor, start: int, size: int) -> None:
        self._of, self._start, self._size = of, start, size
        self.address = of.data_ptr() + start * of.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return self._of.dtype

    def view(self) -> Tensor:
        return self._of[self._start : self._start + self._size]


Argument: TypeAlias = Tensor | Part | float | None


class Launch:
    """One kernel with its grid, its constants and its numbers; calling it with the tensors of a call launches it."""

    def __init__(
        self, kernel: Any, programs: int, device: torch.device, numbers: tuple[Any, ...], constants: dict[str, Any],
        options: dict[str, int], descriptors: bool,
    ) -> None:  # fmt: skip
        """`options` are those of the compiler; `descriptors`: the kernel makes tensor descriptors."""
        self.programs = programs
        self._kernel, self._device, self._numbers = kernel, device, numbers
        # A multiplication and the addition behind it are one instruction: the default of Triton up to 3.9 alone.
        self._options, self._descriptors = {"enable_fp_fusion": True, **options}, descriptors
        self._constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self._rest = (*numbers, *self._constants.values())
        self._found: dict[tuple[type, ...], tuple[Any, ...]] = {}
        self._one_of_several = device.type == "cuda" and torch.cuda.device_count() > 1

    def __call__(self, *arguments: Argument) -> None:
        if self._one_of_several and self._device.index != torch.cuda.current_device():
            with torch.cuda.device(self._device):  # Triton launches on the current device
                self(*arguments)
            return
        if self._descriptors:
            triton.set_allocator(_workspace)  # of this thread, and backward has another than forward
        # Addresses, where Triton's launcher would ask each tensor for its own, and the driver what it points to.
        values: list[float | None] = []
        bits = 0
        for x in arguments:
            if x is None or x.__class__ is float:
                values.append(x)
            else:
                address = x.address if x.__class__ is Part else x.data_ptr()  # type: ignore[union-attr]
                values.append(address)
                bits |= address
        aligned, kinds = not bits & 15, tuple(map(type, arguments))
        found = (self._found.get(kinds) or self._find(kinds, arguments)) if aligned else None
        if _compilations is not None:
            if found is None:
                _compilations.add(self._specialization(arguments) if aligned else None, self, arguments)
            return
        if found is not None and not _profiled():
            run, stream, function, metadata = found
            run(self.programs, 1, 1, stream(self._device.index), function, metadata, None, None, None, *values,
                *self._rest)  # fmt: skip
            return
        with _one_at_a_time:
            compiled = self._kernel[self.programs,](
                *_tensors(arguments), *self._numbers, **self._constants, **self._options
            )
        if aligned and compiled is not None:  # Triton's interpreter compiles nothing
            self._found[kinds] = _loaded(compiled)
            key = self._specialization(arguments)
            if key is not None:
                _compiled[key] = compiled

    def _find(self, kinds: tuple[type, ...], arguments: tuple[Argument, ...]) -> tuple[Any, ...] | None:
        """Return the kernel that was compiled for another launch of the same specialisation."""
        compiled = _compiled.get(self._specialization(arguments))  # type: ignore[arg-type]
        if compiled is not None:
            self._found[kinds] = _loaded(compiled)
        return self._found.get(kinds)

    def _specialization(self, arguments: tuple[Argument, ...]) -> tuple[Any, ...] | None:
        """As fine as Triton's own, or finer: it leaves some of the numbers alone."""
        if torch.version.hip is not None:  # there it depends on the sizes of tensors too
            return None
        return (
            id(self._kernel), self._device, *self._constants.values(), *self._options.values(),
            *[x.dtype if isinstance(x, Tensor | Part) else type(x) for x in arguments], *_kinds(self._numbers),
        )  # fmt: skip

    def compiled(self, *arguments: Argument) -> Any:
        """The kernel, compiled but not launched."""
        return self._kernel.warmup(
            *arguments, *self._numbers, **self._constants, **self._options, grid=(self.programs,)
        )

    def loaded(self, *arguments: Argument) -> Any:
        """What launches the kernel, which is on the GPU then: Triton compiles that, too, by a C compiler."""
        # Triton compiles for the current device, which each thread has for itself.
        with torch.cuda.device(self._device) if self._one_of_several else contextlib.nullcontext():
            return self.compiled(*arguments).run


def _tensors(arguments: tuple[Argument, ...]) -> list[Tensor | float | None]:
    return [x.view() if isinstance(x, Part) else x for x in arguments]


def _kinds(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Integers that are 1, that are multiples of 16, and that need 64 bits have kernels of their own."""
    return tuple([
        (1 if x == 1 else (0 if x & 15 else 16) + (0 if -(2**31) <= x < 2**31 else 64)) if x.__class__ is int
        else _kinds(x) if isinstance(x, tuple)
        else x.__class__
        for x in numbers
    ])  # fmt: skip


def _loaded(compiled: Any) -> tuple[Any, ...]:
    """What launches a compiled kernel, which is on the GPU then."""
    return compiled.run, driver.active.get_current_stream, compiled.function, compiled.packed_metadata


def _profiled() -> bool:
    """Return True if a profiler of Triton waits for launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # Triton 3.4 has one hook, or None


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory on the current device, for the descriptors that a kernel writes for itself."""
    return torch.empty_strided((size,), (1,), dtype=torch.int8, device="cuda")
