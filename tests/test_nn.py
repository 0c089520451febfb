"""`attn_n.nn`: PyTorch's attention module with n, by itself and in PyTorch's layers."""

from __future__ import annotations

import copy
import inspect
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_n.nn import MultiheadAttentionN
from attn_n.nn.functional import scaled_dot_product_attention_n, softmax_n
from tests.oracle import attention_n

EMBED, HEADS, BATCH, L, S = 8, 2, 3, 4, 5
SINKS = torch.tensor([-1.5, 3.0], dtype=torch.float64)


def pair(n: dict[str, Any] | None = None, **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttentionN]:
    """Return PyTorch's module and ours with the same parameters, biases other than zero among them, in float64."""
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = MultiheadAttentionN(EMBED, HEADS, dtype=torch.float64, **options, **(n or {}))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(batch_first: bool = False, kdim: int = EMBED, vdim: int = EMBED) -> list[Tensor]:
    sizes = (L, EMBED), (S, kdim), (S, vdim)
    made = [torch.randn(BATCH, length, size, dtype=torch.float64) for length, size in sizes]
    return [(x if batch_first else x.transpose(0, 1)).requires_grad_() for x in made]


def results(module: nn.Module, x: list[Tensor], **given: Any) -> list[Tensor]:
    """Return out, the weights if there are any, and the gradients by all inputs and parameters."""
    out, weights = module(*x, **given)
    outputs = [out] if weights is None else [out, weights]
    torch.manual_seed(1)
    loss = sum((each * torch.randn(each.shape, dtype=each.dtype)).sum() for each in outputs)
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, [*x, *module.parameters()])]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


HIDDEN = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]) > 0
CAUSAL = torch.ones(L, S).triu(1) > 0
FLOATING = torch.randn(BATCH * HEADS, L, S, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": HIDDEN},
    "causal": {"attn_mask": CAUSAL},
    "hint": {"attn_mask": CAUSAL, "is_causal": True},
    "both": {"key_padding_mask": HIDDEN, "attn_mask": CAUSAL.expand(BATCH * HEADS, L, S)},
    "floating": {"attn_mask": FLOATING},
    "floating both": {"key_padding_mask": torch.zeros(BATCH, S).double().masked_fill(HIDDEN, -math.inf),
                      "attn_mask": FLOATING},
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True},
                                     {"bias": False, "kdim": 6, "vdim": 10}])  # fmt: skip
@pytest.mark.parametrize("batch_first", [False, True])
def test_plain_softmax_and_a_key_of_zeros_are_pytorchs(options: dict[str, Any], batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first, **options)
    x = inputs(batch_first, options.get("kdim", EMBED), options.get("vdim", EMBED))
    for name, mask in MASKS.items():
        for given in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            if name == "hint" and "add_zero_attn" in options and "need_weights" in given:
                continue  # PyTorch hides the added keys there, which with need_weights it does not
            assert_close(results(ours, x, **mask, **given), results(theirs, x, **mask, **given))


@pytest.mark.parametrize("mask", MASKS)
def test_n_1_is_a_key_of_zeros(mask: str) -> None:
    _, ours = pair({"softmax_n": 1.0})
    theirs = nn.MultiheadAttention(EMBED, HEADS, add_zero_attn=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = inputs()
    expected, of_keys = theirs(*x, **MASKS[mask])
    found, weights = ours(*x, **MASKS[mask])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights, of_keys[..., :-1])
    assert (weights.sum(-1) < 0.999).any()
    torch.testing.assert_close(ours(*x, **MASKS[mask], need_weights=False)[0], expected)


