"""A cached call must never do anything else than the same call that is not cached."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attn_n
from attn_n import flash_attention_n, flash_attention_n_varlen
from attn_n.backends import registry, xformers
from attn_n.backends.flash_attn import version_2, version_3, version_4
from attn_n.call import Options, Request, canonical
from attn_n.dispatch import call_cache, choose, order, similar
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


def test_bad_boundaries_after_good_ones() -> None:
    tokens = [x[0].transpose(0, 1) for x in inputs()]
    good, bad = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 7, 6], dtype=torch.int32)
    for _ in range(2):  # the first call of all loads backends, after which its key is another one
        flash_attention_n_varlen(*tokens, good, good.clone(), 4, 4)
    for name, starts in (("cu_seqlens_q", (bad, good)), ("cu_seqlens_k", (good, bad))):
        with pytest.raises(ValueError, match=name):
            flash_attention_n_varlen(*tokens, *starts, 4, 4)


@pytest.mark.parametrize("shape", [(6, 6), (2, 6, 6), (1, 1, 6, 6)], ids=str)
def test_each_call_has_its_own_mask(shape: tuple[int, ...]) -> None:
    q, k, v = inputs()
    for _ in range(4):
        mask = torch.randn(shape)
        expected = attention_n(q, k, v, 1.0, mask=mask.expand(1, 2, 6, 6))[0]
        assert torch.allclose(flash_attention_n(q, k, v, sm_n=1.0, attn_mask=mask), expected, atol=1e-5)
    assert len(call_cache._calls) <= 2  # the first call of all loads backends, after which its key is another one


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

        def backward(self, *_: object) -> attn_n.Gradients:
            raise AssertionError

    attn_n.register_backend(WithoutLse())
    q, k, v = (x.requires_grad_() for x in inputs())
    flash_attention_n(q, k, v, backend="without lse")
    with pytest.raises(attn_n.UnsupportedError, match="no gradient of lse"):
        flash_attention_n(q, k, v, return_lse=True, backend="without lse")
    registry._entries.pop("without lse")


def test_a_call_under_autocast_is_kept(particular: Particular, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors that autocast leaves as they are; the backend runs without autocast each time."""
    under_autocast: list[bool] = []
    forward = Particular.forward
    monkeypatch.setattr(
        Particular, "forward", lambda *x: under_autocast.append(torch.is_autocast_enabled("cpu")) or forward(*x)
    )
    halves, floats = inputs(dtype=torch.bfloat16), inputs()
    flash_attention_n(*halves, backend="particular")
    asked = len(particular.asked)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            flash_attention_n(*halves, backend="particular")
        assert len(particular.asked) == asked + 1, "a call that is kept"
        for _ in range(2):
            flash_attention_n(*floats, backend="particular")
        assert [call.dtype for call in particular.asked[asked + 1 :]] == [torch.bfloat16] * 2
    with torch.autocast("cpu", torch.float16):  # which casts them
        flash_attention_n(*halves, backend="particular")
    assert particular.asked[-1].dtype == torch.float16
    assert under_autocast == [False] * 7


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
def test_a_call_that_autocast_casts_in_part_is_not_kept(place: int) -> None:
    tensors = [x.bfloat16() for x in inputs()]
    expected = flash_attention_n(*tensors, sm_n=1.0)
    tensors[place] = tensors[place].float()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert torch.equal(flash_attention_n(*tensors, sm_n=1.0), expected)


def test_a_mask_beyond_float32_is_clamped_each_time() -> None:
    q, k, v = inputs()
    for _ in range(2):
        out = flash_attention_n(q, k, v, attn_mask=torch.full((6, 6), -1e300, dtype=torch.float64))
        assert torch.allclose(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-6)


