"""Compiling before a run: each contender runs once at each workload, and a failure is told."""

from __future__ import annotations

import dataclasses

import pytest

from bench.contenders import contenders, named
from bench.method import precompile
from bench.workloads import Workload
from bench.workloads.suites import Case

WORKLOAD = Workload(64, causal=True, heads=1)


def test_jobs() -> None:
    ours, eager = (named(name, "cpu") for name in ("attn_n n=1", "eager softmax_n n=1"))
    items = [
        {"contender": ours, "case": Case("some", WORKLOAD, "forward", False)},
        {"contender": ours, "case": Case("some", WORKLOAD, "forward", False)},
        {"contender": eager, "case": Case("some", WORKLOAD, "forward", False)},
        {"contender": ours, "length": 2048},
        {"contender": ours},  # the first call, which is to compile by itself
        {"contender": ours, "workload": WORKLOAD},  # a test of something else
        {},
    ]
    jobs = precompile.jobs(items)
    assert [(job.contender, job.backward) for job in jobs] == [(ours.name, False), (ours.name, True)]
    assert [job.workload.length for job in jobs] == [64, 2048]


def test_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    job = precompile.Job("attn_n n=1", WORKLOAD, True)
    assert precompile.run(job) is None

    def broken(inputs: object) -> None:
        raise RuntimeError("no such kernel")

    def broken_one(name: str, device: str) -> object:
        return dataclasses.replace(named(name, device), prepare=broken)

    monkeypatch.setattr(precompile, "named", broken_one)
    assert "no such kernel" in str(precompile.run(job))


def test_several_processes() -> None:
    known = [each.name for each in contenders("cpu") if not each.apart]
    jobs = [precompile.Job(name, WORKLOAD, True) for name in known[:2]]
    assert precompile.compile_all([*jobs, precompile.Job("nobody", WORKLOAD, True)], 2) == [
        f"nobody at {WORKLOAD}: StopIteration:"
    ]