@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize("kind", ["number", "per head", "learned", "sinks", "learned sinks"])
def test_n_against_the_oracle(kind: str, add_zero_attn: bool) -> None:
    n = SINKS.exp()
    given: dict[str, Any] = {
        "number": {"softmax_n": 5.0}, "per head": {"softmax_n": n}, "learned": {"softmax_n": nn.Parameter(n.clone())},
        "sinks": {"sinks": SINKS}, "learned sinks": {"sinks": nn.Parameter(SINKS.clone())},
    }[kind]  # fmt: skip
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64)
    ours = MultiheadAttentionN(EMBED, HEADS, dtype=torch.float64, add_zero_attn=add_zero_attn, **given)
    extra = {name: ours.state_dict()[name] for name in given if "learned" in kind}
    assert ours.state_dict().keys() == theirs.state_dict().keys() | extra.keys()
    x = inputs()
    parameters = list(ours.parameters())
    q, k, v = (
        F.linear(each, w, b).unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3)
        for each, w, b in zip(x, ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3), strict=True)
    )
    of_oracle = given.get("softmax_n")
    of_oracle = given["sinks"].exp() if of_oracle is None else of_oracle
    out, _ = attention_n(q, k, v, of_oracle + add_zero_attn)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), ours.out_proj.weight, ours.out_proj.bias)
    keys = torch.eye(S, dtype=torch.float64).expand(BATCH, HEADS, S, S)
    of_keys, _ = attention_n(q, k, keys, of_oracle + add_zero_attn)
    torch.testing.assert_close(ours(*x, average_attn_weights=False)[1][..., :S], of_keys)
    expected = torch.autograd.grad((out * out.detach().cos()).sum(), [*x, *parameters])
    for need_weights in (False, True):
        found, _ = ours(*x, need_weights=need_weights)
        torch.testing.assert_close(found, out)
        gradients = torch.autograd.grad((found * out.detach().cos()).sum(), [*x, *parameters])
        assert_close(list(gradients), list(expected))


def test_rows_without_keys_are_zero() -> None:
    ours = MultiheadAttentionN(EMBED, HEADS, bias=False, softmax_n=0.0, dtype=torch.float64)
    x = inputs()
    hidden = torch.ones(L, S) > 0
    for given in ({"need_weights": False}, {}):
        found = results(ours, x, attn_mask=hidden, **given)
        assert all(torch.equal(each, torch.zeros_like(each)) for each in found)


def test_only_infinity_hides() -> None:
    theirs, ours = pair()
    x, mask = inputs(), FLOATING.clone()
    mask[:, 1] = torch.finfo(torch.float64).min
    assert_close(results(ours, x, attn_mask=mask), results(theirs, x, attn_mask=mask))
    found, _ = ours(*x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(found, theirs(*x, attn_mask=mask)[0])


def test_without_a_batch() -> None:
    theirs, ours = pair({"softmax_n": 0.0}, batch_first=True)
    x = [each[0].detach().requires_grad_() for each in inputs(batch_first=True)]
    mask = {"key_padding_mask": HIDDEN[1], "attn_mask": FLOATING[:HEADS]}
    for given in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        assert_close(results(ours, x, **mask, **given), results(theirs, x, **mask, **given))


def test_dropout_is_on_the_weights_while_training() -> None:
    ours = MultiheadAttentionN(EMBED, HEADS, dropout=0.5, softmax_n=1.0, dtype=torch.float64)
    x = inputs()
    out, weights = ours(*x, average_attn_weights=False)
    v = F.linear(x[2], ours.in_proj_weight[-EMBED:], ours.in_proj_bias[-EMBED:])
    joined = (weights @ v.unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3)).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(out, ours.out_proj(joined))
    assert 0.2 < (weights == 0).double().mean() < 0.8
    plain, _ = ours(*x, need_weights=False)
    assert not torch.allclose(plain, ours.eval()(*x, need_weights=False)[0])
    assert torch.allclose(ours(*x)[0], ours(*x, need_weights=False)[0])


