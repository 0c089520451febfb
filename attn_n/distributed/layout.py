"""Which tokens of a sequence a rank holds.

A sequence is cut into `2 R` chunks for R ranks, and rank r holds the chunks r and `2 R - 1 - r`, in this order. Under a
causal mask every rank so has as many pairs of a query and a key ("zig-zag"). Chunks differ by at most one token, the
first ones are the longer ones, and so the numbers of tokens of ranks differ by at most one too.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple


class Span(NamedTuple):
    """Tokens from `start` to before `stop`."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return max(0, self.stop - self.start)

    def shifted(self, by: int) -> Span:
        return Span(self.start + by, self.stop + by)

    def within(self, other: Span) -> Span:
        """Return what both have; it may be empty."""
        return Span(max(self.start, other.start), min(self.stop, other.stop))


def chunks_of(total: int, ranks: int, rank: int) -> tuple[Span, Span]:
    """Return the two chunks of a rank, by their positions in the sequence."""
    each, longer = divmod(total, 2 * ranks)
    starts = list(accumulate([each + (chunk < longer) for chunk in range(2 * ranks)], initial=0))
    first, second = rank, 2 * ranks - 1 - rank
    return Span(starts[first], starts[first + 1]), Span(starts[second], starts[second + 1])


def length_of(total: int, ranks: int, rank: int) -> int:
    """Return how many tokens a rank holds."""
    first, second = chunks_of(total, ranks, rank)
    return first.length + second.length
