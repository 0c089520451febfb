"""`python -m attn_n`: the report, its forms and extents, its exit status, and a self-check that can fail."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attn_n import __main__
from attn_n.backends import registry
from attn_n.backends.base import Backend
from attn_n.backends.reference import Reference
from attn_n.call import AttentionCall
from attn_n.doctor import report, selfcheck, text, timing, warm_up
from attn_n.doctor.progress import Progress
from attn_n.doctor.report import Device, Extent
from attn_n.sink import rescale

CPU = torch.device("cpu")
WORKLOADS = {"cpu": timing.Workload(torch.float32, 1, 1, 8, (16, 32)), "cuda": timing.WORKLOADS["cuda"]}
SMALL = Extent(selfcheck.CASES[:3], workloads=WORKLOADS, seconds=0.0)


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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(extent: Extent) -> tuple[report.Report, str]:
    """Return a report, and all of its sections as text."""
    found = report.Report()
    return found, "\n\n".join([text.section(found, each) for each in report.steps(found, extent, Progress())])


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
    assert "see no key" not in result.stderr  # what a case is made for
    assert "checking" not in result.stderr  # no progress where there is no terminal
    found = json.loads(result.stdout)
    assert set(found) == {"versions", "devices", "support", "checks", "timings", "left_out", "passed"}
    assert found["versions"]["torch"] == torch.__version__
    assert [device["device"] for device in found["devices"]] == ["cpu"]
    assert found["passed"]
    assert found["left_out"] == ["8 of the 11 cases of the self-check: --full checks them all"]
    assert {(check["served"], check["cases"]) for check in found["checks"]} == {(3, 3)}
    passed = {(check["backend"], check["dtype"]) for check in found["checks"] if check["passed"]}
    assert passed >= {
        (name, dtype) for name in ("reference", "sdpa:cpu") for dtype in ("float64", "float32", "bfloat16")
    }
    timed = {timing["backend"] for timing in found["timings"] if timing["forward_backward_ms"] > 0}
    assert timed >= {timing.PEER, "reference", "sdpa:cpu"}
    reasons = {row["backend"]: row["reasons"] for row in found["support"]}
    assert reasons["reference"]["dropout"] == []
    assert reasons["sdpa"]["dropout"] == reasons["sdpa:cpu"]["dropout"] == ["has no dropout"]
    assert reasons["broken"]["bf16"] == ["needs a_missing_library, which is not installed"]
    assert "broken" not in {row["backend"] for row in found["checks"] + found["timings"]}


@pytest.mark.usefixtures("only_cpu")
def test_the_text_has_a_line_for_each_finding() -> None:
    collected, said = printed(SMALL)
    lines = [line.split() for line in said.splitlines()]
    assert ["torch", torch.__version__] in lines
    for check in collected.checks:
        assert any(line[:2] == [check.backend, check.dtype] and "PASS" in line for line in lines)
    for row in collected.support:
        verdicts = ["no" if reasons else "yes" for reasons in row.reasons.values()]
        assert any(
            line[:1] == [row.backend] and [word for word in line if word in ("yes", "no")] == verdicts for line in lines
        )
    assert ["(1)", "has", "no", "dropout"] in lines
    assert "not served" not in said


@pytest.mark.usefixtures("only_cpu", "without_n")
def test_a_backend_that_ignores_n_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "USUAL", SMALL)
    assert __main__.main([]) == 1
    said = capsys.readouterr().out
    assert "FAIL: sdpa:cpu in bfloat16 on cpu" in said
    assert "PASS: " not in said
    lines = [line.split() for line in said.splitlines()]
    verdicts = {(line[0], word) for line in lines for word in line if word in ("PASS", "FAIL")}
    assert ("reference", "PASS") in verdicts
    assert ("sdpa:cpu", "FAIL") in verdicts
    assert verdicts.isdisjoint({("reference", "FAIL"), ("sdpa:cpu", "PASS")})


@pytest.mark.usefixtures("without_n")
@pytest.mark.parametrize(
    "case", [case for case in selfcheck.CASES if case.n not in (0.0, 1e-3)], ids=lambda case: case.name
)
def test_each_case_sees_n(case: selfcheck.Case) -> None:
    """Ignoring n exceeds even the loosest tolerance by far."""
    check = selfcheck.check("sdpa:cpu", CPU, torch.bfloat16, [case])
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
    collected, said = printed(replace(SMALL, cases=selfcheck.CASES))
    assert not collected.passed
    assert collected.left_out == []

    import_error = "is installed but cannot be imported: ImportError: undefined symbol: fmha_fwd"
    reasons = {row.backend: row.reasons for row in collected.support}
    assert all(refusals == [import_error] for refusals in reasons["unloadable"].values())

    checks = {check.backend: check for check in collected.checks if check.backend in odd}
    assert {check.dtype for check in checks.values()} == {"float32"}
    assert not any(check.passed for check in checks.values())
    assert checks["raises"].failure == "lse, causal, more queries: RuntimeError: no kernel image\nand more about it"
    assert checks["nan"].failure == "not finite: out (lse, causal, more queries)"
    assert checks["wrong"].failure is None
    assert checks["wrong"].error == pytest.approx(1e-3, rel=0.1)
    assert {row.backend for row in collected.timings}.isdisjoint(odd)
    json.dumps([check.error for check in checks.values()], allow_nan=False)

    assert import_error in said
    assert "no kernel image" in said
    assert "and more about it" not in said


def test_a_backend_that_fails_only_when_timed_keeps_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry.register_backend(Odd("raises", None))
    timed = timing.measure("raises", CPU, WORKLOADS["cpu"], 16, seconds=0.0)
    assert timed is not None
    assert timed.forward_ms is None
    assert timed.failure == "RuntimeError: no kernel image\nand more about it"
    refused = timing.Workload(torch.float64, 1, 1, 8, (16,))
    assert timing.measure("raises", CPU, refused, 16, seconds=0.0) is None


@pytest.mark.usefixtures("only_cpu")
def test_quick_and_full() -> None:
    found, said = printed(replace(SMALL, cases=report.QUICK.cases, timed=report.QUICK.timed))
    assert found.passed
    assert found.timings == []
    assert found.left_out == [
        "10 of the 11 cases of the self-check: --full checks them all", "the timings: without --quick they are made",
    ]  # fmt: skip
    assert all(f"left out: {each}" in said for each in found.left_out)
    assert report.FULL.cases == selfcheck.CASES
    # The cases of the other extents have n a head, a number, a causal mask, rows without keys, and gradients of lse.
    assert isinstance(report.QUICK.cases[0].n, tuple)
    assert report.QUICK.cases[0].causal
    assert report.QUICK.cases[0].return_lse
    assert report.QUICK.cases[0].len_q > report.QUICK.cases[0].len_k
    assert {(case.causal, type(case.n)) for case in report.USUAL.cases} == {(True, tuple), (False, float)}


def test_gpus_of_the_same_name_are_timed_once() -> None:
    gpus = [Device("cpu", "c"), *(Device(f"cuda:{i}", name) for i, name in enumerate(("a", "b", "a")))]
    assert report._timed(gpus, report.USUAL) == gpus[:3]
    assert report._timed(gpus, report.FULL) == gpus
    assert report._timed(gpus, report.QUICK) == []
    assert report._left_out(gpus, report.USUAL)[1].startswith("timings on GPUs that are the same as others, cuda:2: ")
    assert report._left_out(gpus, report.FULL) == []


@pytest.mark.usefixtures("only_cpu")
def test_what_is_installed_is_printed_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a GPU is touched, and each section before the next one is made."""
    said: list[str] = []

    def spied(of: object, name: str) -> None:
        function = getattr(of, name)

        def spy(*arguments: object) -> object:
            said.append(capsys.readouterr().out)
            return function(*arguments)

        monkeypatch.setattr(of, name, spy)

    monkeypatch.setattr(report, "USUAL", SMALL)
    spied(report, "devices")
    spied(report, "_support")
    spied(timing, "measure")
    assert __main__.main([]) == 0
    assert said[0].startswith("versions\n")
    assert said[1].startswith("devices\n")
    assert "self-check" in said[2]
    assert "\x1b" not in "".join(said)


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
@pytest.mark.usefixtures("only_cpu")
def test_colour_and_progress_on_a_terminal(no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "USUAL", SMALL)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert __main__.main([]) == 0
    assert ("\x1b[32mPASS\x1b[0m" in out.getvalue()) == coloured
    assert ("\x1b" in out.getvalue()) == coloured
    shown = err.getvalue().split("\r\x1b[K")
    assert "[........................] 0 of 16  checking sdpa:cpu on cpu" in shown
    assert shown[-1] == ""  # nothing stays
    monkeypatch.setenv("TERM", "dumb")
    written = Terminal()
    Progress(written).show(1, 2, "checking")
    assert written.getvalue() == ""


