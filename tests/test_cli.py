"""`python -m attn_n`: the report, its two forms, its exit status, and a self-check that can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attn_n import __main__
from attn_n.backends import registry
from attn_n.backends.base import Backend
from attn_n.backends.reference import Reference
from attn_n.call import AttentionCall
from attn_n.doctor import report, selfcheck, text, timing
from attn_n.doctor.report import collect
from attn_n.sink import rescale

CPU = torch.device("cpu")
SMALL = {"cpu": timing.Workload(torch.float32, 1, 1, 8, (16, 32)), "cuda": timing.WORKLOADS["cuda"]}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run torch in one thread: threads that spin while they wait cost seconds where other programs run too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def only_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the backend whose kernels Triton interprets in the tests, at a thousandth of their speed."""
    others = {name: entry for name, entry in registry._entries.items() if name != "triton"}
    monkeypatch.setattr(registry, "_entries", others)


@pytest.fixture
def without_n(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the sink's rescaling by one that ignores n, as a library without n does."""
    monkeypatch.setattr(rescale, "scale_", lambda out, lse, log_n, varlen: None)


def small_report() -> report.Report:
    return collect(SMALL, seconds=0.0)


def test_the_command_prints_one_json_object(tmp_path: Path) -> None:
    """The whole command runs, also where the backend of an installed package cannot be imported."""
    package = tmp_path / "broken-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[attn_n.backends]\nbroken = a_missing_library:BACKEND\n")
    paths = [str(tmp_path), str(Path(report.__file__).parents[2])]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TRITON_INTERPRET": "0",
    }
    command = [sys.executable, "-m", "attn_n", "--json"]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert set(printed) == {"versions", "devices", "support", "checks", "timings", "passed"}
    assert printed["versions"]["torch"] == torch.__version__
    assert [device["device"] for device in printed["devices"]] == ["cpu"]
    assert printed["passed"]
    passed = {(check["backend"], check["dtype"]) for check in printed["checks"] if check["passed"]}
    assert passed >= {
        (name, dtype) for name in ("reference", "sdpa:cpu") for dtype in ("float64", "float32", "bfloat16")
    }
    timed = {timing["backend"] for timing in printed["timings"] if timing["forward_backward_ms"] > 0}
    assert timed >= {timing.PEER, "reference", "sdpa:cpu"}
    reasons = {row["backend"]: row["reasons"] for row in printed["support"]}
    assert reasons["reference"]["dropout"] == []
    assert reasons["sdpa"]["dropout"] == reasons["sdpa:cpu"]["dropout"] == ["has no dropout"]
    assert reasons["broken"]["bf16"] == ["needs a_missing_library, which is not installed"]
    assert "broken" not in {row["backend"] for row in printed["checks"] + printed["timings"]}


@pytest.mark.usefixtures("only_cpu")
def test_the_text_has_a_line_for_each_finding() -> None:
    collected = small_report()
    lines = [line.split() for line in text.text(collected).splitlines()]
    assert ["torch", torch.__version__] in lines
    for check in collected.checks:
        assert any(line[:2] == [check.backend, check.dtype] and "PASS" in line for line in lines)
    for row in collected.support:
        verdicts = ["no" if reasons else "yes" for reasons in row.reasons.values()]
        assert any(
            line[:1] == [row.backend] and [word for word in line if word in ("yes", "no")] == verdicts for line in lines
        )
    assert ["(1)", "has", "no", "dropout"] in lines
    assert "not served" not in text.text(collected)


@pytest.mark.usefixtures("only_cpu", "without_n")
def test_a_backend_that_ignores_n_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "collect", small_report)
    assert __main__.main([]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    verdicts = {(line[0], word) for line in lines for word in line if word in ("PASS", "FAIL")}
    assert ("reference", "PASS") in verdicts
    assert ("sdpa:cpu", "FAIL") in verdicts
    assert verdicts.isdisjoint({("reference", "FAIL"), ("sdpa:cpu", "PASS")})


@pytest.mark.usefixtures("without_n")
@pytest.mark.parametrize(
    "case", [case for case in selfcheck.CASES if case.n not in (0.0, 1e-3)], ids=lambda case: case.name
)
def test_each_case_sees_n(case: selfcheck.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignoring n exceeds even the loosest tolerance by far."""
    monkeypatch.setattr(selfcheck, "CASES", (case,))
    check = selfcheck.check("sdpa:cpu", CPU, torch.bfloat16)
    assert check is not None
    assert not check.passed
    assert check.error is None or check.error > 10 * check.tolerance


class Odd(Reference):
    """The reference with an error in it."""

    def __init__(self, name: str, wrong: float | None) -> None:
        self.name, self._wrong = name, wrong

    def why_not(self, call: AttentionCall) -> str | None:
        return None if call.dtype == torch.float32 else "float32 only"

    def attend(self, *arguments: object) -> tuple[Tensor, Tensor | None]:
        if self._wrong is None:
            raise RuntimeError("no kernel image\nand more about it")
        out, lse = super().attend(*arguments)  # type: ignore[arg-type]
        return out * self._wrong, lse


def _cannot_load() -> Backend:
    raise ImportError("undefined symbol: fmha_fwd")


@pytest.mark.usefixtures("only_cpu")
def test_other_peoples_backends_are_listed_with_their_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", registry._entries | {"unloadable": registry._Entry(_cannot_load)})
    odd = {"raises": None, "nan": float("nan"), "wrong": 1.001}
    for name, wrong in odd.items():
        registry.register_backend(Odd(name, wrong))
    collected = small_report()
    assert not collected.passed

    import_error = "is installed but cannot be imported: ImportError: undefined symbol: fmha_fwd"
    reasons = {row.backend: row.reasons for row in collected.support}
    assert all(refusals == [import_error] for refusals in reasons["unloadable"].values())

    checks = {check.backend: check for check in collected.checks if check.backend in odd}
    assert {check.dtype for check in checks.values()} == {"float32"}
    assert not any(check.passed for check in checks.values())
    assert checks["raises"].failure == "n = 0: RuntimeError: no kernel image\nand more about it"
    assert checks["nan"].failure == "not finite: out (n = 0)"
    assert checks["wrong"].failure is None
    assert checks["wrong"].error == pytest.approx(1e-3, rel=0.1)
    assert {row.backend for row in collected.timings}.isdisjoint(odd)
    json.dumps([check.error for check in checks.values()], allow_nan=False)

    said = text.text(collected)
    assert import_error in said
    assert "no kernel image" in said
    assert "and more about it" not in said


def test_a_backend_that_fails_only_when_timed_keeps_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry.register_backend(Odd("raises", None))
    timed = timing.measure("raises", CPU, SMALL["cpu"], 16, seconds=0.0)
    assert timed is not None
    assert timed.forward_ms is None
    assert timed.failure == "RuntimeError: no kernel image\nand more about it"
    refused = timing.Workload(torch.float64, 1, 1, 8, (16,))
    assert timing.measure("raises", CPU, refused, 16, seconds=0.0) is None
