"""Bad input: an error that names the argument, what was expected and what came, before any kernel runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attn_n
from attn_n import flash_attention_n, flash_attention_n_varlen, functional


def tensors(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    call: dict[str, Any] = {
        "q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 2, 6, 8), "v": torch.randn(2, 2, 6, 8),
    }  # fmt: skip
    return call | changes


def packed(**changes: Any) -> dict[str, Any]:
    call: dict[str, Any] = {
        "q": torch.randn(9, 4, 8), "k": torch.randn(7, 2, 8), "v": torch.randn(7, 2, 8),
        "cu_seqlens_q": boundaries(0, 4, 9), "cu_seqlens_k": boundaries(0, 2, 7), "max_seqlen_q": 5, "max_seqlen_k": 5,
    }  # fmt: skip
    return call | changes


def boundaries(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = [
    # what is wrong, the change of the call, the error, and what its text must have
    ("one dimension", {"q": torch.randn(8)}, ValueError, r"q: expected 2 to 6 dimensions .* got shape \(8,\)"),
    ("seven dimensions", {"k": torch.randn(1, 1, 1, 1, 1, 6, 8)}, ValueError, r"k: expected 2 to 6 dimensions"),
    ("other dimensions", {"k": torch.randn(2, 6, 8)}, ValueError, r"k: expected 4 dimensions as q \(2, 4, 5, 8\)"),
    (
        "N",
        {"k": torch.randn(3, 2, 6, 8)},
        ValueError,
        r"k: expected the leading dimensions of q, \(2,\), or 1, got \(3,\)",
    ),
    (
        "N of v",
        {"v": torch.randn(3, 2, 6, 8)},
        ValueError,
        r"v: expected the leading dimensions of q, \(2,\), or 1, got \(3,\)",
    ),
    ("E", {"k": torch.randn(2, 2, 6, 7)}, ValueError, r"k: expected the head size of q, 8, got 7"),
    ("E = 0", {"q": torch.randn(2, 4, 5, 0), "k": torch.randn(2, 2, 6, 0)}, ValueError, r"head sizes of at least 1"),
    ("S", {"v": torch.randn(2, 2, 7, 8)}, ValueError, r"v: expected as many keys as k, 6, got 7"),
    ("heads of v", {"v": torch.randn(2, 1, 6, 8)}, ValueError, r"v: expected as many heads as k, 2, got 1"),
    (
        "Hq % Hkv",
        {"k": torch.randn(2, 3, 6, 8), "v": torch.randn(2, 3, 6, 8)},
        ValueError,
        r"divides the 4 heads .* got 3",
    ),
    (
        "dtype",
        {"k": torch.randn(2, 2, 6, 8).bfloat16()},
        TypeError,
        r"k: expected the dtype of q, float32, got bfloat16",
    ),
    (
        "device",
        {"k": torch.randn(2, 2, 6, 8, device="meta")},
        ValueError,
        r"k: expected the device of q, cpu, got meta",
    ),
    ("integers", {"q": torch.ones(2, 4, 5, 8, dtype=torch.int64)}, TypeError, r"q: expected float16.* got int64"),
    (
        "complex",
        {"q": torch.ones(2, 4, 5, 8, dtype=torch.complex64)},
        TypeError,
        r"q: expected float16.* got complex64",
    ),
    ("no tensor", {"v": [[1.0]]}, TypeError, r"v: expected a torch.Tensor, got list"),
    ("numpy array", {"q": np.ones((2, 4, 5, 8))}, TypeError, r"q: expected a torch.Tensor, got ndarray"),
    ("scale is NaN", {"sm_scale": math.nan}, ValueError, r"sm_scale: expected None or a finite number, got nan"),
    ("scale is a tensor", {"sm_scale": torch.tensor(1.0)}, TypeError, r"sm_scale: expected .* got Tensor"),
    ("n < 0", {"sm_n": -0.5}, ValueError, r"sm_n: expected a finite number >= 0, got -0.5"),
    ("n is NaN", {"sm_n": math.nan}, ValueError, r"sm_n: expected a finite number >= 0 .*got nan"),
    ("n is inf", {"sm_n": math.inf}, ValueError, r"sm_n: expected a finite number >= 0 .*got inf"),
    ("n is a string", {"sm_n": "1"}, TypeError, r"sm_n: expected a finite number >= 0 or a tensor, got str"),
    ("n is a bool", {"sm_n": True}, TypeError, r"sm_n: expected a finite number >= 0 or a tensor, got bool"),
    ("tensor n < 0", {"sm_n": torch.tensor(-1.0)}, ValueError, r"sm_n: expected finite numbers >= 0, got"),
    (
        "tensor n is NaN",
        {"sm_n": torch.tensor([0.0, 1, 2, math.nan])},
        ValueError,
        r"sm_n: expected finite numbers >= 0",
    ),
    ("tensor n is inf", {"sm_n": torch.tensor(math.inf)}, ValueError, r"sm_n: expected finite numbers >= 0"),
    (
        "tensor n per key head",
        {"sm_n": torch.ones(2)},
        ValueError,
        r"sm_n: expected shape \(\) or \(4,\) .* got \(2,\)",
    ),
    ("tensor n is an integer", {"sm_n": torch.tensor(1)}, TypeError, r"sm_n: expected float16.* got int64"),
    (
        "tensor n elsewhere",
        {"sm_n": torch.tensor(1.0, device="meta")},
        ValueError,
        r"sm_n: expected the device of q, cpu",
    ),
    ("sinks with n", {"sinks": torch.zeros(4), "sm_n": 1.0}, ValueError, r"sinks: expected None together with sm_n"),
    (
        "sinks with n = 0",
        {"sinks": torch.zeros(4), "sm_n": 0.0},
        ValueError,
        r"sinks: expected None together with sm_n",
    ),
    ("sinks shape", {"sinks": torch.zeros(())}, ValueError, r"sinks: expected shape \(4,\) for 4 heads of q, got \(\)"),
    ("sinks are inf", {"sinks": torch.full((4,), math.inf)}, ValueError, r"sinks: expected logits below \+inf"),
    (
        "mask shape",
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool)},
        ValueError,
        r"attn_mask: .*\(2, 4, 5, 6\), got \(5, 7\)",
    ),
    (
        "mask dims",
        {"attn_mask": torch.ones(1, 2, 4, 5, 6, dtype=torch.bool)},
        ValueError,
        r"attn_mask: expected a shape",
    ),
    (
        "mask dtype",
        {"attn_mask": torch.ones(5, 6, dtype=torch.int32)},
        TypeError,
        r"attn_mask: expected bool .* got int32",
    ),
    ("mask device", {"attn_mask": torch.ones(5, 6, device="meta")}, ValueError, r"attn_mask: expected the device of q"),
    ("negative window", {"window": (-1, 3)}, ValueError, r"window: expected left >= 0, or None .*, got -1"),
    ("reversed window", {"window": (4, -5)}, ValueError, r"window: expected right >= 0, or None .*, got -5"),
    ("window of floats", {"window": (1.5, 2)}, TypeError, r"window: expected left to be None or an integer, got 1.5"),
    ("window of one", {"window": (3,)}, TypeError, r"window: expected None or a pair \(left, right\), got \(3,\)"),
    ("window is a number", {"window": 3}, TypeError, r"window: expected None or a pair \(left, right\), got 3"),
    ("window of -1", {"window": (-1, 0)}, ValueError, r"window: expected left >= 0, .*got -1: .*-1 is None here"),
    (
        "softcap 0",
        {"softcap": 0.0},
        ValueError,
        r"softcap: expected None or a finite number > 0, got 0.0: .* is None here",
    ),
    ("softcap < 0", {"softcap": -2}, ValueError, r"softcap: expected None or a finite number > 0, got -2"),
    ("slopes shape", {"alibi_slopes": torch.ones(2)}, ValueError, r"alibi_slopes: .*\(4,\) or \(2, 4\), got \(2,\)"),
    ("slopes dtype", {"alibi_slopes": torch.ones(4, dtype=torch.int8)}, TypeError, r"alibi_slopes: expected float16"),
    ("dropout 1", {"dropout_p": 1.0}, ValueError, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
    (
        "dropout 1, as SDPA has it",
        {"dropout_p": 1.0},
        ValueError,
        r"got 1.0: with 1, which SDPA takes, nothing is left",
    ),
    ("a mask in the place of causal", {"causal": torch.ones(5, 6)}, TypeError, r"causal: .* got Tensor: .*attn_mask="),
    ("dropout in the place of causal", {"causal": 0.0}, TypeError, r"causal: .* got float: .*dropout_p="),
    ("causal is None", {"causal": None}, TypeError, r"causal: expected True or False, got NoneType"),
    ("dropout < 0", {"dropout_p": -0.1}, ValueError, r"dropout_p: expected a number in \[0, 1\), got -0.1"),
    (
        "unknown backend",
        {"backend": "cuda"},
        ValueError,
        r"backend=: expected one of triton, .*sdpa, sdpa:cpu, .*reference.*, got 'cuda'",
    ),
    (
        "unknown member",
        {"backend": "sdpa:fast"},
        ValueError,
        r"backend=: expected one of sdpa, sdpa:cpu, .*got 'sdpa:fast'",
    ),
    ("backend is no name", {"backend": 3}, TypeError, r"backend: expected None or a name, got int"),
]

BAD_PACKED = [
    ("4 dimensions", {"q": torch.randn(1, 9, 4, 8)}, ValueError, r"q: expected 3 dimensions \(T, H, E\)"),
    (
        "heads",
        {"k": torch.randn(7, 3, 8), "v": torch.randn(7, 3, 8)},
        ValueError,
        r"k: expected a number of heads that divides",
    ),
    ("tokens", {"v": torch.randn(6, 2, 8)}, ValueError, r"v: expected as many keys as k, 7, got 6"),
    ("no tensor", {"cu_seqlens_q": [0, 4, 9]}, TypeError, r"cu_seqlens_q: expected a torch.Tensor, got list"),
    ("int64", {"cu_seqlens_q": torch.tensor([0, 4, 9])}, TypeError, r"cu_seqlens_q: expected int32, got int64"),
    ("start", {"cu_seqlens_q": boundaries(1, 4, 9)}, ValueError, r"cu_seqlens_q: expected to start at 0, got 1"),
    (
        "decrease",
        {"cu_seqlens_k": boundaries(0, 8, 7)},
        ValueError,
        r"cu_seqlens_k: .* never decrease, got \[0, 8, 7\]",
    ),
    ("overrun", {"cu_seqlens_k": boundaries(0, 2, 8)}, ValueError, r"cu_seqlens_k: .* the 7 packed tokens, got 8"),
    ("underrun", {"cu_seqlens_k": boundaries(0, 2, 6)}, ValueError, r"cu_seqlens_k: .* the 7 packed tokens, got 6"),
    (
        "empty",
        {"cu_seqlens_q": boundaries()},
        ValueError,
        r"cu_seqlens_q: expected shape \(sequences \+ 1,\), got \(0,\)",
    ),
    ("sequences", {"cu_seqlens_k": boundaries(0, 7)}, ValueError, r"cu_seqlens_k: .* cu_seqlens_q, \(3,\), got \(2,\)"),
    ("device", {"cu_seqlens_q": boundaries(0, 4, 9).to("meta")}, ValueError, r"cu_seqlens_q: expected the device of q"),
    (
        "max too small",
        {"max_seqlen_q": 4},
        ValueError,
        r"max_seqlen_q: expected at least the longest sequence, 5, got 4",
    ),
    ("max is a float", {"max_seqlen_k": 5.0}, TypeError, r"max_seqlen_k: expected an integer, got float"),
    ("max < 0", {"max_seqlen_k": -1}, ValueError, r"max_seqlen_k: expected an integer >= 0, got -1"),
    (
        "mask",
        {"attn_mask": torch.ones(4, 7, dtype=torch.bool)},
        ValueError,
        r"attn_mask: .*\(2, 4, 5, 5\), got \(4, 7\)",
    ),
    ("slopes", {"alibi_slopes": torch.ones(3, 4)}, ValueError, r"alibi_slopes: .*\(4,\) or \(2, 4\), got \(3, 4\)"),
]


@pytest.mark.parametrize(("changes", "error", "text"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input(changes: dict[str, Any], error: type[Exception], text: str, ran: list[str]) -> None:
    with pytest.raises(error, match=text):
        flash_attention_n(**tensors(**changes))
    assert ran == []


@pytest.mark.parametrize(
    ("changes", "error", "text"), [case[1:] for case in BAD_PACKED], ids=[case[0] for case in BAD_PACKED]
)
def test_bad_packed_input(changes: dict[str, Any], error: type[Exception], text: str, ran: list[str]) -> None:
    with pytest.raises(error, match=text):
        flash_attention_n_varlen(**packed(**changes))
    assert ran == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("is_causal", "here it is causal"),
        ("scale", "here it is sm_scale"),
        ("softmax_scale", "here it is sm_scale"),
        ("enable_gqa", "leave it out"),
        ("dropout", "here it is dropout_p"),
        ("window_size", "here it is window, with None"),
        ("s_aux", "here it is sinks"),
        ("learnable_sink", "here it is sinks"),
        ("sm_m", r"did you mean sm_n\?"),
        ("something", "it has causal, sm_scale, .*backend"),
    ],
)
def test_the_names_of_other_libraries(name: str, text: str, ran: list[str]) -> None:
    said = rf"got an unexpected keyword argument '{name}': {text}"
    with pytest.raises(TypeError, match=rf"flash_attention_n\(\) {said}"):
        flash_attention_n(**tensors(**{name: None}))
    with pytest.raises(TypeError, match=rf"flash_attention_n_varlen\(\) {said}"):
        flash_attention_n_varlen(**packed(**{name: None}))
    for call in (tensors, packed):
        with pytest.raises(TypeError, match=said):
            attn_n.explain(**call(**{name: None}))
    with pytest.raises(TypeError, match="causal: expected True or False, got Tensor"):
        attn_n.explain(*tensors().values(), torch.ones(5, 6))
    assert ran == []


def test_flags_of_other_kinds() -> None:
    expected = flash_attention_n(**tensors(causal=True))
    for causal in (1, np.bool_(True), np.ones((), dtype=bool)[()]):
        assert torch.equal(flash_attention_n(**tensors(causal=causal)), expected)


def test_most_rows_without_keys(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """Said once of (B, L, H, E) passed for (B, H, L, E), by the line that called."""
    monkeypatch.setattr(functional, "_warned", False)
    q, k = torch.randn(2, 12, 8, 16), torch.randn(2, 12, 2, 16)
    flash_attention_n(q, k, k)
    flash_attention_n(q[:, :, :4], k, k, causal=True)  # half of the rows are no more than half
    flash_attention_n(q, k[:, :, :0], k[:, :, :0], causal=True)
    flash_attention_n(q, k, k, window=(1, 1))
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"^6 of 8 rows see no key .*q \(2, 12, 8, 16\) .*q.transpose\(1, 2\)"
    ) as caught:
        flash_attention_n(q, k, k, causal=True)
    assert caught[0].filename == __file__
    flash_attention_n(q[:1], k[:1], k[:1], causal=True)
    assert not recwarn.list


def test_the_calls_that_are_changed_are_good() -> None:
    flash_attention_n(**tensors())
    flash_attention_n_varlen(**packed())


def test_explain_checks_the_call_too() -> None:
    with pytest.raises(ValueError, match="sm_n"):
        attn_n.explain(**tensors(sm_n=-1.0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'sm_m'"):
        attn_n.explain(**tensors(sm_m=1.0))


def test_packed_boundaries_are_checked_by_the_reader_too() -> None:
    """A compiled call skips the check of values at its front door; who reads them to the host checks them there."""
    q, k, v, cu_q, cu_k, max_q, max_k = packed().values()
    cu_q[-1] = 8
    arguments = (
        q,
        k,
        v,
        None,
        False,
        0.0,
        None,
        "sdpa:cpu",
        1.0,
        None,
        None,
        None,
        0.0,
        None,
        None,
        cu_q,
        cu_k,
        max_q,
        max_k,
    )
    with pytest.raises(ValueError, match="cu_seqlens_q: expected to end at the 9 packed tokens, got 8"):
        torch.ops.attn_n.forward(*arguments)
