"""Tensors whose memory does not hold their values: CausalBias and jagged NestedTensor are served, others refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.masked import masked_tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import create_block_mask
from torch.testing._internal.two_tensor import TwoTensor

import attn_n
from attn_n import UnsupportedError, explain, flash_attention_n, flash_attention_n_varlen
from attn_n.backends import registry
from attn_n.call import AttentionCall, Options, Request, canonical
from attn_n.dispatch import serving
from tests import compare
from tests.calls import gpu_call
from tests.cases import HOPPER, INTERPRETED, Case, make, why_not_usable
from tests.oracle import attention_n
from tests.places import on_gpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:Lower right causal bias"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
]

ON_CPU = ["reference", "sdpa:cpu", *(["triton:portable"] if INTERPRETED else [])]
ON_GPU = ["reference", "sdpa:efficient", "triton:portable", "triton:hopper", "xformers:cutlass"]
FLASH = ["sdpa:flash", "flash_attn:2", "flash_attn:4", "xformers:flash"]
FLASH_2 = [name for name in FLASH if name != "flash_attn:4"]
PLACES = [
    *(pytest.param("cpu", name) for name in ON_CPU),
    *on_gpu(*(("cuda", name) for name in (*ON_GPU, *FLASH))),
]
CORNERS = {"upper left": causal_upper_left, "lower right": causal_lower_right}


def served(device: str, backend: str, case: Case, corner: str, ran: list[str]) -> None:
    """Compare the case under a CausalBias with float64 under the mask that it stands for."""
    inputs = make(case, torch.bfloat16 if device == "cuda" else torch.float32, device)
    bias = CORNERS[corner](case.len_q, case.len_k)
    inputs.mask = bias
    got = compare.library(inputs, backend)
    inputs.mask = bias._materialize(torch.device(device))
    excess = compare.excess(inputs, got)
    assert max(excess.values()) <= 1, excess
    expected = {"attend reference"} if backend == "reference" else {f"forward {backend}", f"backward {backend}"}
    assert set(ran) == expected


def skip_unless_usable(backend: str) -> None:
    if why_not_usable(backend):
        pytest.skip(f"{backend}: {why_not_usable(backend)}")
    if backend == "triton:hopper" and not HOPPER:
        pytest.skip("no GPU of compute capability 9.0")


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize(
    ("len_q", "len_k"), [(33, 33), (20, 150), (150, 20), (1, 9), (130, 300), (300, 130)], ids=str
)  # fmt: skip
def test_causal_bias(len_q: int, len_k: int, corner: str, device: str, backend: str, ran: list[str]) -> None:
    skip_unless_usable(backend)
    if backend in FLASH and corner == "upper left" and len_q < len_k:
        pytest.skip("refused: test_flash_attention_has_no_negative_side")
    if backend in FLASH_2 and corner == "upper left" and len_q >= 2 * len_k:
        pytest.skip("refused: FlashAttention 2 takes S for a right side of S or more")
    case = Case("", batch=1, heads_q=2, heads_kv=1, len_q=len_q, len_k=len_k, size=64, size_v=64, n="per head")
    served(device, backend, case, corner, ran)


@pytest.mark.parametrize(("device", "backend"), [p for p in PLACES if p.values[1] not in FLASH])
@pytest.mark.parametrize(
    "changes",
    [
        {"causal": True},
        {"causal": True, "len_q": 130, "len_k": 66},  # where that is the narrower one
        {"window": (3, 9), "len_q": 130, "len_k": 66},
        {"window": (100, None)},
        {"window": (70, 1), "n": 0.0},
        {"window": (64, None), "n": 0.0},  # the left side is where the right side is: one key a row
        {"window": (63, None), "n": 0.0},  # the sides have passed each other: no key at all
        {"window": (3, 3)},
        {"softcap": 3.0},
        {"alibi": "per head", "shift": 8.0},  # which keeps what ALiBi takes from the nearest keys that are left
        {"layout": "tokens first", "n": "sinks", "sinks": (1.0, -2.0)},
    ],
    ids=str,
)
def test_causal_bias_beside_others(changes: dict[str, Any], device: str, backend: str, ran: list[str]) -> None:
    skip_unless_usable(backend)
    case = Case("", **{"batch": 1, "len_q": 66, "len_k": 130, "size": 64, "size_v": 64} | changes)
    inputs = make(case, torch.float32 if device == "cpu" else torch.bfloat16, device)
    bias = causal_upper_left(case.len_q, case.len_k)
    reason = serving.why_not(
        backend, explain(inputs.q, inputs.k, inputs.v, **inputs.keywords | {"attn_mask": bias}).call
    )
    if reason is not None:
        assert any(what in reason for what in ("softcap", "alibi", "bias", "holds no key", "added to the logits"))
        return
    served(device, backend, case, "upper left", ran)


def test_causal_bias_is_a_window() -> None:
    """A CausalBias becomes a window: nothing of size L x S is allocated."""
    q, k = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 9, 8)
    sides = {}
    for length, other in ((q, k), (k, q)):
        shape = length.shape[2], other.shape[2]
        for corner, bias in CORNERS.items():
            call = explain(length, other, other, attn_mask=bias(*shape)).call
            assert call.mask_shape is None
            sides[corner, shape] = call.window_right
    assert sides == {
        ("upper left", (5, 9)): -4, ("lower right", (5, 9)): 0, ("upper left", (9, 5)): 4, ("lower right", (9, 5)): 0,
    }  # fmt: skip


def test_causal_bias_of_more_dimensions() -> None:
    q, k, v = torch.randn(2, 3, 2, 5, 8), torch.randn(2, 3, 2, 9, 8), torch.randn(2, 3, 2, 9, 8)
    got = flash_attention_n(q, k, v, attn_mask=causal_upper_left(5, 9), sm_n=1.0)
    mask = torch.ones(5, 9, dtype=torch.bool).tril()
    expected, _ = attention_n(*(x.flatten(0, 1).double() for x in (q, k, v)), n=1.0, mask=mask)
    assert torch.allclose(got.flatten(0, 1).double(), expected, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_causal_bias_compiled(dynamic: bool) -> None:
    torch.compiler.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: CausalBias) -> Any:
        return flash_attention_n(q, k, v, attn_mask=bias, sm_n=1.0)

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for len_q, len_k in ((5, 9), (7, 12)):
        q, k, v = (torch.randn(2, 2, length, 8) for length in (len_q, len_k, len_k))
        bias = causal_upper_left(len_q, len_k)
        expected, _ = attention_n(q, k, v, n=1.0, mask=bias._materialize())
        assert torch.allclose(compiled(q, k, v, bias), expected, atol=1e-5)


def test_causal_bias_of_other_lengths() -> None:
    q, k = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 9, 8)
    with pytest.raises(ValueError, match=r"attn_mask: expected a CausalBias of 5 queries and 9 keys, got .* 5 and 5"):
        flash_attention_n(q, k, k, attn_mask=causal_upper_left(5, 5))
    # PyTorch's own subclass loses its attributes there.
    bias = causal_upper_left(5, 9)
    for lost in (bias.detach(), bias.clone()):
        assert type(lost) is CausalBias
        with pytest.raises(TypeError, match=r"attn_mask: a CausalBias that has lost its lengths .*causal=True"):
            flash_attention_n(q, k, k, attn_mask=lost)
    starts, x = torch.tensor([0, 2, 5], dtype=torch.int32), torch.randn(5, 2, 8)
    with pytest.raises(TypeError, match=r"attn_mask: a CausalBias has one pair of lengths.*causal=True"):
        flash_attention_n_varlen(x, x, x, starts, starts, 3, 3, attn_mask=causal_lower_right(3, 3))


@pytest.mark.parametrize(
    ("causal", "window", "expected"),
    [
        (False, None, (None, None)),
        (True, None, (None, 0)),
        (False, (7, 3), (7, 3)),
        (False, (8, 4), (None, None)),
        (True, (7, 3), (7, 0)),
        (False, (0, 0), (0, 0)),
        (False, (None, 3), (None, 3)),
    ],
)
def test_a_side_that_bounds_nothing_is_none(
    causal: bool, window: tuple[int | None, int | None] | None, expected: tuple[int | None, int | None]
) -> None:
    """Of five queries and nine keys the last query is at the last key."""
    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 9, 8)
    request = Request(causal, None, None, None, None, window, None, None, 0.0, False, None)
    options = canonical.batch(q, k, k, request).options
    assert (options.window_left, options.window_right) == expected


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
def test_each_of_them_may_have_the_leading_dimensions(place: int) -> None:
    shapes = [[1, 1, 2, length, 8] for length in (5, 9, 9)]
    shapes[place][:2] = 3, 4
    request = Request(False, None, None, None, None, None, None, None, 0.0, False, None)
    found = canonical.batch(*(torch.randn(shape) for shape in shapes), request)
    assert [x.shape for x in found[:3]] == [(12, 2, length, 8) for length in (5, 9, 9)]
    assert found.out_shape == (3, 4, 2, 5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((9,), (1, 1, 1, 9)),
        ((2, 5, 1), (1, 2, 5, 1)),
        ((1, 1, 1, 5, 9), (1, 1, 5, 9)),
        ((4, 1, 5, 9), (12, 1, 5, 9)),
        ((3, 1, 2, 1, 9), (12, 2, 1, 9)),
    ],
)
def test_a_mask_of_all_batches_stays_one(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, 2, 5, 8), torch.randn(3, 4, 2, 9, 8), torch.randn(3, 4, 2, 9, 8)
    request = Request(False, None, None, None, torch.randn(shape), None, None, None, 0.0, False, None)
    mask = canonical.batch(*x, request).options.mask
    assert mask is not None
    assert mask.shape == expected
    full = request.attn_mask.expand(3, 4, 2, 5, 9).reshape(12, 2, 5, 9)  # type: ignore[union-attr]
    assert torch.equal(mask.expand(12, 2, 5, 9), full)


@pytest.mark.parametrize(
    ("given", "kind", "shape"),
    [
        ({}, "none", None),
        ({"sm_n": 0.0}, "none", None),
        ({"sm_n": 2}, "float", None),
        ({"sm_n": torch.ones(())}, "scalar tensor", ()),
        ({"sm_n": torch.ones(2)}, "per head", (2,)),
        ({"sinks": torch.ones(2)}, "per head", (2,)),
        ({"sinks": torch.ones(1, 2, 5)}, "per row", (1, 2, 5)),
    ],
    ids=str,
)
def test_the_kinds_of_n(given: dict[str, Any], kind: str, shape: tuple[int, ...] | None) -> None:
    q = torch.randn(1, 2, 5, 8)
    request = Request(False, None, None, None, None, None, None, None, 0.0, False, None)._replace(**given)
    found = canonical.batch(q, q, q, request)
    assert found.call.n_kind == kind
    assert (found.n.shape if isinstance(found.n, Tensor) else None) == shape


def test_a_sink_for_each_row_of_varlen_sequences() -> None:
    q, starts = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    request = Request(False, None, None, torch.ones(5, 2), None, None, None, None, 0.0, False, None)
    found = canonical.varlen(q, q, q, starts, starts, 3, 3, request)
    assert found.call.n_kind == "per row"
    assert isinstance(found.n, Tensor)
    assert found.n.shape == (5, 2)


def test_nothing_needs_gradients_where_they_are_off() -> None:
    q, mask, slopes = (torch.randn(shape, requires_grad=True) for shape in ((1, 2, 5, 8), (5, 5), (2,)))
    request = Request(False, None, 1.0, None, mask, None, None, slopes, 0.0, False, None)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            call = canonical.batch(q, q, q, request).call
        assert call.needs_grad == call.mask_needs_grad == call.alibi_needs_grad == enabled


def test_the_canonical_form_has_no_negative_bit() -> None:
    """Kernels read memory. Torch's own operators, of which some backends are made, would see the bit."""
    q, n, slopes, mask = (torch._neg_view(torch.rand(shape)) for shape in ((1, 2, 5, 8), (2,), (2,), (5, 5)))
    positive = torch._neg_view(-torch.rand(2))
    request = Request(False, None, positive, None, mask, None, None, slopes, 0.0, False, None)
    found = canonical.batch(q, q, q, request)
    of_sinks = canonical.batch(q, q, q, request._replace(sm_n=None, sinks=n))
    tensors = (*found[:4], found.options.mask, found.options.alibi_slopes, of_sinks.n)
    for x, given in zip(tensors, (q, q, q, positive, mask, slopes, n), strict=True):
        assert isinstance(x, Tensor)
        assert not x.is_neg()
        assert torch.equal(x.flatten(), given.flatten())
    tokens, starts = q[0].transpose(0, 1), torch.tensor([0, 5], dtype=torch.int32)
    packed = canonical.varlen(tokens, tokens, tokens, starts, starts, 5, 5, request)
    assert not any(x.is_neg() for x in (packed.q, packed.k, packed.v, packed.options.mask))


