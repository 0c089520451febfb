"""Compiling before a run: each contender runs once at each problem, and a failure is told."""

from __future__ import annotations

import dataclasses

import pytest

from bench import warm
from bench.contenders import contenders, named
from bench.problem import Problem
from bench.suites import Case, Suite

PROBLEM = Problem(64, causal=True, heads=1)


def test_jobs() -> None:
    ours, eager = (named(name, "cpu") for name in ("attn_n n=1", "eager softmax_n n=1"))
    suite = Suite("some", (PROBLEM,), (), ("forward",))
    items = [
        {"contender": ours, "case": Case(suite, PROBLEM, "forward")},
        {"contender": ours, "case": Case(suite, PROBLEM, "forward")},
        {"contender": eager, "case": Case(suite, PROBLEM, "forward")},
        {"contender": ours, "suite": "host"},
        {"contender": ours, "length": 2048},
        {"contender": ours},  # the first call, which is to compile by itself
        {"contender": ours, "problem": PROBLEM},  # a test of something else
        {},
    ]
    jobs = warm.jobs(items)
    assert [(job.contender, job.backward) for job in jobs] == [(ours.name, False), (ours.name, True), (ours.name, True)]
    assert [job.problem.length for job in jobs] == [64, warm.tiny_problem().length, 2048]


def test_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    job = warm.Job("attn_n n=1", PROBLEM, True)
    assert warm.run(job) is None

    def broken(inputs: object) -> None:
        raise RuntimeError("no such kernel")

    def broken_one(name: str, device: str) -> object:
        return dataclasses.replace(named(name, device), prepare=broken)

    monkeypatch.setattr(warm, "named", broken_one)
    assert "no such kernel" in str(warm.run(job))


def test_several_processes() -> None:
    known = [each.name for each in contenders("cpu") if not each.apart]
    jobs = [warm.Job(name, PROBLEM, True) for name in known[:2]]
    assert warm.compile_all([*jobs, warm.Job("nobody", PROBLEM, True)], 2) == [f"nobody at {PROBLEM}: StopIteration:"]
