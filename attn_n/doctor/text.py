"""A report as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attn_n.doctor.report import Device, Report, Section
from attn_n.doctor.timing import Timing


def section(report: Report, of: Section) -> str:
    """Return a section of the report, a title and lines."""
    device = of.device or ""
    title, lines = {
        "versions": ("versions", _versions),
        "devices": ("devices", _devices),
        "support": (f"{device}: what each backend serves", _support),
        "checks": (f"{device}: self-check, worst relative error against float64", _checks),
        "timings": (f"{device}: timing, median milliseconds", _timings),
        "left_out": ("result", _result),
    }[of.field]
    return "\n".join([title, *(f"  {line}" for line in lines(report, device))])


def _versions(report: Report, device: str) -> Iterator[str]:
    return _table([[name, version or "not installed"] for name, version in report.versions.items()])


def _devices(report: Report, device: str) -> Iterator[str]:
    return _table([[each.device, each.name, _size(each)] for each in report.devices])


def _size(device: Device) -> str:
    if device.capability is None or device.memory_bytes is None:
        return f"{device.threads} threads"
    return f"compute capability {device.capability[0]}.{device.capability[1]}, {device.memory_bytes / 2**30:.1f} GiB"


def _support(report: Report, device: str) -> Iterator[str]:
    rows = [row for row in report.support if row.device == device]
    numbers: dict[str, int] = {}
    cells = []
    for row in rows:
        verdicts = []
        for reasons in row.reasons.values():
            cited = [numbers.setdefault(reason, len(numbers) + 1) for reason in reasons]
            verdicts.append(f"no ({', '.join(map(str, cited))})" if cited else "yes")
        cells.append([row.backend, "" if row.rank is None else str(row.rank), *verdicts])
    yield from _table([["backend", "automatic", *rows[0].reasons], *cells])
    for reason, number in numbers.items():
        yield f"({number}) {_first_line(reason)}"


def _checks(report: Report, device: str) -> Iterator[str]:
    rows = []
    for check in report.checks:
        if check.device == device:
            error = "" if check.error is None else f"{check.error:.1e}"
            served = f"{check.served} of {check.cases}"
            verdict, detail = "PASS" if check.passed else "FAIL", _first_line(check.failure or check.where or "")
            rows.append([check.backend, check.dtype, served, error, f"{check.tolerance:.0e}", verdict, detail])
    return _table([["backend", "dtype", "cases", "error", "allowed", "", "where"], *rows])


def _timings(report: Report, device: str) -> Iterator[str]:
    timings = {(timing.backend, timing.length): timing for timing in report.timings if timing.device == device}
    lengths = sorted({length for _, length in timings})
    rows = []
    for backend in dict.fromkeys(backend for backend, _ in timings):
        rows.append([backend, *(cell for length in lengths for cell in _milliseconds(timings.get((backend, length))))])
    yield from dict.fromkeys(timing.workload for timing in timings.values())
    yield from _table(
        [
            ["length", *(cell for length in lengths for cell in (str(length), ""))],
            ["", *["forward", "with backward"] * len(lengths)],
            *rows,
        ]
    )
    for timing in timings.values():
        if timing.failure is not None:
            yield f"{timing.backend} at {timing.length}: {_first_line(timing.failure)}"


def _result(report: Report, device: str) -> Iterator[str]:
    failed = [check for check in report.checks if not check.passed]
    for check in failed:
        yield f"FAIL: {check.backend} in {check.dtype} on {check.device}"
    if not failed:
        yield f"PASS: each backend in each dtype that it serves, {len(report.checks)} checks"
    yield from (f"left out: {each}" for each in report.left_out)


def _milliseconds(timing: Timing | None) -> tuple[str, str]:
    if timing is None:
        return "not served", "not served"
    if timing.forward_ms is None or timing.forward_backward_ms is None:
        return "failed", "failed"
    return f"{timing.forward_ms:.3g}", f"{timing.forward_backward_ms:.3g}"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