def test_what_was_put_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cache._calls, "most", 3)
    for length in range(2, 10):
        flash_attention_n(*inputs(length), sm_n=1.0)
        assert len(call_cache._calls) <= 3
    assert [key[2][0][2] for key in call_cache._calls] == [7, 8, 9]


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

    monkeypatch.setattr(hopper, "release", lambda: hopper.LAST)
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
        row = pick.choice((width, width, width + 4))  # of q; rows of 136 bytes are nothing for TMA
        q = torch.empty(batch, 4, len_q, row, dtype=torch.bfloat16, device="meta")[..., :width]
        k = torch.empty(batch, pick.choice((1, heads_kv)), len_k, width, dtype=torch.bfloat16, device="meta")
        k = k.expand(batch, heads_kv, len_k, width)
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


def test_varlen_calls_of_one_kind_are_chosen_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from attn_n.backends.triton import hopper

    monkeypatch.setattr(hopper, "release", lambda: hopper.LAST)
    pick, found = random.Random(0), dict[object, tuple[str, Options]]()
    for _ in range(3000):
        sequences, causal, training = pick.choice((1, 2, 3)), pick.random() < 0.5, pick.random() < 0.5
        starts = torch.zeros(sequences + 1, dtype=torch.int32, device="meta")
        tokens, tokens_k = (pick.choice((5, 100, 127, 128, 129, 300, 384, 400, 9000)) for _ in "qk")
        q = torch.empty(tokens, 4, 64, dtype=torch.bfloat16, device="meta", requires_grad=training)
        k = torch.empty(tokens_k, 2, 64, dtype=torch.bfloat16, device="meta")
        packing, request = (starts, starts, tokens, tokens_k), Request(causal, None, 1.0, *[None] * 5, 0.0, False, None)
        kind = similar.kind(q, k, k, request, packing)
        assert kind is not None
        described = canonical.varlen(q, k, k, *packing, request)
        call = dataclasses.replace(described.call, device="cuda", capability=(9, 0))
        options = described.options.without_tensors()._replace(max_seqlen_q=0, max_seqlen_k=0)
        chosen = choose.choose(call, None)[0], options
        assert found.setdefault((kind, causal, training), chosen) == chosen
    assert {name for name, _ in found.values()} == {"triton:hopper", "triton:portable"}


