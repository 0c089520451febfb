"""What a first call is measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import host
from bench.contenders import named


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

    monkeypatch.setattr(host.subprocess, "run", run)
    assert host.first_call(named("attn_n n=1", "cpu")) == 0.5