def test_causal_without_a_mask() -> None:
    ours = MultiheadAttentionN(EMBED, HEADS, softmax_n=1.0, batch_first=True)
    x = torch.randn(BATCH, L, EMBED)
    mask = torch.ones(L, L).triu(1) > 0
    for given in ({"need_weights": False}, {}):
        masked, hinted = ours(x, x, x, attn_mask=mask, **given), ours(x, x, x, is_causal=True, **given)
        torch.testing.assert_close(hinted, masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("swapped", ["before", "after"])
def test_encoder_does_not_bypass_n(swapped: str, dtype: torch.dtype, ran: list[str]) -> None:
    """PyTorch's fused layer, and its NestedTensors of padded batches, are for inference without gradients."""

    def module() -> MultiheadAttentionN:
        return MultiheadAttentionN(EMBED, HEADS, batch_first=True, softmax_n=20.0)

    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)
    if swapped == "before":
        layer.self_attn = module()
    encoder = nn.TransformerEncoder(layer, 2)
    if swapped == "after":
        for each in encoder.layers:
            state = each.self_attn.state_dict()
            each.self_attn = module()
            each.self_attn.load_state_dict(state)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True), 2)
    plain.load_state_dict(encoder.state_dict())
    encoder, plain, x = encoder.to(dtype), plain.to(dtype), torch.randn(BATCH, S, EMBED, dtype=dtype)
    for given in ({}, {"src_key_padding_mask": HIDDEN}, {"mask": torch.ones(S, S).triu(1) > 0}):
        expected = encoder.train()(x, **given)  # never fused
        assert not torch.allclose(expected, plain.train()(x, **given), atol=0.1)
        encoder.eval(), ran.clear()
        with torch.no_grad():
            found = encoder(x, **given)
        assert ran == ["forward sdpa:cpu"] * 2
        if "src_key_padding_mask" in given:
            found, expected = (y.masked_fill(HIDDEN[..., None], 0.0) for y in (found, expected))
        torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0.0)


def test_decoder_layer() -> None:
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True).eval()
    zeros = copy.deepcopy(layer)
    for name in ("self_attn", "multihead_attn"):
        state = getattr(layer, name).state_dict()
        ours = MultiheadAttentionN(EMBED, HEADS, batch_first=True, softmax_n=1.0)
        theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, add_zero_attn=True)
        ours.load_state_dict(state), theirs.load_state_dict(state)
        setattr(layer, name, ours), setattr(zeros, name, theirs)
    x, memory = torch.randn(BATCH, L, EMBED), torch.randn(BATCH, S, EMBED)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    given = {"tgt_mask": mask, "memory_key_padding_mask": HIDDEN.float().masked_fill(HIDDEN, -math.inf)}
    torch.testing.assert_close(layer(x, memory, **given), zeros(x, memory, **given))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors(layout: torch.layout) -> None:
    ours = MultiheadAttentionN(EMBED, HEADS, batch_first=True, softmax_n=2.0, dtype=torch.float64)
    sequences = [torch.randn(length, EMBED, dtype=torch.float64) for length in (3, 1, 5)]
    memory = [torch.randn(length, EMBED, dtype=torch.float64) for length in (2, 4, 1)]
    for keys, is_causal in ((sequences, True), (sequences, False), (memory, False)):
        query = torch.nested.nested_tensor(sequences, layout=layout)
        key = query if keys is sequences else torch.nested.nested_tensor(keys, layout=layout)
        out, weights = ours(query, key, key, need_weights=False, is_causal=is_causal)
        assert weights is None
        for one, x, y in zip(out.unbind(), sequences, keys, strict=True):
            alone = ours(x[None], y[None], y[None], need_weights=False, is_causal=is_causal)[0][0]
            torch.testing.assert_close(one, alone)
        if layout is torch.jagged or key is query:
            out + query  # of the same lengths for PyTorch, too
    with pytest.raises(ValueError, match="query: expected a dense tensor together with need_weights"):
        ours(query, query, query)
    with pytest.raises(ValueError, match="is_causal: expected False for NestedTensors of two lengths"):
        ours(query, key, key, need_weights=False, is_causal=True)
    with pytest.raises(ValueError, match="expected NestedTensors all"):
        ours(query, torch.randn(1, 2, EMBED), torch.randn(1, 2, EMBED), need_weights=False)