def test_what_has_no_kind() -> None:
    q, k, v = inputs()
    plain = Request(True, None, 1.0, *[None] * 5, 0.0, False, None)
    assert similar.kind(q, k, v, plain, ()) is not None
    assert similar.kind(q, k, v, plain._replace(attn_mask=torch.ones(6, 6, dtype=torch.bool)), ()) is None
    assert similar.kind(q[0], k[0], v[0], plain, ()) is None
    assert similar.kind(q, k[:, :, :0], v[:, :, :0], plain, ()) is None
    assert similar.kind(q[:, :, :0], k, v, plain, ()) is None
    assert similar.kind(q, k, v[:, :, :5], plain, ()) is None
    assert similar.kind(q[:, :, :1].expand(1, 2, 1 << 30, 8), k, v, plain, ()) is None
    tokens, starts = torch.randn(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    assert similar.kind(tokens, tokens, tokens, plain, (starts, starts, 4, 4)) is not None
    assert similar.kind(tokens, tokens, tokens, plain._replace(window=(1, 1)), (starts, starts, 4, 4)) is None
    assert similar.kind(tokens, tokens, tokens, plain, (starts, starts[:2], 4, 4)) is None
    assert similar.kind(tokens, tokens, tokens, plain, (starts, starts, -1, 4)) is None
    assert similar.kind(tokens, tokens, tokens[:5], plain, (starts, starts, 4, 4)) is None
    assert similar.kind(tokens[:1], tokens[:1], tokens[:1], plain, (starts, starts, 4, 4)) is not None
    assert similar.kind(tokens[:0], tokens, tokens, plain, (starts, starts, 4, 4)) is None
    assert similar.kind(tokens, tokens[:0], tokens[:0], plain, (starts, starts, 4, 4)) is None
    assert similar.kind(q, k, v, plain, (starts, starts, 4, 4)) is None


def kind_of(
    len_q: int = 10, len_k: int = 20, causal: bool = False, window: Any = None, heads: tuple[int, int] = (4, 2),
    batch: int = 2, width: int = 64, row: int | None = None, dtype: torch.dtype = torch.bfloat16,
) -> Any:  # fmt: skip
    """Return the kind of a call whose q has rows of `row` elements."""
    q = torch.empty(batch, heads[0], len_q, row or width, dtype=dtype, device="meta")[..., :width]
    k = torch.empty(batch, heads[1], len_k, width, dtype=dtype, device="meta")
    return similar.kind(q, k, k, Request(causal, None, None, None, None, window, None, None, 0.0, False, None), ())


SAME_KINDS = [
    ({}, {"len_q": 11, "len_k": 21}),
    ({"len_q": 2}, {"len_q": 126, "len_k": 127}),
    ({"len_k": 128}, {"len_k": 699}),
    ({"len_q": 21}, {"len_q": 22, "len_k": 21}),
    ({"len_q": 22}, {"len_q": 40}),
    ({"len_q": 41}, {"len_q": 100}),
    ({"causal": True, "len_q": 2}, {"causal": True, "len_q": 3}),
    ({"causal": True, "len_q": 9, "len_k": 2}, {"causal": True, "len_q": 9, "len_k": 3}),
    ({"window": (8, 3)}, {"window": (8, 3), "len_k": 11}),
    ({"window": (8, 3)}, {"window": (60, 66), "len_k": 300, "len_q": 100}),
    ({"window": (8, None)}, {"window": (9, None), "len_k": 100}),
    ({"window": (None, 8)}, {"window": (None, 8), "len_k": 100}),
    ({"len_q": 3, "len_k": 1}, {"len_q": 4, "len_k": 1}),
    ({"row": 72}, {}),
    ({"row": 68, "dtype": torch.float32}, {"dtype": torch.float32}),
]
OTHER_KINDS = [
    ({"len_q": 1}, {"len_q": 2}),
    ({"len_q": 127, "len_k": 200}, {"len_q": 128, "len_k": 200}),
    ({"len_k": 699}, {"len_k": 700}),
    ({"len_k": 1024}, {"len_k": 1025}),
    ({"len_q": 19}, {"len_q": 20}),
    ({"len_q": 20}, {"len_q": 21}),
    ({"len_q": 21}, {"len_q": 22}),
    ({"len_q": 40}, {"len_q": 41}),
    ({}, {"causal": True}),
    ({"window": (8, 3), "len_k": 9}, {"window": (8, 3), "len_k": 10, "len_q": 11}),
    ({"window": (None, 8), "len_q": 9}, {"window": (None, 8)}),
    ({"window": (None, 5), "len_k": 5, "len_q": 30}, {"window": (None, 5), "len_k": 6, "len_q": 30}),
    ({"window": (60, 66), "len_k": 300, "len_q": 100}, {"window": (60, 67), "len_k": 300, "len_q": 100}),
    ({"len_q": 3125, "len_k": 3125, "batch": 1}, {"len_q": 3126, "len_k": 3126, "batch": 1}),
    ({}, {"heads": (4, 1)}),
    ({}, {"heads": (2, 2)}),
    ({}, {"batch": 3}),
    ({}, {"width": 32}),
    ({}, {"row": 68}),
]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [*((*pair, True) for pair in SAME_KINDS), *((*pair, False) for pair in OTHER_KINDS)],
    ids=str,
)
def test_which_calls_are_of_one_kind(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    assert kind_of(**one) is not None is not kind_of(**other)
    assert (kind_of(**one) == kind_of(**other)) == same


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((512, 64, 64, 1), (True, True, True)),
        ((512, 72, 64, 1), (True, True, True)),
        ((512, 68, 64, 1), (True, True, False)),
        ((0, 64, 64, 1), (True, False, True)),
        ((64, 8, 1, 8), (False, True, False)),
    ],
)
def test_what_a_kind_holds_of_strides(strides: tuple[int, ...], expected: tuple[bool, bool, bool]) -> None:
    x = torch.empty(4096, dtype=torch.bfloat16).as_strided((2, 2, 4, 8), strides)
    assert similar._of_strides(x) == expected


