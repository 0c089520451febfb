"""The suite of the host's time: every kind of call is right, and PyTorch's SDPA is measured beside it."""

from __future__ import annotations

import pytest

from bench.contenders import for_call, named
from bench.method import interleaved
from bench.method.clocks import HostClock
from bench.method.prepared import Prepared, prepare_all
from bench.workloads.calls import Call, calls

CALLS = calls("cpu")


def prepared(call: Call) -> dict[str, Prepared]:
    return {each.contender.name: each for each in prepare_all(call.workload, call.training, for_call(call))}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_ours_is_right_and_torch_is_beside_it(call: Call) -> None:
    found = prepared(call)
    wrong = {name: each.reason for name, each in found.items() if each.status == "wrong"}
    assert wrong == {}
    timed = {name for name, each in found.items() if each.run(call.measure) is not None}
    assert f"attn_n n={call.n}" in timed
    torchs = {name for name in timed if name.startswith("torch sdpa")}
    assert torchs if "varlen" not in call.suite else not torchs
    masked = any(kind in call.suite for kind in ("sinks", "mask"))
    assert torchs <= ({"torch sdpa mask n=0"} if masked else {"torch sdpa n=0"})


def test_the_gpu_has_the_same_kinds_of_call_and_our_kernels_by_name() -> None:
    on_gpu = calls("cuda")
    assert [call.suite for call in on_gpu] == [call.suite for call in CALLS]
    for call in on_gpu:
        names = {contender.name for contender in for_call(call)}
        assert names >= {f"attn_n {name}n={call.n}" for name in ("", "triton:hopper ", "triton:portable ", "sdpa ")}


def test_other_processes_know_the_contenders() -> None:
    for call in CALLS:
        for contender in for_call(call):
            assert named(contender.name, "cpu").name == contender.name


def test_a_point_holds_the_host_time(ran: list[str]) -> None:
    call = next(call for call in CALLS if call.suite == "host: sinks, both passes")
    ours = prepared(call)["attn_n n=per head"]
    run = ours.run(call.measure)
    assert run is not None
    ran.clear()
    (values,) = interleaved.measure({"ours": run}, HostClock()).values()
    assert len(values) == HostClock.ROUNDS * HostClock.CALLS
    assert ran == ["forward sdpa:cpu", "backward sdpa:cpu"] * HostClock.ROUNDS * (HostClock.CALLS + 1)
    point = ours.point(call, tuple(values))
    assert (point.suite, point.measure, point.flops) == (call.suite, "host", None)
    assert 0 < point.median < 1
