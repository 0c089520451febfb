"""Where and when a test runs. Parameters for a GPU exist only where one is: nothing is collected to be skipped."""

from __future__ import annotations

import pytest

from tests.cases import INTERPRETED


def on_gpu(*parameters: tuple[object, ...]) -> list[object]:
    """The parameters of tests that need a GPU."""
    return [] if INTERPRETED else [pytest.param(*values, marks=pytest.mark.gpu) for values in parameters]


def slow(*values: object) -> list[object]:
    """The parameters that `make test` leaves out, beside others that stand for them."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# The device of a Triton kernel: they are interpreted on the CPU or compiled for the GPU, in one process never both.
PLACES = ["cpu"] if INTERPRETED else on_gpu(("cuda",))
