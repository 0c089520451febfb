"""What --quick leaves out."""

from __future__ import annotations

from bench.contenders import contenders
from bench.workloads.suites import DEVICE, cases, memory_lengths


def test_fewer_workloads() -> None:
    assert {str(case) for case in cases(quick=True)} < {str(case) for case in cases(quick=False)}
    assert memory_lengths(quick=True) == memory_lengths(quick=False)[:1]


def test_no_learned_sinks() -> None:
    names = {contender.name for contender in contenders(DEVICE, quick=True)}
    assert names >= {"attn_n n=1"}
    assert not any("per head" in name for name in names)
