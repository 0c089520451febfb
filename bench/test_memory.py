"""The peak memory of one forward and backward, and that it is linear in the length."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.contenders import ATTN_N, EAGER, SDPA, Contender
from bench.memory import peak

LENGTHS = (2048, 4096, 8192)
POINTS = [*((contender, length) for contender in (ATTN_N, SDPA) for length in LENGTHS), (EAGER, 2048)]


@pytest.mark.parametrize(("contender", "length"), POINTS, ids=str)
def test_peak(
    contender: Contender, length: int, peaks: dict[tuple[str, int], int], affordable: Callable[[int], None]
) -> None:
    affordable(length)
    peaks[contender.name, length] = peak(contender, length)


@pytest.mark.parametrize("length", LENGTHS[:-1])
def test_attn_n_is_linear(length: int, affordable: Callable[[int], None]) -> None:
    affordable(2 * length)
    assert 1.8 <= peak(ATTN_N, 2 * length) / peak(ATTN_N, length) <= 2.2
