"""The layout of tokens and the parts of a ring, without processes."""

from __future__ import annotations

import random

import pytest
import torch

from attn_n.distributed.layout import chunks_of, length_of
from attn_n.distributed.schedule import Problem, keys_needed, parts


def positions(total: int, ranks: int, rank: int) -> list[int]:
    return [token for span in chunks_of(total, ranks, rank) for token in range(*span)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_each_token_has_one_rank_and_numbers_differ_by_one(ranks: int) -> None:
    for total in range(40):
        held = [positions(total, ranks, rank) for rank in range(ranks)]
        assert sorted(token for tokens in held for token in tokens) == list(range(total))
        assert [len(tokens) for tokens in held] == [length_of(total, ranks, rank) for rank in range(ranks)]
        assert max(map(len, held)) - min(map(len, held)) <= 1
        assert all(tokens == sorted(tokens) for tokens in held)


def seen_by(problem: Problem, rank: int, source: int) -> torch.Tensor:
    """Count how often each pair of a query of `rank` and a key of `source` is computed."""
    held = [positions(problem.total, problem.ranks, of) for of in (rank, source)]
    count = torch.zeros(*map(len, held), dtype=torch.int64)
    for part in parts(problem, rank, source):
        assert (part.left or 0) >= 0
        assert (part.right or 0) >= 0
        needed = keys_needed(problem, rank, source)
        assert needed.start <= part.keys.start
        assert part.keys.stop <= needed.stop
        spans = [(part.rows, part.keys)]
        if part.starts is not None:
            assert part.rows == part.keys == (0, len(held[0]))
            spans = [((a, b), (a, b)) for a, b in zip(part.starts, part.starts[1:], strict=False)]
        for rows, keys in spans:
            p = torch.arange(rows[1] - rows[0])[:, None] + (keys[1] - keys[0]) - (rows[1] - rows[0])
            j = torch.arange(keys[1] - keys[0])[None]
            sees = torch.ones(len(p), j.shape[1], dtype=torch.bool)
            if part.left is not None:
                sees &= j >= p - part.left
            if part.right is not None:
                sees &= j <= p + part.right
            assert sees.any(1).all()  # kernels get no rows without keys
            count[rows[0] : rows[1], keys[0] : keys[1]] += sees
    return count


def test_every_visible_pair_is_computed_once() -> None:
    chance = random.Random(1)
    for _ in range(150):
        ranks, varlen = chance.choice([1, 2, 3, 4]), chance.random() < 0.5
        lengths = [chance.choice([0, 1, 2, 5, 9, 20]) for _ in range(chance.randint(1, 5))] if varlen else None
        starts = [0, chance.randint(0, 40)] if lengths is None else [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        sides = [chance.choice([None, 0, 1, 3, 8, 30]) for _ in "lr"]
        problem = Problem(tuple(starts), varlen, ranks, *sides)
        sequence = torch.repeat_interleave(torch.tensor(starts).diff())
        p = torch.arange(problem.total)
        visible = sequence[:, None] == sequence[None]
        if sides[0] is not None:
            visible &= p[None] >= p[:, None] - sides[0]
        if sides[1] is not None:
            visible &= p[None] <= p[:, None] + sides[1]
        for rank in range(ranks):
            for source in range(ranks):
                of_q, of_k = (torch.tensor(positions(problem.total, ranks, of)).long() for of in (rank, source))
                assert torch.equal(seen_by(problem, rank, source), visible[of_q][:, of_k].long()), (problem, rank)


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_a_causal_mask_gives_each_rank_as_much_work(ranks: int) -> None:
    problem = Problem((0, 1000), False, ranks, None, 0)
    pairs = [sum(int(seen_by(problem, rank, source).sum()) for source in range(ranks)) for rank in range(ranks)]
    assert max(pairs) <= 1.02 * min(pairs)


def test_the_calls_of_a_causal_ring() -> None:
    """One call a step: half of the keys from a rank before, all keys for half of the queries from one behind."""
    problem = Problem((0, 32), False, 4, None, 0)
    assert parts(problem, 1, 1) == (((0, 8), (0, 8), None, 0, None),)
    assert parts(problem, 2, 1) == (((0, 8), (0, 4), None, None, None),)
    assert parts(problem, 1, 2) == (((4, 8), (0, 8), None, None, None),)


def test_a_window_sends_nothing_to_ranks_that_do_not_see_it() -> None:
    problem = Problem((0, 800), False, 4, 30, 0)
    needed = {(rank, source): keys_needed(problem, rank, source).length for rank in range(4) for source in range(4)}
    assert needed[0, 2] == needed[2, 0] == needed[0, 3] == 0
    assert needed[1, 0] == needed[0, 1] == 30