def test_signature_is_pytorchs() -> None:
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(nn.MultiheadAttention, method)).parameters
        ours = inspect.signature(getattr(MultiheadAttentionN, method)).parameters
        shared = [(name, ours[name].default) for name in ours if name in theirs]
        assert shared == [(name, parameter.default) for name, parameter in theirs.items()]
        assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours if name not in theirs)


def test_saved_copied_and_moved() -> None:
    ours = MultiheadAttentionN(EMBED, HEADS, sinks=SINKS.float(), batch_first=True)
    assert "sinks=" in repr(ours)
    assert "n=1.0" in repr(MultiheadAttentionN(EMBED, HEADS, softmax_n=1))
    x = torch.randn(1, L, EMBED)
    stored = io.BytesIO()
    torch.save(ours, stored)
    stored.seek(0)
    for other in (copy.deepcopy(ours), torch.load(stored, weights_only=False)):
        torch.testing.assert_close(other(x, x, x), ours(x, x, x))
    assert ours.to(torch.float64).sinks.dtype == torch.float64


@pytest.mark.slow
def test_compiled() -> None:
    ours = MultiheadAttentionN(EMBED, HEADS, softmax_n=1.0, batch_first=True)
    x, mask = torch.randn(2, L, EMBED), torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]]) > 0
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x, x, mask), ours(x, x, x, mask))


def test_under_autocast() -> None:
    ours = MultiheadAttentionN(EMBED, HEADS, softmax_n=1.0, batch_first=True)
    x = torch.randn(2, L, EMBED)
    exact_out, exact = ours(x, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(x, x, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(weights.float(), exact, atol=0.02, rtol=0.0)
    torch.testing.assert_close(out.float(), exact_out, atol=0.02, rtol=0.0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="sinks: expected None together with softmax_n"):
        MultiheadAttentionN(EMBED, HEADS, softmax_n=1.0, sinks=SINKS)
    with pytest.raises(ValueError, match=r"softmax_n: expected shape \(\) or \(2,\), got \(3,\)"):
        MultiheadAttentionN(EMBED, HEADS, softmax_n=torch.ones(3))
    with pytest.raises(ValueError, match="softmax_n: expected a finite number >= 0"):
        MultiheadAttentionN(EMBED, HEADS, softmax_n=-1.0)
    ours = MultiheadAttentionN(EMBED, HEADS, dtype=torch.float64)
    x = inputs()
    with pytest.raises(ValueError, match=r"value: expected shape \(length, N, 8\)"):
        ours(x[0], x[1], x[2][..., :4])
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \(3, 5\), got \(3, 4\)"):
        ours(*x, key_padding_mask=HIDDEN[:, :4])
    with pytest.raises(TypeError, match=r"attn_mask: expected bool \(True is hidden\) or a floating dtype"):
        ours(*x, attn_mask=CAUSAL.int())
    with pytest.raises(ValueError, match="attn_mask: expected a mask together with is_causal=True for 4 queries and 5"):
        ours(*x, is_causal=True)


def test_functional() -> None:
    q, k, v = (torch.randn(2, 2, 5, 8) for _ in "qkv")
    nothing = [F.pad(x, (0, 0, 0, 1)) for x in (k, v)]
    torch.testing.assert_close(
        scaled_dot_product_attention_n(q, k, v, sm_n=1.0), F.scaled_dot_product_attention(q, *nothing)
    )
    torch.testing.assert_close(softmax_n(q, 1.0), F.pad(q, (0, 1)).softmax(-1)[..., :-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_on_a_gpu(dtype: torch.dtype) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttentionN(64, 4, batch_first=True, softmax_n=20.0)
    encoder = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 5, 64)
    expected = encoder.train().double()(x.double(), src_key_padding_mask=HIDDEN)
    encoder = encoder.eval().to("cuda", dtype)
    with torch.no_grad():
        found = encoder(x.to("cuda", dtype), src_key_padding_mask=HIDDEN.cuda())
    difference = (found.cpu().double() - expected).masked_fill(HIDDEN[..., None], 0.0)
    assert difference.abs().max() < (1e-2 if dtype == torch.float32 else 0.1)