@pytest.mark.parametrize("backend", [*FLASH, "flash_attn:3", "sdpa:cudnn"])
@pytest.mark.parametrize("left", [None, 5])
def test_flash_attention_has_no_negative_side(left: int | None, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention takes -1 for a side without a limit, so negative sides are refused."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for right in (-1, -44):
        reason = serving.why_not(backend, gpu_call(window_left=left, window_right=right))
        wanted = "has no window" if backend == "sdpa:cudnn" else "right side is negative"
        assert wanted in str(reason)


@pytest.mark.parametrize(("left", "served"), [(None, True), (7, True), (6, True), (5, False)])
def test_a_window_that_the_hopper_kernels_cannot_wait_in(
    left: int | None, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows without keys are refused: a consumer would wait for a block of keys that is never loaded."""
    hopper = pytest.importorskip("attn_n.backends.triton.hopper")
    monkeypatch.setattr(hopper, "release", lambda: hopper.LAST)
    reason = serving.why_not("triton:hopper", gpu_call(window_left=left, window_right=-6))
    assert (reason is None) == served
    assert served or "holds no key" in str(reason)


@pytest.mark.parametrize(
    ("left", "right", "seen"), [(None, -6, 250), (None, -300, 0), (9, -6, 4), (9, -10, 0), (9, -30, 0), (9, 3, 13)]
)
def test_how_many_keys_a_negative_side_leaves(left: int | None, right: int, seen: int) -> None:
    call: AttentionCall = gpu_call(window_left=left, window_right=right)
    assert call.keys_seen == seen
    pytest.importorskip("triton")
    from attn_n.backends.triton.hopper import configs as of_hopper
    from attn_n.backends.triton.kernel_key import describe
    from attn_n.backends.triton.portable import configs

    q = torch.empty(1, 2, 256, 64, device="meta", dtype=torch.bfloat16)
    key = describe((q,) * 5, None, Options(0.1, left, right))
    assert 0 <= key.keys_on_average <= seen
    for kernel in ("forward", "dq", "dk and dv"):
        assert configs.find(kernel, key)
    assert of_hopper.find(key, 64)


class Bare(Tensor):
    """A subclass that changes nothing."""


class Own(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def own(x: Tensor) -> Tensor:
    return x.as_subclass(Own)


def two(x: Tensor) -> Tensor:
    return TwoTensor(x, x.clone())


def masked(x: Tensor) -> Tensor:
    return masked_tensor(x, torch.ones_like(x, dtype=torch.bool))


def of_q(changes: dict[str, Any]) -> dict[str, Any]:
    usual = {"q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 2, 6, 8), "v": torch.randn(2, 2, 6, 8)}
    return usual | changes


OWN = r"expected a plain torch.Tensor, got tests.test_masks.Own, .*as_subclass\(torch.Tensor\)"
BESIDE = r"expected a plain torch.Tensor as q is, got .*TwoTensor: .*to_local\(\)"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"q": own(torch.randn(2, 4, 5, 8))}, f"q: {OWN}"),
        ({"k": own(torch.randn(2, 2, 6, 8))}, f"k: {OWN}"),
        ({"v": own(torch.randn(2, 2, 6, 8))}, f"v: {OWN}"),
        ({"attn_mask": own(torch.zeros(5, 6))}, f"attn_mask: {OWN}"),
        ({"sinks": own(torch.zeros(4))}, f"sinks: {OWN}"),
        ({"sm_n": own(torch.ones(4))}, f"sm_n: {OWN}"),
        ({"alibi_slopes": own(torch.ones(4))}, f"alibi_slopes: {OWN}"),
        ({"k": two(torch.randn(2, 2, 6, 8))}, f"k: {BESIDE}"),
        ({"attn_mask": two(torch.zeros(5, 6))}, f"attn_mask: {BESIDE}"),
        ({"sinks": two(torch.zeros(4))}, f"sinks: {BESIDE}"),
        ({"alibi_slopes": two(torch.ones(4))}, f"alibi_slopes: {BESIDE}"),
        ({"attn_mask": lambda: masked(torch.zeros(5, 6))}, r"attn_mask: expected .*MaskedTensor, .*pass get_data\(\)"),
        ({"attn_mask": lambda: torch.ones(5, 6).to_sparse()}, r"attn_mask: .*layout torch.sparse_coo: .*to_dense\(\)"),
        ({"attn_mask": lambda: torch.ones(5, 6).to_sparse_csr()}, r"attn_mask: .*layout torch.sparse_csr"),
        ({"q": lambda: torch.ones(2, 4, 5, 8).to_sparse()}, r"q: expected a dense tensor, got layout torch.sparse_coo"),
        ({"k": lambda: torch.ones(2, 2, 6, 8).to_sparse()}, r"k: expected a dense tensor"),
        (
            {"q": lambda: torch.nested.nested_tensor([torch.randn(4, 5, 8)])},
            r"q: .*NestedTensor .*torch.strided",
        ),
        (
            {"v": lambda: torch.nested.nested_tensor([torch.randn(2, 6, 8)])},
            r"v: .*NestedTensor .*torch.strided",
        ),
        (
            {"attn_mask": create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 5, 6, device="cpu")},
            r"attn_mask: expected a torch.Tensor, got BlockMask: pass .*create_mask",
        ),
    ],
)
def test_refused(changes: dict[str, Any], text: str, ran: list[str]) -> None:
    # Some are made here, where PyTorch's warnings of prototypes are expected.
    made = {name: x() if callable(x) else x for name, x in changes.items()}
    with pytest.raises(TypeError, match=text):
        flash_attention_n(**of_q(made))
    assert ran == []


def test_cu_seqlens_too() -> None:
    x, starts = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(TypeError, match=f"cu_seqlens_k: {OWN}"):
        flash_attention_n_varlen(x, x, x, starts, own(starts), 3, 3)


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks", "attn_mask"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_subclass_that_changes_nothing(backend: str, name: str) -> None:
    call = of_q({"sinks": torch.randn(4), "attn_mask": torch.randn(5, 6), "backend": backend})
    expected = flash_attention_n(**call)
    assert torch.equal(flash_attention_n(**call | {name: call[name].as_subclass(Bare)}).as_subclass(Tensor), expected)


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_sign_beside_the_memory(backend: str) -> None:
    """The imaginary part of a conjugate, whose sign is a flag beside its memory, is read rightly."""

    def flagged(*shape: int) -> Tensor:
        x = torch.view_as_complex(torch.randn(*shape, 2)).conj().imag
        assert x.is_neg()
        return x

    shapes = {
        "q": (2, 4, 5, 8), "k": (2, 2, 6, 8), "v": (2, 2, 6, 8), "attn_mask": (5, 6), "sinks": (4,),
        "alibi_slopes": (4,),
    }  # fmt: skip
    plain = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        x = flagged(*shape)
        expected = flash_attention_n(**plain | {name: x.resolve_neg().contiguous()}, backend=backend)
        assert torch.allclose(flash_attention_n(**plain | {name: x}, backend=backend), expected, atol=1e-6), name
    # A call was prepared for a tensor of the same layout.
    q = torch.randn(2, 4, 5, 8, 2)
    usual = {"k": plain["k"], "v": plain["v"], "backend": backend}
    flash_attention_n(q[..., 1], **usual)
    x = flagged(2, 4, 5, 8)
    assert x.stride() == q[..., 1].stride()
    expected = flash_attention_n(x.resolve_neg(), **usual)
    assert torch.allclose(flash_attention_n(x, **usual), expected, atol=1e-6)


def jagged(lengths: tuple[int, ...], heads: int, size: int, **options: Any) -> Tensor:
    rows = [torch.randn(length, heads, size) for length in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, **options)


@pytest.mark.parametrize("other_lengths", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_jagged(backend: str, other_lengths: bool, ran: list[str]) -> None:
    """Jagged (N, H, j, E) tensors, as SDPA takes them, give what each sequence alone does."""
    lengths = (3, 7, 1)
    x = jagged(lengths, 4, 8, requires_grad=True)
    y = jagged((5, 2, 6) if other_lengths else lengths, 2, 8, requires_grad=True)
    n = torch.rand(4, requires_grad=True)
    if not other_lengths:
        y = torch.nested.nested_tensor_from_jagged(y.values().detach(), x.offsets()).requires_grad_()
    q, k = x.transpose(1, 2), y.transpose(1, 2)
    out, lse = flash_attention_n(q, k, k, True, sm_n=n, window=(4, None), return_lse=True, backend=backend)
    assert out.layout is torch.jagged
    assert out.shape == q.shape  # the same ragged length, so that both can be added
    assert lse.shape == q.shape[:-1]
    got = torch.autograd.grad(out.values().square().sum() + lse.values().sum(), (x, y, n))
    assert {one.rpartition(" ")[2] for one in ran} == {backend}

    xs, ys = ([one.detach().double().requires_grad_() for one in whole.unbind()] for whole in (x, y))
    exact_n = n.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for one, other, one_out, one_lse in zip(xs, ys, out.unbind(), lse.unbind(), strict=True):
        one_q, one_k = one.transpose(0, 1)[None], other.transpose(0, 1)[None]
        expected, expected_lse = attention_n(one_q, one_k, one_k, exact_n, causal=True, window=(4, None))
        assert torch.allclose(one_out.double(), expected[0], atol=1e-5)
        assert torch.allclose(one_lse.double(), expected_lse[0], atol=1e-5)
        total = total + expected.square().sum() + expected_lse.sum()
    exact = torch.autograd.grad(total, (*xs, *ys, exact_n))
    found = (*got[0].unbind(), *got[1].unbind(), got[2])
    assert all(torch.allclose(a.double(), b, atol=1e-4) for a, b in zip(found, exact, strict=True))


def test_jagged_compiled() -> None:
    torch.compiler.reset()
    q = jagged((3, 7, 1), 2, 8).transpose(1, 2)
    compiled = torch.compile(
        lambda q: flash_attention_n(q, q, q, True, sm_n=1.0), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    assert torch.allclose(compiled(q).values(), flash_attention_n(q, q, q, True, sm_n=1.0).values(), atol=1e-6)


def test_jagged_refused() -> None:
    x, dense = jagged((3, 7), 2, 8), torch.randn(2, 2, 5, 8)
    q, other = x.transpose(1, 2), jagged((3, 7), 2, 8).transpose(1, 2)
    fewer = jagged((3,), 2, 8).transpose(1, 2)
    assert "varlen q (10, 2, 8)" in str(explain(q, q, q, True))
    for call, error, text in (
        ((x, x, x), ValueError, r"q: expected .*\(N, heads, length, E\).*got shape \(2, j\d+, 2, 8\): .*transpose"),
        ((q, dense, dense), TypeError, "k: expected a jagged NestedTensor as the others are, got Tensor"),
        ((dense, q, q), TypeError, "k: expected a dense tensor, got a NestedTensor of layout torch.jagged"),
        ((q, fewer, fewer), ValueError, r"k: expected the number of sequences of q, 2, got 1"),
        ((q, q, other), ValueError, r"v: expected the very offsets of k.*nested_tensor_from_jagged"),
    ):
        with pytest.raises(error, match=text):
            flash_attention_n(*call)
    narrow = torch.nested.narrow(
        torch.randn(2, 9, 2, 8), 1, torch.tensor([0, 1]), torch.tensor([3, 4]), layout=torch.jagged
    )
    with pytest.raises(ValueError, match=r"q: expected sequences that lie one behind the other: pass q.contiguous\(\)"):
        flash_attention_n(*[narrow.transpose(1, 2)] * 3)
    with pytest.raises(TypeError, match="attn_mask: a CausalBias has one pair of lengths"):
        flash_attention_n(q, q, q, attn_mask=causal_upper_left(5, 5))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("q_leading", "k_leading", "v_leading"),
    [((2,), (1,), (1,)), ((2,), (1,), (2,)), ((1,), (3,), (3,)), ((2, 3), (1, 1), (1, 1)), ((2, 3), (2, 1), (1, 3))],
    ids=str,
)
def test_leading_dimensions_broadcast(
    q_leading: tuple[int, ...], k_leading: tuple[int, ...], v_leading: tuple[int, ...], backend: str
) -> None:
    shapes = ((*q_leading, 4, 5, 8), (*k_leading, 2, 6, 8), (*v_leading, 2, 6, 8))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = flash_attention_n(*leaves, sm_n=1.0, backend=backend)
    got = torch.autograd.grad(out.square().sum(), leaves)
    leading = torch.broadcast_shapes(q_leading, k_leading, v_leading)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    whole = [x.expand(*leading, *x.shape[-3:]).reshape(-1, *x.shape[-3:]) for x in exact]
    expected, _ = attention_n(*whole, n=1.0)
    assert torch.allclose(out.flatten().double(), expected.flatten(), atol=1e-5)
    gradients = torch.autograd.grad(expected.square().sum(), exact)
    assert all(torch.allclose(a.double(), b, atol=1e-4) for a, b in zip(got, gradients, strict=True))


@pytest.mark.parametrize("name", ["sdpa:cpu", *(["triton:portable"] if INTERPRETED else [])])
def test_what_is_broadcast_is_not_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = registry.find(name)
    assert backend is not None
    original, seen = backend.prepare, []

    def spied(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        seen.extend([k, v])
        return original(q, k, v, *rest)

    monkeypatch.setattr(backend, "prepare", spied)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    flash_attention_n(q, k, v, backend=name)
    flash_attention_n(q[:, None], k[:, None], v[:, None], backend=name)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (k, v)] * 2
    assert all(x.stride(0) == 0 for x in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*ON_GPU, *FLASH, "sdpa:cudnn"])
def test_what_is_broadcast_on_a_gpu(backend: str, ran: list[str]) -> None:
    """Broadcast k and v are served rightly, and without a copy."""
    skip_unless_usable(backend)
    q = torch.randn(32, 4, 128, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 4, 4096, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = flash_attention_n(q, k, v, sm_n=1.0, backend=backend)
    expected, _ = attention_n(*(x.double() for x in (q[:2], k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))), n=1.0)
    assert torch.allclose(out[:2].double(), expected, atol=2e-2)
    if backend == "reference":
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_attention_n(q, k, v, sm_n=1.0, backend=backend)
    copied = 32 * k.numel() * k.element_size()
    assert torch.cuda.max_memory_allocated() - before < copied


def test_what_is_not_broadcast() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 6, 8)
    with pytest.raises(ValueError, match=r"k: expected 4 dimensions .*k\[None\] if all of the batch share it"):
        flash_attention_n(q, k, k)
    with pytest.raises(ValueError, match=r"v: expected the leading dimensions of q, \(1,\), or 1, got \(3,\)"):
        flash_attention_n(q[:1], torch.randn(2, 4, 6, 8), torch.randn(3, 4, 6, 8))
    with pytest.raises(UnsupportedError, match="sdpa:flash"):
        attn_n.flash_attention_n(q, q, q, backend="sdpa:flash")


@pytest.mark.parametrize(("device", "backend"), [p for p in PLACES if p.values[1] in (*ON_CPU, "triton:portable")])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("lowest", [-1e300, torch.finfo(torch.float64).min], ids=str)
def test_a_float64_mask_beyond_float32(lowest: float, varlen: bool, device: str, backend: str, ran: list[str]) -> None:
    """Only -inf hides a key: a row of numbers beyond float32 gives the mean of the values."""
    skip_unless_usable(backend)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, 2, length, 64, device=device, dtype=dtype) for length in (4, 6, 6))
    mask = torch.zeros(4, 6, dtype=torch.float64, device=device)
    mask[0] = lowest
    mask[1, 2:] = lowest
    mask[2] = -torch.inf
    mask[3, ::2] = -torch.inf
    mask.requires_grad_(backend == "reference")
    if varlen:
        starts = [torch.tensor([0, length], dtype=torch.int32, device=device) for length in (4, 6)]
        tokens = [x[0].transpose(0, 1) for x in (q, k, v)]
        out = flash_attention_n_varlen(*tokens, *starts, 4, 6, attn_mask=mask, backend=backend)
        out = out.transpose(0, 1)[None]  # type: ignore[union-attr]
    else:
        out = flash_attention_n(q, k, v, attn_mask=mask, backend=backend)  # type: ignore[assignment]
    assert ran == ["attend reference" if backend == "reference" else f"forward {backend}"]
    scores = q.double() @ k.double().mT / 8
    weights = scores.masked_fill(mask.detach() < -1, -torch.inf).softmax(-1).nan_to_num(0.0)
    weights[:, :, 0] = 1 / 6
    torch.testing.assert_close(out.double(), weights @ v.double(), rtol=0, atol=1e-5 if device == "cpu" else 2e-2)
    if mask.requires_grad:
        # The gradient is that of a softmax, whatever number the row has: P * (dP - delta), summed over the heads.
        (gradient,) = torch.autograd.grad(out.sum(), mask)
        products = v.double().sum(-1)[:, :, None]
        expected = weights * (products - (weights * products).sum(-1, keepdim=True))
        torch.testing.assert_close(gradient, expected.sum((0, 1)), rtol=0, atol=1e-4 if device == "cpu" else 1e-1)
