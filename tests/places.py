"""Parameters that say on which devices a test runs. Those for a GPU exist only where there is one."""

from __future__ import annotations

import pytest

from tests.cases import INTERPRETED


def on_gpu(*parameters: tuple[object, ...]) -> list[object]:
    """Return the parameters of tests that need a GPU."""
    return [] if INTERPRETED else [pytest.param(*values, marks=pytest.mark.gpu) for values in parameters]


def slow(*values: object) -> list[object]:
    """Return the parameters that `make test` leaves out, since others represent them."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# The device of Triton kernels: a process interprets them on the CPU or compiles them for the GPU, never both.
PLACES = ["cpu"] if INTERPRETED else on_gpu(("cuda",))
