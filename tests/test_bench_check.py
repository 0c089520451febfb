"""The check lets the right ones pass and catches the errors that other libraries make."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.contenders import contenders, named
from bench.contenders.base import Contender, Passes
from bench.method.check import what_is_wrong
from bench.method.prepared import prepare_all
from bench.workloads import Workload, make_inputs
from bench.workloads.suites import Case

WORKLOADS = [
    Workload(length, causal, heads=2, dtype=dtype)
    for length in (64, 1024)
    for causal in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
]
# What the check must split in its own way: groups of heads, a window, sequences, few queries, a mask, some rows.
SHAPES = [
    Workload(96, True, heads=4, heads_kv=2),
    Workload(96, True, heads=2, window=10),
    Workload(90, True, heads=2, sequences=(20, 40, 30)),
    Workload(4, heads=2, keys=300, batch=3),
    Workload(40, heads=2, keys=64, mask="bool"),
]
OURS = named("attn_n n=1", "cpu")
PER_HEAD = named("attn_n n=per head", "cpu")


def reason(contender: Contender, workload: Workload) -> str | None:
    inputs = make_inputs(workload)
    return what_is_wrong(contender.prepare(inputs), contender.n, inputs)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: f"{workload}-{workload.dtype}")
@pytest.mark.parametrize("contender", contenders("cpu"), ids=str)
def test_right_ones_pass(contender: Contender, workload: Workload) -> None:
    absent = contender.why_not(workload)
    if absent is not None or "backward" not in contender.measures:
        pytest.skip(f"{contender.name}: {absent or 'has no backward'}")
    assert reason(contender, workload) is None


SOME_ROWS = {"_ALL_HEADS_UP_TO": 1, "_ALL_ROWS_UP_TO": 1, "_SOME_ROWS": 16}
HEADS_IN_TURN = {"_LOGITS_AT_ONCE": 1}


@pytest.mark.parametrize("limits", [{}, SOME_ROWS, HEADS_IN_TURN], ids=["all at once", "some rows", "heads in turn"])
@pytest.mark.parametrize("workload", SHAPES, ids=str)
def test_shapes(workload: Workload, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(f"bench.method.check.{name}", value)
    monkeypatch.setattr("bench.method.check._reference", _uncached())
    assert reason(OURS, workload) is None
    assert reason(PER_HEAD, workload) is None
    ignored = reason(_without_n(OURS), workload)
    assert ignored is not None
    assert "out by" in ignored


def _uncached() -> object:
    from bench.method import check

    return check._reference.__wrapped__


def _without_n(contender: Contender) -> Contender:
    """The case "n ignored": it computes n = 0 and says that it is n = 1."""
    plain = named(contender.name.replace("n=1", "n=0"), "cpu")
    return dataclasses.replace(plain, name="ignores n", n="1")


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: f"{workload}-{workload.dtype}")
def test_n_ignored(workload: Workload) -> None:
    said = reason(_without_n(OURS), workload)
    assert said is not None
    assert all(f"{result} by" in said for result in ("out", "dq", "dk", "dv"))


def test_n_ignored_in_the_gradients_alone() -> None:
    inputs = make_inputs(WORKLOADS[0])
    with_n, without_n = OURS.prepare(inputs), _without_n(OURS).prepare(inputs)
    mixed = Passes(with_n.forward, lambda out: without_n.backward(without_n.forward()))
    said = what_is_wrong(mixed, "1", inputs)
    assert said is not None
    assert "dq by" in said
    assert "out by" not in said


def test_a_wrong_one_and_one_that_raises_are_not_timed() -> None:
    def broken(inputs: object) -> Passes:
        raise RuntimeError("no kernel image")

    raises = Contender("raises", "1", broken)
    case = Case("planted", WORKLOADS[0], "forward", True)
    found = prepare_all(case.workload, case.training, (_without_n(OURS), raises, OURS))
    assert [each.status for each in found] == ["wrong", "wrong", "measured"]
    assert "no kernel image" in str(found[1].reason)
    assert found[0].run("forward") is None
    point = found[0].point(case, ())
    assert point.status == "wrong"
    assert "out by" in str(point.reason)


@pytest.mark.parametrize(("training", "told"), [(False, "without gradients"), (True, "with gradients")])
def test_the_backend_is_that_of_the_pass_that_is_timed(training: bool, told: str) -> None:
    contender = dataclasses.replace(
        OURS, backend=lambda workload, gradients: f"with{'' if gradients else 'out'} gradients"
    )
    (prepared,) = prepare_all(WORKLOADS[0], training, (contender,))
    assert prepared.backend == told
