"""Bad input raises an error that names the argument, what was expected and what came, before any kernel runs."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attn_n
from attn_n import flash_attention_n, flash_attention_n_varlen
from attn_n.call import Options, canonical
from tests.cases import INTERPRETED


def tensors(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    call: dict[str, Any] = {
        "q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 2, 6, 8), "v": torch.randn(2, 2, 6, 8),
    }  # fmt: skip
    return call | changes


def varlen(**changes: Any) -> dict[str, Any]:
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
    (
        "integers in all",
        {x: torch.ones(2, 4, 5, 8, dtype=torch.int64) for x in "qkv"},
        TypeError,
        r"q: expected float16.* got int64",
    ),
    (
        "no heads",
        {"q": torch.randn(4, 5, 8), "k": torch.randn(6, 8), "v": torch.randn(6, 8)},
        ValueError,
        r"k: expected 3 dimensions .*: k\[None\] if all of the batch share it, k.unsqueeze\(-3\) if it has no heads",
    ),
    ("q without a batch", {"q": torch.randn(2, 4, 8)}, ValueError, r"k: expected 3 dimensions as q \(2, 4, 8\) has"),
    ("S of v is E", {"v": torch.randn(2, 2, 8, 8)}, ValueError, r"v: expected as many keys as k, 6, got 8"),
    ("S is Ev", {"v": torch.randn(2, 2, 7, 6)}, ValueError, r"v: expected as many keys as k, 6, got 7"),
    ("heads of v are S", {"v": torch.randn(2, 6, 6, 8)}, ValueError, r"v: expected as many heads as k, 2, got 6"),
    ("L % Hkv = 0", {"q": torch.randn(2, 3, 4, 8)}, ValueError, r"divides the 3 heads .* got 2"),
    (
        "Hq % S = 0",
        {"q": torch.randn(2, 6, 5, 8), "k": torch.randn(2, 4, 6, 8), "v": torch.randn(2, 4, 6, 8)},
        ValueError,
        r"divides the 6 heads .* got 4",
    ),
    (
        "Hq % Hkv without a batch",
        {"q": torch.randn(4, 5, 8), "k": torch.randn(3, 6, 8), "v": torch.randn(3, 6, 8)},
        ValueError,
        r"divides the 4 heads .* got 3",
    ),
    ("no KV heads", {x: torch.randn(2, 0, 6, 8) for x in "kv"}, ValueError, r"divides the 4 heads .* got 0"),
    ("Ev = 0", {"v": torch.randn(2, 2, 6, 0)}, ValueError, r"head sizes of at least 1"),
    ("no tensor", {"v": [[1.0]]}, TypeError, r"v: expected a torch.Tensor, got list"),
    ("numpy array", {"q": np.ones((2, 4, 5, 8))}, TypeError, r"q: expected a torch.Tensor, got ndarray"),
    ("scale is NaN", {"sm_scale": math.nan}, ValueError, r"sm_scale: expected None or a finite number, got nan"),
    ("scale is -inf", {"sm_scale": -math.inf}, ValueError, r"sm_scale: expected None or a finite number, got -inf"),
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
        "tensor n per KV head",
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
    (
        "n is beyond float64",
        {"sm_n": 10**5000},
        ValueError,
        r"sm_n: expected a finite number >= 0 .*got an integer beyond the range of float64",
    ),
    ("n is NumPy's bool", {"sm_n": np.True_}, TypeError, r"sm_n: expected a finite number >= 0 or a tensor, got bool"),
    ("n is NumPy's string", {"sm_n": np.str_("1")}, TypeError, r"sm_n: expected .*, got str_"),
    ("n is a complex number", {"sm_n": np.complex64(1 + 2j)}, TypeError, r"sm_n: expected .*, got complex64"),
    ("n is an array", {"sm_n": np.array([1.0, 2.0])}, TypeError, r"sm_n: expected .* or a tensor, got ndarray"),
    ("n is an array of one", {"sm_n": np.array([1.0])}, TypeError, r"sm_n: expected .* or a tensor, got ndarray"),
    (
        "scale is beyond float64",
        {"sm_scale": -(10**400)},
        ValueError,
        r"sm_scale: expected None or a finite number, got an integer beyond",
    ),
    (
        "scale is beyond float32",
        {"sm_scale": 1e39},
        ValueError,
        r"sm_scale: expected None or a number that float32 holds, .*, got 1e\+39",
    ),
    ("dropout is NumPy's bool", {"dropout_p": np.False_}, TypeError, r"dropout_p: expected a number .*, got bool"),
    ("sinks with n", {"sinks": torch.zeros(4), "sm_n": 1.0}, ValueError, r"sinks: expected None together with sm_n"),
    (
        "sinks with n = 0",
        {"sinks": torch.zeros(4), "sm_n": 0.0},
        ValueError,
        r"sinks: expected None together with sm_n",
    ),
    ("sinks shape", {"sinks": torch.zeros(())}, ValueError, r"sinks: expected shape \(4,\) for 4 heads of q, got \(\)"),
    (
        "sinks a batch",
        {"sinks": torch.zeros(2, 4)},
        ValueError,
        r"sinks: expected \(4,\), one a head, or one a row: .*\(2, 4, 5\), .*; got \(2, 4\): pass sinks\[:, :, None\]$",
    ),
    ("sinks a row of another length", {"sinks": torch.zeros(2, 4, 6)}, ValueError, r"sinks: .*; got \(2, 4, 6\)$"),
    ("sinks of other heads", {"sinks": torch.zeros(2, 2, 5)}, ValueError, r"sinks: .*; got \(2, 2, 5\)$"),
    ("sinks that overflow in base 2", {"sinks": torch.full((4,), 3e38)}, ValueError, r"sinks: expected logits below"),
    ("sinks are inf", {"sinks": torch.full((4,), math.inf)}, ValueError, r"sinks: expected logits below 1\.7e\+38"),
    (
        "sinks are inf in float32",
        {"sinks": torch.full((4,), 1e39, dtype=torch.float64)},
        ValueError,
        r"sinks: expected logits below 1\.7e\+38",
    ),
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
    ("window is a string", {"window": "ab"}, TypeError, r"window: expected None or a pair .*, got 'ab'"),
    ("window is bytes", {"window": b"ab"}, TypeError, r"window: expected None or a pair .*, got b'ab'"),
    ("window of bools", {"window": (np.True_, 1)}, TypeError, r"window: expected left to be None or an integer"),
    ("window of NumPy's -1", {"window": (3, np.int64(-1))}, ValueError, r"window: expected right >= 0, .*got -1"),
    ("window of -1", {"window": (-1, 0)}, ValueError, r"window: expected left >= 0, .*got -1: .*-1 is None here"),
    (
        "softcap 0",
        {"softcap": 0.0},
        ValueError,
        r"softcap: expected None or a finite number > 0, got 0.0: .* is None here",
    ),
    ("softcap < 0", {"softcap": -2}, ValueError, r"softcap: expected None or a finite number > 0, got -2"),
    (
        "softcap beyond float32",
        {"softcap": 1e39},
        ValueError,
        r"softcap: .* from 1e-30 to 1e\+30 for inputs in float32, got 1e\+39: no cap is None",
    ),
    ("softcap times log2(e) beyond float32", {"softcap": 3e38}, ValueError, r"softcap: .*, got 3e\+38"),
    ("softcap that float32 flushes", {"softcap": 1e-40}, ValueError, r"softcap: expected None or .*, got 1e-40$"),
    (
        "slopes are NaN",
        {"alibi_slopes": torch.tensor([0.5, math.nan, 1, 1])},
        ValueError,
        r"alibi_slopes: expected numbers finite in float32, got",
    ),
    ("slopes are inf", {"alibi_slopes": torch.full((2, 4), math.inf)}, ValueError, r"alibi_slopes: expected numbers"),
    (
        "slopes are inf in float32",
        {"alibi_slopes": torch.full((4,), 1e39, dtype=torch.float64)},
        ValueError,
        r"alibi_slopes: expected numbers finite in float32",
    ),
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
    ("causal is a string", {"causal": "yes"}, TypeError, r"causal: expected True or False, got str$"),
    ("return_lse is a float", {"return_lse": 0.0}, TypeError, r"return_lse: expected True or False, got float$"),
    ("causal is None", {"causal": None}, TypeError, r"causal: expected True or False, got NoneType"),
    ("return_lse is a string", {"return_lse": "no"}, TypeError, r"return_lse: expected True or False, got str"),
    ("return_lse is a tensor", {"return_lse": torch.tensor([1, 0])}, TypeError, r"return_lse: .*, got Tensor$"),
    ("return_lse is 2", {"return_lse": 2}, TypeError, r"return_lse: expected True or False, got int"),
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
    (
        "member without a name",
        {"backend": "sdpa:"},
        ValueError,
        r"backend=: expected one of sdpa, sdpa:cpu, .*got 'sdpa:': did you mean 'sdpa'",
    ),
    ("backend is no name", {"backend": 3}, TypeError, r"backend: expected None or a name, got int"),
]

BAD_VARLEN = [
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
    ("overrun", {"cu_seqlens_k": boundaries(0, 2, 8)}, ValueError, r"cu_seqlens_k: .* the 7 tokens, got 8"),
    ("underrun", {"cu_seqlens_k": boundaries(0, 2, 6)}, ValueError, r"cu_seqlens_k: .* the 7 tokens, got 6"),
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
    ("changes", "error", "text"), [case[1:] for case in BAD_VARLEN], ids=[case[0] for case in BAD_VARLEN]
)
def test_bad_varlen_input(changes: dict[str, Any], error: type[Exception], text: str, ran: list[str]) -> None:
    with pytest.raises(error, match=text):
        flash_attention_n_varlen(**varlen(**changes))
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
        flash_attention_n_varlen(**varlen(**{name: None}))
    for call in (tensors, varlen):
        with pytest.raises(TypeError, match=said):
            attn_n.explain(**call(**{name: None}))
    with pytest.raises(TypeError, match="causal: expected True or False, got Tensor"):
        attn_n.explain(*tensors().values(), torch.ones(5, 6))
    assert ran == []


def test_flags_of_other_kinds() -> None:
    expected = flash_attention_n(**tensors(causal=True))
    for yes in (1, np.bool_(True), np.ones((), dtype=bool)[()]):
        assert torch.equal(flash_attention_n(**tensors(causal=yes)), expected)
        assert len(flash_attention_n(**tensors(return_lse=yes))) == 2
    for no in (0, np.bool_(False)):
        assert isinstance(flash_attention_n(**tensors(return_lse=no)), Tensor)


def test_numbers_of_other_kinds() -> None:
    """Numbers may be NumPy's, or of any other type that is a number."""
    expected = flash_attention_n(**tensors(window=(2, 1), sm_n=2, sm_scale=0.5, softcap=3))
    sequences = varlen()
    expected_of_sequences = flash_attention_n_varlen(**sequences | {"window": (1, None)})
    for integer, number in ((np.int64, np.float16), (np.uint8, np.array), (np.uint64, Fraction), (int, np.longdouble)):
        options = {"window": (integer(2), integer(1)), "sm_n": number(2.0), "sm_scale": number(0.5)}
        assert torch.equal(flash_attention_n(**tensors(**options, softcap=number(3.0))), expected)
        sizes = {"max_seqlen_q": integer(5), "max_seqlen_k": integer(5), "window": (integer(1), None)}
        assert torch.equal(flash_attention_n_varlen(**sequences | sizes), expected_of_sequences)
        described = attn_n.explain(**tensors(**options)).call
        assert type(described.window_left) is type(described.window_right) is int


