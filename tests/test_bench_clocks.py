"""The clock of a GPU: a time counts that has nothing of the host in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.method.clocks import CudaClock


class Event:
    """Of a device that has come to it already when `late` says so."""

    late: Iterator[bool]

    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return next(self.late)


@pytest.mark.parametrize(
    ("late", "calls"), [([False], 1), ([True, True, False], 3), ([True] * CudaClock.TRIES, CudaClock.TRIES)]
)
def test_a_call_that_the_host_was_late_with_is_made_again(
    late: list[bool], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = object.__new__(CudaClock)  # its cache to flush would be on the device
    clock._l2 = torch.empty(1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(Event, "late", iter(late), raising=False)
    made: list[None] = []
    clock._queue(lambda: made.append(None))
    assert len(made) == calls
