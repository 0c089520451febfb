"""Compiles the Triton kernels of many calls at once, where each call would compile its own when it runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from attn_n.doctor.progress import Progress


def compile_kernels(calls: Sequence[tuple[str, Callable[[], object]]], progress: Progress) -> None:
    """Compile the kernels of calls, which come with their names, in a thread for each core.

    The calls run without our kernels, so that what they return is undefined. What fails is not reported: it fails again
    when the call is made.
    """
    try:
        from attn_n.launcher import compiling_only
    except Exception:  # without Triton nothing is compiled here, and a broken one can raise anything
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        with compiling_only(pool) as compilations:
            for done, (name, call) in enumerate(calls):
                progress.show(done, len(calls), f"finding kernels: {name}")
                with contextlib.suppress(Exception):
                    call()
        total = len(compilations.futures)
        for done, _ in enumerate(as_completed(compilations.futures)):
            progress.show(done, total, "compiling kernels")