def test_the_smallest_sizes() -> None:
    """Also without a batch, which is checked in another way."""
    for leading in ((), (2,)):
        for length in (0, 1):
            q, k, v = (torch.randn(*leading, 3, size, 1) for size in (length, 1, 1))
            assert flash_attention_n(q, k, v, sm_n=1.0).shape == (*leading, 3, length, 1)


def test_the_largest_scales() -> None:
    for largest in (torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max):
        assert attn_n.explain(**tensors(sm_scale=largest)).chosen is not None


def test_values_that_only_float64_holds() -> None:
    """Values beyond float32 are valid for float64 inputs."""
    call = {name: x.double() for name, x in tensors().items()}
    for options in (
        {"softcap": 1e39}, {"softcap": 1e-40}, {"sm_scale": 1e39},
        {"sinks": torch.full((4,), 8.9e307, dtype=torch.float64)},
        {"alibi_slopes": torch.full((4,), 1e39, dtype=torch.float64)},
    ):  # fmt: skip
        assert flash_attention_n(**call, **options).isfinite().all()
    assert torch.allclose(flash_attention_n(**call, softcap=1e39), flash_attention_n(**call))
    with pytest.raises(ValueError, match=r"sinks: expected logits below 9\.0e\+307"):
        flash_attention_n(**call, sinks=torch.full((4,), 1e308, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "sdpa:cpu", *(["triton:portable"] if INTERPRETED else [])])