@pytest.mark.usefixtures("only_cpu")
def test_no_progress_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(io.StringIO()).show(1, 2, "checking")
    Progress(sys.stderr).show(1, 2, "checking")
    assert capsys.readouterr().err == ""


def portable_calls() -> list[tuple[str, functools.partial[dict[str, Tensor]]]]:
    """Three calls, two of which need the same kernels."""
    cases = selfcheck.Case("", 1.0), selfcheck.Case("", 2.0), selfcheck.Case("", selfcheck.PER_HEAD)
    return [
        ("", functools.partial(selfcheck.run, case, "triton:portable", CPU, torch.float32)) for case in cases
    ]  # fmt: skip


def test_kernels_are_compiled_and_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all calls before any is launched, each kernel once; what fails is left to the call."""
    launcher = pytest.importorskip("attn_n.launcher")
    monkeypatch.undo()  # the fixture that leaves out `triton`
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    compiled: list[str] = []

    def compile_only(self: object, *arguments: object) -> None:
        compiled.append(self._kernel.fn.__name__)  # type: ignore[attr-defined]
        raise RuntimeError("out of memory")

    monkeypatch.setattr(launcher.Launch, "compiled", compile_only)
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    warm_up.compile_kernels([*portable_calls(), ("", functools.partial(int, "fails"))], Progress(terminal))
    assert sorted(compiled) == sorted(2 * ["forward_kernel"] + 2 * ["dq_kernel"] + ["dkdv_kernel"])
    assert "4 of 5  compiling kernels" in terminal.getvalue()
    check = selfcheck.check("triton:portable", CPU, torch.float32, selfcheck.CASES[1:2])
    assert check is not None
    assert check.passed
    assert len(compiled) == 5


def test_nothing_is_launched_in_the_meantime() -> None:
    launcher = pytest.importorskip("attn_n.launcher")
    launched: list[object] = []

    class Kernel:
        arg_names: tuple[str, ...] = ()

        def __getitem__(self, grid: object) -> object:
            return lambda *arguments, **constants: launched.append(arguments)

        def warmup(self, *arguments: object, **constants: object) -> SimpleNamespace:
            return SimpleNamespace(run="loaded")

    launch, x = launcher.Launch(Kernel(), 1, CPU, (), {}, {}, descriptors=False), torch.zeros(4)
    with ThreadPoolExecutor(1) as pool, launcher.compiling_only(pool) as compilations:
        launch(x)
        launch(x)
        assert [future.result() for future in compilations.futures] == ["loaded"]
        assert launched == []
    launch(x)
    assert len(launched) == 1


@pytest.mark.gpu
def test_nothing_is_compiled_by_the_checks(tmp_path: Path) -> None:
    """With empty caches the kernels of the usual checks are compiled before, and none is left for the checks."""
    script = """
