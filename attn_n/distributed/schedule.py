"""Which queries of a rank attend to which keys of another one.

Two chunks of a sequence make a rectangle of the logits: it is hidden, or all of it is seen, or the diagonal of a causal
mask or the band of a window runs through it. What is hidden is neither computed nor sent.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from attn_n.distributed.layout import Span, chunks_of


class Part(NamedTuple):
    """One call of a backend.

    Attributes:
        rows: of the queries that this rank holds.
        keys: of those that the source holds.
        left, right: the window of this call, whose last query is at its last key; None is unlimited.
        starts: of varlen sequences, where each begins in `rows`, which then are `keys`, and the end of the last.
    """

    rows: Span
    keys: Span
    left: int | None = None
    right: int | None = None
    starts: tuple[int, ...] | None = None

    @property
    def full(self) -> bool:
        return self.left is None and self.right is None and self.starts is None


class Problem(NamedTuple):
    """What all ranks know: the sequences, one behind the other, the number of ranks, and the window.

    Attributes:
        starts: where each sequence begins, and the end of the last one.
        varlen: sequences were packed; otherwise there is one.
    """

    starts: tuple[int, ...]
    varlen: bool
    ranks: int
    left: int | None
    right: int | None

    @property
    def total(self) -> int:
        return self.starts[-1]


@functools.lru_cache(1024)
def parts(problem: Problem, rank: int, source: int) -> tuple[Part, ...]:
    """Return the calls of the queries of `rank` and the keys of `source`."""
    mine, theirs = (chunks_of(problem.total, problem.ranks, of) for of in (rank, source))
    everything = Span(0, sum(chunk.length for chunk in mine))
    own = rank == source
    if everything.length == 0:
        return ()
    if own and not problem.varlen and problem.left is None and problem.right == 0:
        return (Part(everything, everything, None, 0),)  # in the order of positions, so that one diagonal serves both
    found = [_own_sequences(problem, mine)] if own and problem.varlen else []
    rectangles = [
        part
        for i, queries in enumerate(mine)
        for j, keys in enumerate(theirs)
        if not (own and problem.varlen and i == j)
        for part in _rectangle(problem, queries, keys, _before(mine, i), _before(theirs, j))
    ]
    return (*found, *_joined(_joined(rectangles, by_rows=False), by_rows=True))


def keys_needed(problem: Problem, rank: int, source: int) -> Span:
    """Return which keys of `source` the queries of `rank` see; it is empty if they see none."""
    needed = [part.keys for part in parts(problem, rank, source)]
    return Span(min(keys.start for keys in needed), max(keys.stop for keys in needed)) if needed else Span(0, 0)


def _before(chunks: Sequence[Span], which: int) -> int:
    """Return the number of tokens that a rank holds before this chunk."""
    return sum(chunk.length for chunk in chunks[:which])


def _own_sequences(problem: Problem, chunks: tuple[Span, Span]) -> Part:
    """Return the call of the sequences within each chunk by itself."""
    lengths = []
    for chunk in chunks:
        cuts = [chunk.start, *(start for start in problem.starts if chunk.start < start < chunk.stop), chunk.stop]
        lengths += [stop - start for start, stop in pairwise(cuts) if stop > start]
    starts = tuple(accumulate(lengths, initial=0))
    everything = Span(0, starts[-1])
    return Part(everything, everything, problem.left, problem.right, starts)


def _rectangle(problem: Problem, queries: Span, keys: Span, row: int, key: int) -> list[Part]:
    """Return the call of two chunks, none if it is hidden; `row` and `key` are what the ranks hold before them."""
    if queries.length == 0 or keys.length == 0:
        return []
    if queries != keys:  # at most one sequence reaches from one chunk into another
        last = min(queries, keys).stop - 1
        place = bisect_right(problem.starts, last) - 1
        sequence = Span(problem.starts[place], problem.starts[place + 1])
    else:
        sequence = Span(0, problem.total)
    rows, seen = queries.within(sequence), keys.within(sequence)
    left, right = problem.left, problem.right
    # First the queries that see a key, then the keys that these see: so neither side of the window is negative.
    if right is not None:
        rows = Span(max(rows.start, seen.start - right), rows.stop)
    if left is not None:
        rows = Span(rows.start, min(rows.stop, seen.stop + left))
        seen = Span(max(seen.start, rows.start - left), seen.stop)
    if right is not None:
        seen = Span(seen.start, min(seen.stop, rows.stop + right))
    if rows.length == 0 or seen.length == 0:
        return []
    if left is not None:
        left = None if rows.stop - 1 - left <= seen.start else left + seen.stop - rows.stop
    if right is not None:
        right = None if rows.start + right >= seen.stop - 1 else right + rows.stop - seen.stop
    row, key = row + rows.start - queries.start, key + seen.start - keys.start
    return [Part(Span(row, row + rows.length), Span(key, key + seen.length), left, right)]


def _joined(parts: Sequence[Part], by_rows: bool) -> list[Part]:
    """Join neighbours of which all is seen, into one call for more queries of the same keys, or for more keys."""
    found: list[Part] = []
    for part in parts:
        before = found[-1] if found else None
        if before is not None and before.full and part.full:
            if by_rows and before.keys == part.keys and before.rows.stop == part.rows.start:
                found[-1] = Part(Span(before.rows.start, part.rows.stop), part.keys)
                continue
            if not by_rows and before.rows == part.rows and before.keys.stop == part.keys.start:
                found[-1] = Part(part.rows, Span(before.keys.start, part.keys.stop))
                continue
        found.append(part)
    return found
