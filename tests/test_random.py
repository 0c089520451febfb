"""Random shapes and options by hypothesis, compared with float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import compare
from tests.cases import LAYOUTS, Case, make, must_serve

SIDES = st.none() | st.integers(0, 40)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads_kv = draw(st.integers(1, 2))
    case = {
        "name": "random",
        "heads_kv": heads_kv,
        "heads_q": heads_kv * draw(st.integers(1, 3)),
        "size": draw(st.integers(1, 40)),
        "size_v": draw(st.integers(1, 40)),
        "n": draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, "scalar", "per head", "zero per head"])),
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(SIDES, SIDES)),
        "alibi": draw(st.sampled_from(["", "per head", "per batch"])),
        "softcap": draw(st.sampled_from([None, None, 3.0])),
        "mask": draw(st.sampled_from(["", "", "bool", "float", "hidden rows", "per head"])),
        "shift": draw(st.sampled_from([0.0, -3.0])),
    }
    if draw(st.booleans()):
        lengths = st.lists(st.integers(0, 40), min_size=1, max_size=4)
        case["lengths_q"] = tuple(draw(lengths))
        case["lengths_k"] = tuple(draw(st.integers(0, 40)) for _ in case["lengths_q"])
        if not sum(case["lengths_q"]) or not sum(case["lengths_k"]):
            case["lengths_q"], case["lengths_k"] = (3,), (4,)
    else:
        case |= {"batch": draw(st.integers(1, 2)), "len_q": draw(st.integers(1, 90)), "len_k": draw(st.integers(1, 90))}
        case["layout"] = draw(st.sampled_from(LAYOUTS))
    return Case(**case)


def check(case: Case, dtype: torch.dtype, lse_grad: bool) -> None:
    inputs = make(case, dtype, "cpu")
    for backend in ("reference", "sdpa:cpu", "triton:portable"):
        if must_serve(backend, "cpu", dtype, case, lse_grad):
            excess = compare.excess(inputs, compare.library(inputs, backend, lse_grad), lse_grad)
            assert max(excess.values()) <= 1, (backend, excess)


EACH = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CALLS = given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float64]), lse_grad=st.booleans())


@settings(EACH, max_examples=25)
@CALLS
def test_random_calls(case: Case, dtype: torch.dtype, lse_grad: bool) -> None:
    check(case, dtype, lse_grad)


@pytest.mark.slow
@settings(EACH, max_examples=120)
@CALLS
def test_many_random_calls(case: Case, dtype: torch.dtype, lse_grad: bool) -> None:
    check(case, dtype, lse_grad)