def test_the_kinds_of_varlen_calls() -> None:
    def kind(tokens_k: int, sequences: int, longest: int = 4) -> Any:
        q, k = torch.empty(6, 4, 64, device="meta"), torch.empty(tokens_k, 2, 64, device="meta")
        starts = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
        request = Request(False, None, None, None, None, None, None, None, 0.0, False, None)
        return similar.kind(q, k, k, request, (starts, starts, longest, longest))

    assert kind(254, 2) == kind(255, 2) == kind(20, 2, longest=0) != kind(256, 2)
    assert kind(20, 2) != kind(20, 1)
    assert kind(1, 1) is not None
    assert kind(1, 0) is None


class Marked(Tensor):
    """A tensor subclass: a call of it depends on more than metadata."""


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.as_subclass(Marked),
        lambda x: torch._neg_view(x),
        lambda x: x.to("meta"),
        lambda x: x.tolist(),
    ],
    ids=["subclass", "negative", "meta", "list"],
)
def test_what_has_no_key(place: int, other: Callable[[Tensor], Any]) -> None:
    plain, tensors = Request(False, None, 1.0, *[None] * 5, 0.0, False, None), list(inputs())
    assert call_cache.key(*tensors, plain) is not None
    if other(tensors[0]).__class__ is Tensor and other(tensors[0]).is_meta:
        tensors = [x.to("meta") if place else x for x in tensors]
    tensors[place] = other(tensors[place])
    assert call_cache.key(*tensors, plain) is None


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
def test_a_sparse_tensor_has_another_key(place: int) -> None:
    """It says that its strides are 0, as a number that is expanded does."""
    number = torch.zeros(()).expand(1, 2, 6, 8)
    tensors = [number.to_sparse() if each == place else number for each in range(3)]
    assert tensors[place].stride() == number.stride()
    for _ in range(2):
        flash_attention_n(number, number, number)
    with pytest.raises(TypeError, match="expected a dense tensor"):
        flash_attention_n(*tensors)


