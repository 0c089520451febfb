"""What is remembered of a call must never change what a call does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_n
from attn_n import flash_attention_n
from attn_n.backends import registry
from attn_n.dispatch import call_cache
from tests.oracle import attention_n


def inputs(length: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, 2, length, 8, dtype=dtype) for _ in range(3))
    return q, k, v


def test_the_second_call_is_planned_and_right(ran: list[str]) -> None:
    for options in ({"sm_n": 2.0}, {"sm_n": 0.5}, {"causal": True}, {"window": (1, 2)}, {"sm_scale": 0.3, "sm_n": 1}):
        for _ in range(2):
            q, k, v = inputs()
            keywords = {
                "n" if name == "sm_n" else "scale" if name == "sm_scale" else name: x for name, x in options.items()
            }
            assert torch.allclose(flash_attention_n(q, k, v, **options), attention_n(q, k, v, **keywords)[0], atol=1e-5)
    assert len(call_cache._calls) == 5
    assert ran == ["forward sdpa:cpu"] * 10


BAD = [
    {"sm_n": True}, {"sm_n": -1}, {"sm_n": torch.tensor(-1.0)}, {"dropout_p": [0.0]}, {"softcap": "3"},
    {"window": [3]}, {"window": 3}, {"window": (3,)}, {"window": (1, [2])}, {"sm_scale": torch.tensor(1.0)},
    {"backend": "fast"}, {"backend": 3},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD, ids=str)
def test_a_bad_call_after_a_good_one(change: dict[str, object]) -> None:
    q, k, v = inputs()
    flash_attention_n(q, k, v, sm_n=1)
    flash_attention_n(q, k, v, sm_n=1, window=(3, 3))
    with pytest.raises((TypeError, ValueError), match=next(iter(change))):
        flash_attention_n(q, k, v, **({"sm_n": 1} | change))
    with pytest.raises(ValueError, match="v: expected as many keys"):
        flash_attention_n(q, k, v[:, :, :5], sm_n=1)


def test_what_a_plan_depends_on(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    q, k, v = inputs()
    flash_attention_n(q, k, v, sm_n=1.0)
    with attn_n.use_backend("reference"):
        flash_attention_n(q, k, v, sm_n=1.0)
    monkeypatch.setenv("ATTN_N_BACKEND", "reference")
    flash_attention_n(q, k, v, sm_n=1.0)
    assert ran == ["forward sdpa:cpu", "attend reference", "attend reference"]
    monkeypatch.delenv("ATTN_N_BACKEND")
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attention_n(q, k, v, sm_n=1.0).dtype == torch.bfloat16
    assert flash_attention_n(q.requires_grad_(), k, v, sm_n=1.0).requires_grad
    with torch.no_grad():
        assert not flash_attention_n(q, k, v, sm_n=1.0).requires_grad
    assert flash_attention_n(*inputs(dtype=torch.float64), sm_n=1.0).dtype == torch.float64


class Particular(attn_n.Backend):
    """It notes what it is asked, which it is when a call is not planned."""

    name = "particular"

    def __init__(self, reason: str | None = None) -> None:
        self.reason, self.asked = reason, list[attn_n.AttentionCall]()

    def why_not(self, call: attn_n.AttentionCall) -> str | None:
        self.asked.append(call)
        return self.reason

    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_n: object, options: attn_n.Options) -> Any:
        return *attention_n(q, k, v), None


@pytest.fixture
def particular() -> Iterator[Particular]:
    backend = Particular()
    attn_n.register_backend(backend)
    yield backend
    registry._entries.pop("particular")


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
def test_other_strides_are_another_call(place: int, particular: Particular) -> None:
    tensors = list(inputs(length=8))
    flash_attention_n(*tensors, backend="particular")  # it is loaded now, which may change the choice
    for _ in range(2):
        asked = len(particular.asked)
        flash_attention_n(*tensors, backend="particular")
    assert len(particular.asked) == asked, "a call that is planned"
    tensors[place] = tensors[place].mT
    flash_attention_n(*tensors, backend="particular")
    assert len(particular.asked) == asked + 1
    call = particular.asked[-1]
    assert (call.q_stride, call.k_stride, call.v_stride)[place] == (128, 64, 1, 8)


def test_a_backend_that_is_registered_anew_is_asked_anew(particular: Particular) -> None:
    q, k, v = inputs()
    flash_attention_n(q, k, v, backend="particular")
    attn_n.register_backend(Particular("has changed its mind"))
    with pytest.raises(attn_n.UnsupportedError, match="has changed its mind"):
        flash_attention_n(q, k, v, backend="particular")


@pytest.mark.parametrize("place", [1, 2], ids=["k", "v"])
def test_a_tensor_on_another_device_after_a_good_call(place: int) -> None:
    tensors = list(inputs())
    flash_attention_n(*tensors)
    tensors[place] = tensors[place].to("meta")
    with pytest.raises(ValueError, match=f"{'qkv'[place]}: expected the device of q, cpu, got meta"):
        flash_attention_n(*tensors)


@pytest.mark.gpu
def test_the_same_call_on_another_device(ran: list[str]) -> None:
    tensors = inputs(dtype=torch.bfloat16)
    flash_attention_n(*tensors, backend="sdpa")
    flash_attention_n(*(x.cuda() for x in tensors), backend="sdpa")
    assert ran[0] == "forward sdpa:cpu"
    assert ran[1].startswith("forward sdpa:")
    assert ran[1] != ran[0]


def test_a_returned_lse_is_another_call() -> None:
    class WithoutLse(attn_n.Backend):
        name = "without lse"

        def forward(self, q: Tensor, k: Tensor, v: Tensor, log_n: object, options: attn_n.Options) -> Any:
            return *attention_n(q, k, v), None

    attn_n.register_backend(WithoutLse())
    q, k, v = (x.requires_grad_() for x in inputs())
    flash_attention_n(q, k, v, backend="without lse")
    with pytest.raises(attn_n.UnsupportedError, match="no gradient of lse"):
        flash_attention_n(q, k, v, return_lse=True, backend="without lse")
    registry._entries.pop("without lse")


def test_plans_are_forgotten_before_they_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cache, "_MOST", 3)
    for length in range(2, 10):
        flash_attention_n(*inputs(length), sm_n=1.0)
        assert len(call_cache._calls) <= 3


@pytest.mark.gpu
def test_a_learned_n_is_planned_on_a_gpu(ran: list[str]) -> None:
    q, k, v = (x.half().cuda() for x in inputs())
    for name in ("sm_n", "sinks"):
        for scale in (1.0, 3.0):  # the same call with other values
            n = (scale * torch.rand(2, device="cuda")).requires_grad_()
            exact = n.detach().double().requires_grad_()
            expected = attention_n(q.double(), k.double(), v.double(), **{"n" if name == "sm_n" else name: exact})[0]
            with torch.no_grad():
                assert torch.allclose(flash_attention_n(q, k, v, **{name: n}), expected.half(), atol=1e-3)
            out = flash_attention_n(q, k, v, **{name: n})
            (dn,) = torch.autograd.grad(out.sum(), n)
            (expected_dn,) = torch.autograd.grad(expected.sum(), exact)
            assert torch.allclose(dn.double(), expected_dn, rtol=1e-2, atol=1e-2)
    assert len(call_cache._calls) == 4
    assert len(ran) == 12
    with pytest.raises(ValueError, match="sinks: expected None together with sm_n"):
        flash_attention_n(q, k, v, sm_n=1.0, sinks=n)
    with pytest.raises(ValueError, match="sm_n: expected shape"):
        flash_attention_n(q, k, v, sm_n=torch.ones(3, device="cuda"))