@pytest.mark.parametrize("scale", [1e-46, -1e-46, 1e-40, 0.0])
@pytest.mark.parametrize("causal", [False, True])
def test_a_scale_that_float32_flushes(causal: bool, scale: float, backend: str, ran: list[str]) -> None:
    call = tensors(causal=causal)
    leaves = [x.requires_grad_() for x in (call["q"], call["k"], call["v"])]
    out, lse = flash_attention_n(*leaves, causal, scale, 1.0, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    true_out, true_lse = flash_attention_n(*exact, causal, 0.0, 1.0, return_lse=True, backend="reference")
    true_gradients = torch.autograd.grad(true_out.sum() + true_lse.sum(), exact)
    for got, true in zip((out, lse, *gradients), (true_out, true_lse, *true_gradients), strict=True):
        assert torch.allclose(got.double(), true, atol=1e-5)
    assert ("attend reference" if backend == "reference" else f"forward {backend}") in ran


def test_a_scale_below_the_normal_numbers_counts_where_the_logits_are_large() -> None:
    """Such a scale multiplies q, and is not flushed to zero."""
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    expected = flash_attention_n(q.double(), k.double(), v.double(), sm_scale=0.5)
    for sign in (1, -1):
        got = flash_attention_n(q * 2.0**70 * sign, k * 2.0**60, v, sm_scale=0.5 * 2.0**-130 * sign)
        assert torch.allclose(got.double(), expected, atol=1e-6)


def test_most_rows_without_keys(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """A call with (B, L, H, E) in place of (B, H, L, E) warns once, and names the line of the call."""
    monkeypatch.setattr(canonical, "_warned", False)
    q, k = torch.randn(2, 12, 5, 16), torch.randn(2, 12, 2, 16)
    flash_attention_n(q, k, k)
    flash_attention_n(q[:, :, :4], k, k, causal=True)  # half of the rows are no more than half
    flash_attention_n(q, k[:, :, :0], k[:, :, :0], causal=True)
    flash_attention_n(q, k, k, window=(1, 1))
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"^3 of 5 rows see no key .*q \(2, 12, 5, 16\) .*q.transpose\(1, 2\)"
    ) as caught:
        flash_attention_n(q, k, k, causal=True)
    assert caught[0].filename == __file__
    flash_attention_n(q[:1], k[:1], k[:1], causal=True)
    assert not recwarn.list


def test_the_calls_that_are_changed_are_good() -> None:
    flash_attention_n(**tensors())
    flash_attention_n_varlen(**varlen())


def test_explain_checks_the_call_too() -> None:
    with pytest.raises(ValueError, match="sm_n"):
        attn_n.explain(**tensors(sm_n=-1.0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'sm_m'"):
        attn_n.explain(**tensors(sm_m=1.0))


def test_varlen_boundaries_are_checked_by_the_reader_too() -> None:
    """A compiled call skips the check of values at first; the code that reads them to the host checks them."""
    q, k, v, cu_q, cu_k, max_q, max_k = varlen().values()
    cu_q[-1] = 8
    options = Options(1.0, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k)
    arguments = (q, k, v, None, False, 0.0, None, "sdpa:cpu", *options)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected to end at the 9 tokens, got 8"):
        torch.ops.attn_n.forward(*arguments)
