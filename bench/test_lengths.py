"""Streams of calls whose lengths change."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.method import lengths
from bench.method.lengths import Library, Timed
from bench.workloads.streams import Stream, streams
from bench.workloads.suites import DEVICE

Asked = dict[str, list[str]]


@pytest.fixture(scope="session")
def asked(request: pytest.FixtureRequest) -> Asked:
    """Returns the streams that each library is to be timed in, after -k and the like."""
    found: Asked = {}
    for item in request.session.items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        library, stream = parameters.get("library"), parameters.get("stream")
        if library is not None and stream is not None and lengths.why_absent(library, stream) is None:
            found.setdefault(library.name, []).append(stream.name)
    return found


@pytest.fixture(scope="session")
def wrong(asked: Asked) -> dict[str, dict[str, str | None]]:
    """Checks all libraries before the first is timed; by library and stream, the reason why it cannot be timed."""
    return lengths.prepare_all(asked)


@pytest.fixture(scope="session")
def timed(asked: Asked, wrong: dict[str, dict[str, str | None]]) -> dict[str, dict[str, Timed]]:
    """Times all that is right, before the first result is shown."""
    return lengths.time_all(
        {library: [name for name in names if wrong[library][name] is None] for library, names in asked.items()}
    )


@pytest.mark.parametrize("stream", streams(DEVICE), ids=str)
@pytest.mark.parametrize("library", lengths.libraries(DEVICE), ids=repr)
def test_lengths(
    library: Library,
    stream: Stream,
    pytestconfig: pytest.Config,
    request: pytest.FixtureRequest,
    keep: Callable[..., None],
) -> None:
    if pytestconfig.getoption("quick"):
        pytest.skip("--quick leaves out new processes")
    reason = lengths.why_absent(library, stream)
    if reason is not None:
        _keep(keep, library, stream, Timed("absent", reason))
        pytest.skip(f"{library.name}: {reason}")
    wrong: dict[str, dict[str, str | None]] = request.getfixturevalue("wrong")
    timed: dict[str, dict[str, Timed]] = request.getfixturevalue("timed")
    reason = wrong[library.name][stream.name]
    _keep(keep, library, stream, Timed("wrong", reason) if reason is not None else timed[library.name][stream.name])
    if reason is not None:
        pytest.fail(f"{library.name}: {reason}", pytrace=False)


def _keep(keep: Callable[..., None], library: Library, stream: Stream, found: Timed) -> None:
    keep(*lengths.points(library, stream, found))