def test_what_a_key_holds_of_other_arguments() -> None:
    tensors, plain = inputs(), Request(False, None, 1.0, *[None] * 5, 0.0, False, None)
    with FlopCounterMode(display=False):
        assert call_cache.key(*tensors, plain) is None
    for change in ({"alibi_slopes": torch.ones(2)}, {"attn_mask": torch._neg_view(torch.ones(6, 6))}, {"causal": [1]}):
        assert call_cache.key(*tensors, plain._replace(**change)) is None
    packing = torch.tensor([0, 6], dtype=torch.int32), 6, 6
    equal, other = (packing[0], *packing), (packing[0].clone(), *packing)
    keys = [call_cache.key(*(x[0].transpose(0, 1) for x in tensors), plain, each) for each in (equal, other)]
    assert keys[0] is not None is not keys[1] != keys[0]
    assert call_cache.key(*tensors, plain, (packing[0], packing[0].tolist(), 6, 6)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_precision_of_float32_products_is_part_of_its_keys(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, plain = inputs(dtype=dtype), Request(False, None, 1.0, *[None] * 5, 0.0, False, None)
    before = call_cache.key(*tensors, plain)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert (call_cache.key(*tensors, plain) == before) == (dtype is torch.bfloat16)


MASK = torch.ones(6, 7)[:, :6]


@pytest.mark.parametrize("name", ["attn_mask", "sm_n", "sinks"])
@pytest.mark.parametrize(
    "other",
    [MASK[:1], MASK[None], MASK.bool(), MASK.clone(), MASK.to("meta"), MASK.clone().requires_grad_(), MASK.to_sparse()],
    ids=["shape", "dimensions", "dtype", "strides", "device", "gradient", "layout"],
)
def test_a_key_holds_the_metadata_of_other_tensors(name: str, other: Tensor) -> None:
    plain, tensors = Request(False, None, None, *[None] * 5, 0.0, False, None), inputs()
    mask, same, different = (
        call_cache.key(*tensors, plain._replace(**{name: x})) for x in (MASK, torch.zeros(6, 7)[:, :6], other)
    )
    assert mask is not None
    assert mask == same != different


def test_varlen_calls_of_any_longest_sequences_are_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    x, starts = inputs(12)[0][0].transpose(0, 1), torch.tensor([0, 6, 12], dtype=torch.int32)
    flash_attention_n_varlen(x, x, x, starts, starts, 6, 6, sm_n=1.0)  # the backends are loaded now
    call_cache.clear()
    chosen, choice = [], choose.choose
    monkeypatch.setattr(choose, "choose", lambda *x: chosen.append(choice(*x)) or chosen[-1])
    for longest_q, longest_k in ((6, 6), (7, 6), (6, 9), (12, 12)):
        flash_attention_n_varlen(x, x, x, starts, starts, longest_q, longest_k, sm_n=1.0)
    assert (len(call_cache._calls), len(call_cache._kinds)) == (4, 1)
    flash_attention_n_varlen(x, x, x, starts, starts.clone(), 6, 6, sm_n=1.0)  # its keys are as many by chance
    assert (len(call_cache._calls), len(call_cache._kinds)) == (5, 1)
    assert len(chosen) == 1
    out, _ = flash_attention_n_varlen(x, x, x, starts, starts, 8, 8, sm_n=1.0, return_lse=True)
    assert torch.equal(out, flash_attention_n_varlen(x, x, x, starts, starts, 8, 8, sm_n=1.0))
    assert (len(call_cache._kinds), len(chosen)) == (2, 2)
    fewer = torch.tensor([0, 3, 6], dtype=torch.int32)  # keys
    for longest_q, longest_k in ((6, 3), (7, 4)):
        for of_q, of_k, lengths in ((starts, fewer, (longest_q, longest_k)), (fewer, starts, (longest_k, longest_q))):
            tokens = x[: int(of_q[-1])], x[: int(of_k[-1])]
            out = flash_attention_n_varlen(tokens[0], tokens[1], tokens[1], of_q, of_k, *lengths, sm_n=1.0)
            alone = attention_n(
                *(
                    y[: int(z[1])].transpose(0, 1)[None]
                    for y, z in zip((tokens[0], tokens[1], tokens[1]), (of_q, of_k, of_k), strict=True)
                ),
                n=1.0,
            )[0]
            assert torch.allclose(out[: int(of_q[1])].transpose(0, 1)[None], alone, atol=1e-6)


def test_varlen_calls_that_are_converted_are_not_kept() -> None:
    x, starts = inputs(6)[0][0].transpose(0, 1), torch.tensor([0, 9, 2, 9, 6, 9], dtype=torch.int32)[::2]
    same = starts.contiguous()
    for of_q, of_k in ((starts, same), (same, starts)):
        flash_attention_n_varlen(x, x, x, of_q, of_k, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        flash_attention_n_varlen(x, x, x, same, same, 4, 4)
    assert not call_cache._calls
    flash_attention_n_varlen(x, x, x, same, same, 4, 4)
    assert len(call_cache._calls) == 1


@pytest.mark.parametrize(("name", "bad"), [("sm_n", -1.0), ("sm_n", float("inf")), ("sinks", float("inf"))])
def test_bad_values_of_a_tensor_after_good_ones(name: str, bad: float) -> None:
    q, k, v = inputs()
    for _ in range(2):
        flash_attention_n(q, k, v, **{name: torch.ones(2)})
    with pytest.raises(ValueError, match=f"{name}: expected"):
        flash_attention_n(q, k, v, **{name: torch.tensor([1.0, bad])})


def tensors_in(x: object) -> list[Tensor]:
    if isinstance(x, tuple):
        return [tensor for y in x for tensor in tensors_in(y)]
    return [x] if isinstance(x, Tensor) else []


def test_no_key_holds_a_tensor() -> None:
    q, k, v = inputs()
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    tokens = [x[0].transpose(0, 1) for x in (q, k, v)]
    for _ in range(2):
        flash_attention_n(q, k, v, sinks=torch.zeros(2))
        flash_attention_n(q, k, v, sm_n=torch.ones(()), attn_mask=torch.ones(6, 6, dtype=torch.bool))
        flash_attention_n_varlen(*tokens, starts, starts, 4, 4, sm_n=1.0)
        flash_attention_n_varlen(*tokens, starts, starts, 4, 4, sinks=torch.zeros(2))
    assert len(call_cache._calls) == 4
    assert tensors_in(tuple(call_cache._calls)) == tensors_in(tuple(call_cache._kinds)) == []


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
def test_each_of_them_may_be_the_one_to_learn(place: int) -> None:
    tensors = list(inputs())
    flash_attention_n(*tensors, sm_n=1.0)
    tensors[place].requires_grad_()
    for _ in range(2):
        made_by = flash_attention_n(*tensors, sm_n=1.0).grad_fn
        assert made_by is not None
        assert type(made_by).__name__ == "_AttentionBackward"  # and not that of an operator within, which drops the lse


def test_new_lengths_are_right(ran: list[str]) -> None:
    """Of batches with sinks and a window, and of varlen sequences whose longest one changes."""
    sinks = torch.tensor([0.5, -1.0])
    for length in range(2, 12):
        q, k, v = inputs(length)
        got = flash_attention_n(q, k, v, True, sinks=sinks, window=(4, 0))
        expected = attention_n(q.double(), k.double(), v.double(), causal=True, sinks=sinks.double(), window=(4, 0))[0]
        assert torch.allclose(got.double(), expected, atol=1e-5)
        starts = torch.tensor([0, 1, length], dtype=torch.int32)
        tokens = [x[0].transpose(0, 1) for x in (q, k, v)]
        packed = flash_attention_n_varlen(*tokens, starts, starts, length, length, True, sinks=sinks)
        alone = flash_attention_n(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], True, sinks=sinks, backend="reference")
        assert torch.allclose(packed[1:].transpose(0, 1)[None], alone, atol=1e-5)
    assert set(ran) == {"forward sdpa:cpu", "attend reference"}


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


def test_a_backend_that_is_asked_before_and_says_nothing_of_lengths(
    particular: Particular, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(order.DEFAULT, "cpu", ("particular", "sdpa", "reference"))
    particular.reason = "not this one"
    for compares, more in ((False, 3), (True, 1)):
        particular.compares_lengths = compares
        call_cache.clear()
        asked = len(particular.asked)
        for length in (5, 6, 7):
            flash_attention_n(*inputs(length))
        assert len(particular.asked) == asked + more


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


@pytest.mark.parametrize(
    ("options", "training", "most"),
    [({"sm_n": 1.0}, False, 15), ({"sinks": torch.zeros(2)}, False, 23), ({"sm_n": 1.0}, True, 32)],
    ids=["n", "sinks", "both passes"],
)
def test_a_known_call_enters_few_functions(options: dict[str, Any], training: bool, most: int) -> None:
    """Each of them takes the host up to 1 us: between two calls much else has run, and its code is in no cache."""
    q, k, v = (x.requires_grad_(training) for x in inputs())
    dout, package, entered = torch.randn(1, 2, 6, 8), str(Path(attn_n.__file__).parent), list[str]()

    def call() -> None:
        out = flash_attention_n(q, k, v, **options)
        if training:
            out.backward(dout)

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and not code.co_name.startswith("<"):
            entered.append(code.co_name)

    for _ in range(2):
        call()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert entered[0] == "flash_attention_n"
    assert len(entered) <= most, entered


def test_an_lse_that_nobody_wants_is_no_output_of_autograd() -> None:
    """It would take autograd 2 us; it is saved for the backward all the same."""
    q, k, v = (x.requires_grad_() for x in inputs())
    for _ in range(2):
        for wanted, outputs in ((False, 1), (True, 2)):
            result = flash_attention_n(q, k, v, sm_n=1.0, return_lse=wanted)
            made_by = (result[0] if wanted else result).grad_fn
            assert len(made_by._input_metadata) == outputs
            (dq,) = torch.autograd.grad((result[0] if wanted else result).sum(), q)
            x = q.detach().double().requires_grad_()
            (expected,) = torch.autograd.grad(attention_n(x, k.double(), v.double(), n=1.0)[0].sum(), x)
            assert torch.allclose(dq.double(), expected, atol=1e-5)