import functools, torch, triton
from attn_n.doctor import report, selfcheck, warm_up
from attn_n.doctor.progress import Progress
compiled = []
triton.knobs.compilation.listener = lambda **of: None if of["cache_hit"] else compiled.append(of["src"].name)
gpu = report.devices()[1]
pairs = [(b, d) for b in report._kernels(gpu) if b.startswith("triton") for d in (torch.float32, torch.bfloat16)]
warm_up.compile_kernels(list(report._calls_checked(gpu, report.USUAL, pairs)), Progress())
before = len(compiled)
checks = [selfcheck.check(b, torch.device("cuda:0"), d, report.USUAL.cases) for b, d in pairs]
assert all(check is None or check.passed for check in checks), checks
print(before, len(compiled))
"""
    settings = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(report.__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    before, after = map(int, result.stdout.split())
    assert before == after > 10


@pytest.mark.gpu
def test_the_command_on_a_gpu_with_empty_caches(tmp_path: Path) -> None:
    settings = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(report.__file__).parents[2])}
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "attn_n", "--json"], env=os.environ | settings, capture_output=True, check=False
    )
    seconds = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    assert seconds < 60  # 40 where nothing else runs, and FlashAttention 4 is not there, which compiles one by one
    passed = {re.sub(":.*", "", check["backend"]) for check in json.loads(result.stdout)["checks"]}
    assert passed >= {"triton", "sdpa", "reference"}
