"""Streams of calls whose lengths change."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.method import lengths
from bench.method.lengths import Party, Stream, Timed
from bench.workloads.suites import DEVICE

Asked = dict[str, list[str]]


@pytest.fixture(scope="session")
def asked(request: pytest.FixtureRequest) -> Asked:
    """The streams that each party is to be timed in, after -k and the like."""
    found: Asked = {}
    for item in request.session.items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        party, stream = parameters.get("party"), parameters.get("stream")
        if party is not None and stream is not None and lengths.why_absent(party, stream) is None:
            found.setdefault(party.name, []).append(stream.name)
    return found


@pytest.fixture(scope="session")
def wrong(asked: Asked) -> dict[str, dict[str, str | None]]:
    """By party and stream, why it cannot be timed; asked of all before the first is timed."""
    return lengths.prepare_all(asked)


@pytest.fixture(scope="session")
def timed(asked: Asked, wrong: dict[str, dict[str, str | None]]) -> dict[str, dict[str, Timed]]:
    """All that is right, before the first is shown."""
    return lengths.time_all(
        {party: [name for name in names if wrong[party][name] is None] for party, names in asked.items()}
    )


@pytest.mark.parametrize("stream", lengths.streams(DEVICE), ids=str)
@pytest.mark.parametrize("party", lengths.parties(DEVICE), ids=repr)
def test_lengths(
    party: Party,
    stream: Stream,
    pytestconfig: pytest.Config,
    request: pytest.FixtureRequest,
    keep: Callable[..., None],
) -> None:
    if pytestconfig.getoption("quick"):
        pytest.skip("--quick leaves out new processes")
    reason = lengths.why_absent(party, stream)
    if reason is not None:
        _keep(keep, party, stream, Timed("absent", reason))
        pytest.skip(f"{party.name}: {reason}")
    wrong: dict[str, dict[str, str | None]] = request.getfixturevalue("wrong")
    timed: dict[str, dict[str, Timed]] = request.getfixturevalue("timed")
    reason = wrong[party.name][stream.name]
    _keep(keep, party, stream, Timed("wrong", reason) if reason is not None else timed[party.name][stream.name])
    if reason is not None:
        pytest.fail(f"{party.name}: {reason}", pytrace=False)


def _keep(keep: Callable[..., None], party: Party, stream: Stream, found: Timed) -> None:
    keep(*lengths.points(party, stream, found))
