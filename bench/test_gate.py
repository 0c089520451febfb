"""The gate lets the right ones pass and catches the errors that other libraries make."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.contenders import CPU, EAGER, SDPA, Contender, Passes, by_autograd
from bench.gate import what_is_wrong
from bench.problem import Inputs, Problem, make_inputs

PROBLEMS = [
    Problem(length, causal, heads=2, dtype=dtype)
    for length in (64, 1024)
    for causal in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
]
IDS = [f"{problem}-{problem.dtype}" for problem in PROBLEMS]


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
@pytest.mark.parametrize("contender", CPU, ids=str)
def test_right_ones_pass(contender: Contender, problem: Problem) -> None:
    assert what_is_wrong(contender, make_inputs(problem), problem) is None


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_n_ignored(problem: Problem) -> None:
    ignores_n = dataclasses.replace(SDPA, name="ignores n", n=1.0)
    reason = what_is_wrong(ignores_n, make_inputs(problem), problem)
    assert reason is not None
    assert all(f"{result} by" in reason for result in ("out", "dq", "dk", "dv"))


def test_n_ignored_in_the_gradients_alone() -> None:
    def prepare(inputs: Inputs, n: float) -> Passes:
        with_n, without_n = EAGER.prepare(inputs, n), EAGER.prepare(inputs, 0.0)
        return Passes(with_n.forward, lambda out: without_n.backward(without_n.forward()))

    problem = PROBLEMS[0]
    reason = what_is_wrong(Contender("ignores n backward", 1.0, prepare), make_inputs(problem), problem)
    assert reason is not None
    assert "dq by" in reason
    assert "out by" not in reason


def test_a_contender_that_raises_is_reported() -> None:
    def attend(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    problem = PROBLEMS[0]
    reason = what_is_wrong(Contender("raises", 1.0, by_autograd(attend)), make_inputs(problem), problem)
    assert reason is not None
    assert "no kernel image" in reason
