"""The first call and the profiled call, each of which has a process of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.contenders import named
from bench.kernels import profile_one
from bench.method import first_call


def test_a_first_call_finds_nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton, PyTorch's compiler and FlashAttention 4 keep what they compile, and the shell may say where."""
    caches = [f"{name}_CACHE_DIR" for name in ("TRITON", "TORCHINDUCTOR", "FLASH_ATTENTION_CUTE_DSL")]
    for cache in caches:
        monkeypatch.setenv(cache, str(tmp_path))

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        folders = {env[cache] for cache in caches}
        assert len(folders) == 3
        assert not any(Path(folder).exists() for folder in folders)
        return subprocess.CompletedProcess(command, 0, stdout=b"0.5\n")

    monkeypatch.setattr(first_call.subprocess, "run", run)
    assert first_call.first_call(named("attn_n n=1", "cpu")) == 0.5


@pytest.mark.parametrize("measure", ["forward", "backward", "both"])
def test_profile_one(measure: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler sees exactly what runs between its start and its stop."""
    monkeypatch.setattr(profile_one, "_profiler", ran.append)
    profile_one.main(["attn_n n=1", measure, "--length", "40", "--heads", "4", "--heads-kv", "2", "--causal"])
    seen = [each.split()[0] for each in ran[ran.index("start") + 1 : ran.index("stop")]]
    assert seen == (["forward", "backward"] if measure == "both" else [measure])
    assert ran[-1] == "stop"


def test_profile_one_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="eager softmax_n n=1: whole batches of equal heads"):
        profile_one.main(["eager softmax_n n=1", "forward", "--heads-kv", "2"])
    with pytest.raises(SystemExit):
        profile_one.main(["eager", "forward"])
    assert "attn_n n=per head" in capsys.readouterr().err
