"""Compiling before a run: each contender runs once at each problem, and a failure is told."""

from __future__ import annotations

import dataclasses

import pytest

from bench import warm
from bench.contenders import contenders

pytestmark = pytest.mark.skipif(warm.DEVICE != "cpu", reason="the problems of a GPU take longer")


def test_jobs() -> None:
    jobs = warm._jobs()
    assert len({job.case for job in jobs}) == len(warm._cases()) == 10
    assert {job.contender for job in jobs} >= {"attn_n n=1", "torch sdpa n=0"}
    assert not any("eager" in job.contender for job in jobs)


def test_quick_jobs() -> None:
    jobs = warm._jobs(quick=True)
    assert {job.case for job in jobs} < set(warm._cases())
    assert {job.contender for job in jobs} >= {"attn_n n=1", "torch sdpa n=0"}
    assert not any("per head" in job.contender for job in jobs)


def test_words_that_nothing_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        warm.main(["decode", "window"])
    assert "all of the words 'decode window'" in capsys.readouterr().err


def test_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    job = warm.Job("grid-forward-E64-L512-causal", "attn_n n=1")
    assert warm._run(job) is None

    def broken(inputs: object) -> None:
        raise RuntimeError("no such kernel")

    known = [dataclasses.replace(each, prepare=broken) for each in contenders("cpu")]
    monkeypatch.setattr(warm, "contenders", lambda device: known)
    assert "no such kernel" in str(warm._run(job))
