"""Kernels compiled for GPUs that are not there: `python -m tests.compiled NAME [WIDTH]` runs one function.

Each needs a process in which Triton compiles; that of the tests interprets the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from attn_n.backends.triton.hopper.configs import FORWARD
from attn_n.call import Options
from bench.kernels.ahead_of_time import TARGETS, compiled, padded, resources, varlen


def numbers_compile_nothing() -> None:
    kernels = [
        compiled(
            "sm_90", "forward", 64, None, torch.bfloat16,
            Options(scale, window_left=left, window_right=right, softcap=cap), length, n,
        )
        for length, scale, left, right, cap, n in (
            (256, 0.1, 5, 0, 2.0, 1.0),
            (1, 1.0, 16, 1, 1.0, 0.0),
            (77, 0.3, 1, 7, 16.0, 3.0),
            (77, 0.3, 9, -7, 16.0, 3.0),
        )
    ]  # fmt: skip
    assert all(kernel is kernels[0] for kernel in kernels)


def varlen_forward(width: int) -> None:
    def kernel(same: bool, **options: Any) -> Any:
        return compiled("sm_90", "hopper forward", width, None, torch.bfloat16, varlen(Options(**options), same))

    for found in (
        kernel(True, scale=0.1),
        kernel(False, scale=0.1, window_right=0),
        kernel(False, scale=0.1, window_left=9, window_right=5),
        kernel(True, scale=0.1, window_right=0, softcap=3.0),
    ):
        said = resources(found, "sm_90")
        assert said.spills <= 160, said  # with a window, outside of the loop over keys; 148 at 192 by Triton 3.7
        assert not said.warnings, said
    assert kernel(False, scale=0.1, window_left=9) is kernel(False, scale=1.0, window_left=16)


def padded_batches(width: int) -> None:
    """Compile both passes of padded batches: what they spill they do outside of the loops over keys and queries."""
    options, both = Options(0.1, window_right=0), ("seqused_q", "seqused_k")
    variants = [
        *[("forward", row, names) for row in FORWARD[width] for names in (both, (*both, "leftpad_k"))],
        *[
            (f"backward {kernel}", None, names)
            for kernel in ("schedule", "preprocess", "main", "postprocess")
            for names in (both, ("seqused_k",), ("leftpad_k",))
        ],
    ]
    for kernel, row, names in variants:
        found = compiled("sm_90", f"hopper {kernel}", width, row, torch.bfloat16, padded(options, *names))
        said = resources(found, "sm_90")
        assert said.spills <= 350, (kernel, row, names, said)
        assert said.shared <= TARGETS["sm_90"].shared, (kernel, row, names, said)
        assert not said.warnings, (kernel, row, names, said)


def backward(width: int) -> None:
    def kernel(length: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
        return compiled("sm_90", "hopper backward main", width, None, dtype, Options(**options), length)

    def of_varlen(name: str, **options: Any) -> Any:
        return compiled(
            "sm_90", f"hopper backward {name}", width, None, torch.bfloat16, varlen(Options(0.1, **options))
        )

    for found in (
        of_varlen("schedule"),
        of_varlen("main"),
        of_varlen("main", window_left=9, window_right=5, softcap=3.0),
        kernel(256, scale=0.1),
        kernel(256, torch.float16, scale=0.1),
        kernel(256, scale=0.1, softcap=3.0),
        kernel(256, scale=0.1, window_left=9),
        kernel(256, scale=0.1, window_left=9, window_right=5, softcap=3.0),
        *_that_share_keys(width),
    ):
        said = resources(found, "sm_90")
        assert said.spills <= 150, said
        assert not said.warnings, said
    assert kernel(256, scale=0.1, window_left=9) is kernel(1, scale=1.0, window_left=16)


def _that_share_keys(width: int) -> Iterator[Any]:
    """Compile backwards in which a program takes two of the eight query heads of a KV head."""
    from attn_n.backends.triton.hopper import configs

    usual = configs.heads_of_item
    configs.heads_of_item = lambda key, tile, sm_count: min(2, key.heads // key.heads_kv)
    try:
        for options in (Options(0.1), varlen(Options(0.1, window_right=0, softcap=3.0))):
            yield compiled("sm_90", "hopper backward main", width, None, torch.bfloat16, options, groups=8)
    finally:
        configs.heads_of_item = usual


def heads_beside_their_tiles() -> None:
    for size, size_v in ((40, 64), (80, 112), (160, 72), (56, 200)):
        for kernel in ("forward", "backward preprocess", "backward main", "backward postprocess"):
            found = compiled(
                "sm_90", f"hopper {kernel}", size, None, torch.bfloat16, Options(0.1, window_right=0), width_v=size_v
            )
            said = resources(found, "sm_90")
            assert said.spills <= 300, (kernel, size, size_v, said)
            assert not said.warnings, (kernel, size, size_v, said)


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(int, sys.argv[2:]))
