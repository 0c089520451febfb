"""What a type checker says of calls of the public functions."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# In strict mode an ignored error that does not occur is an error.
CALLS = """
from attn_n import flash_attention_n, flash_attention_n_varlen
from torch import Tensor
from typing_extensions import assert_type

def attend(q: Tensor, starts: Tensor, with_lse: bool) -> None:
    assert_type(flash_attention_n(q, q, q), Tensor)
    assert_type(flash_attention_n(q, q, q, True, None, 1.0, return_lse=False), Tensor)
    assert_type(flash_attention_n(q, q, q, sinks=q, return_lse=True), tuple[Tensor, Tensor])
    assert_type(flash_attention_n(q, q, q, return_lse=with_lse), Tensor | tuple[Tensor, Tensor])
    flash_attention_n(q, q, q, is_causal=True)  # type: ignore[call-overload]
    flash_attention_n(q, q, q, softcap="30")  # type: ignore[call-overload]

    packed = q, q, q, starts, starts, 7, 7
    assert_type(flash_attention_n_varlen(*packed, True, sm_n=q), Tensor)
    assert_type(flash_attention_n_varlen(*packed, return_lse=True), tuple[Tensor, Tensor])
    assert_type(flash_attention_n_varlen(*packed, return_lse=with_lse), Tensor | tuple[Tensor, Tensor])
    flash_attention_n_varlen(q, q, q)  # type: ignore[call-overload]
"""


def test_the_type_of_a_result_depends_on_return_lse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api")
    calls = tmp_path / "calls.py"
    calls.write_text(CALLS)
    monkeypatch.chdir(ROOT)
    said, broken, status = api.run([str(calls)])
    assert status == 0, said + broken
