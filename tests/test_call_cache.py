"""What is remembered of a call must never change what a call does."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_n
from attn_n import flash_attention_n
from attn_n.backends import registry, xformers
from attn_n.backends.flash_attn import version_2, version_3, version_4
from attn_n.call import Options, Request, canonical
from attn_n.dispatch import call_cache, choose, similar
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


def test_what_was_put_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cache._calls, "most", 3)
    for length in range(2, 10):
        flash_attention_n(*inputs(length), sm_n=1.0)
        assert len(call_cache._calls) <= 3
    assert [key[1][2] for key in call_cache._calls] == [7, 8, 9]


# What calls of one kind share: lengths come from these, around all at which something changes.
LENGTHS = [
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    127,
    128,
    129,
    399,
    400,
    700,
    1023,
    1024,
    1025,
    1026,
    1500,
    3000,
    4095,
    4096,
    6000,
    9000,
]


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("libraries", [False, True])
def test_calls_of_one_kind_are_chosen_alike(
    capability: tuple[int, int] | None, libraries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every GPU and on a CPU, for random lengths, windows and widths; by metadata alone."""
    pytest.importorskip("triton")
    from attn_n.backends.triton import hopper

    monkeypatch.setattr(hopper, "tested", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    if libraries:  # as if all of them were installed
        for version in (version_2, version_3, version_4):
            monkeypatch.setattr(version, "why_not_usable", lambda: None)
        monkeypatch.setattr(xformers, "why_not_usable", lambda kernel: None)
    pick = random.Random(0)
    found: dict[object, tuple[str, Options]] = {}
    shared = 0
    for _ in range(10000):
        lengths = LENGTHS[: pick.choice((7, len(LENGTHS)))]
        len_q, len_k = pick.choice(lengths), pick.choice(lengths)
        width, heads_kv, batch = 64, 2, 2
        window = pick.choice((None, (pick.choice((None, 0, 1, 128, 1500)), pick.choice((0, 3, None)))))
        causal, training, n = pick.random() < 0.5, pick.random() < 0.5, pick.choice((None, 1.0))
        q = torch.empty(batch, 4, len_q, width, dtype=torch.bfloat16, device="meta")
        k = torch.empty(batch, heads_kv, len_k, width, dtype=torch.bfloat16, device="meta")
        request = Request(causal, None, n, None, None, window, None, None, 0.0, False, None)
        kind = similar.kind(q, k, k, request, ())
        assert kind is not None
        described = canonical.batch(q.requires_grad_(training), k, k, request)
        device = "cpu" if capability is None else "cuda"
        call = dataclasses.replace(described.call, device=device, capability=capability)
        chosen = choose.choose(call, None)[0], described.options
        assert similar.covers(call, chosen[0], named=False)
        shared += (kind, causal, window, n, training) in found
        assert found.setdefault((kind, causal, window, n, training), chosen) == chosen
    assert shared > 1000


def test_a_backend_that_says_nothing_of_lengths_is_asked_for_each(particular: Particular) -> None:
    flash_attention_n(*inputs(4), backend="particular")
    for length in (5, 6, 7):
        asked = len(particular.asked)
        flash_attention_n(*inputs(length), backend="particular")
        assert len(particular.asked) == asked + 1
    particular.compares_lengths = True
    flash_attention_n(*inputs(8), backend="particular")
    asked = len(particular.asked)
    out = flash_attention_n(*inputs(9), backend="particular")
    assert (len(particular.asked), out.shape[2]) == (asked, 9)


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
