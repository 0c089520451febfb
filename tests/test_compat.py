"""FlashAttention's and PyTorch's functions under their own signatures."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_n import UnsupportedError
from attn_n.compat import flash_attn
from attn_n.compat.torch import scaled_dot_product_attention
from tests.oracle import attention_n


def inputs(lengths: tuple[int, int] = (6, 9)) -> list[Tensor]:
    """Return q, k and v `(B, length, heads, E)` with negative logits."""
    sizes = (lengths[0], 4), (lengths[1], 2), (lengths[1], 2)
    q, k, v = (torch.randn(2, length, heads, 8) for length, heads in sizes)
    q[..., 0], k[..., 0] = -2.0, 3.0
    return [x.requires_grad_() for x in (q, k, v)]


def exact(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    out, lse = attention_n(*(x.double().transpose(1, 2) for x in (q, k, v)), **keywords)
    return out.transpose(1, 2), lse


SINKS = torch.tensor([0.0, -2.0, 3.0, 20.0])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, {}),
        ({"causal": True, "sm_n": 1.0}, {"causal": True, "n": 1.0}),
        ({"window_size": (3, 0), "s_aux": SINKS}, {"window": (3, 0), "sinks": SINKS.double()}),
        ({"window_size": (-1, 2), "learnable_sink": SINKS}, {"window": (None, 2), "sinks": SINKS.double()}),
        ({"softmax_scale": 0.3, "softcap": 2.0}, {"scale": 0.3, "softcap": 2.0}),
        ({"alibi_slopes": SINKS.abs() / 20, "deterministic": True}, {"alibi_slopes": SINKS.abs() / 20}),
    ],
)
def test_flash_attn_func(given: dict[str, Any], meant: dict[str, Any]) -> None:
    x = inputs()
    truth, truth_lse = exact(*x, **meant)
    out, lse, probs = flash_attn.flash_attn_func(*x, return_attn_probs=True, **given)
    assert probs is None
    assert torch.allclose(out.double(), truth, atol=1e-5)
    assert torch.allclose(lse.double(), truth_lse, atol=1e-5)
    alone = flash_attn.flash_attn_func(*x, **given)
    assert isinstance(alone, Tensor)
    expected = torch.autograd.grad(truth.sum(), x)
    for gradient, one in zip(torch.autograd.grad(alone.sum(), x), expected, strict=True):
        assert torch.allclose(gradient, one, atol=1e-4)


def test_qkvpacked() -> None:
    q, _, _ = inputs()
    qkv = torch.stack([q, torch.randn_like(q), torch.randn_like(q)], 2)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, 0.0, None, True, s_aux=SINKS)
    assert torch.allclose(out.double(), exact(*qkv.unbind(2), causal=True, sinks=SINKS.double())[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"qkv: expected shape \(batch, length, 3, heads, head_dim\)"):
        flash_attn.flash_attn_qkvpacked_func(q)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("how", ["packed", "seqused", "paged"])
def test_varlen(how: str) -> None:
    starts_q, starts_k, used_k = (0, 3, 7), (0, 5, 12), (4, 7)
    q, k, v = torch.randn(7, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    given, tensors = {}, [q, k, v]
    if how == "seqused":
        given["seqused_k"] = int32(*used_k)
    elif how == "paged":
        pages = torch.full((2, 9, 4, 2, 8), torch.nan)
        table = int32(7, 2, -1, 0, 5, -1).view(2, 3)
        for b, begin in enumerate(starts_k[:-1]):
            for i, row in enumerate(range(begin, starts_k[b + 1])):
                pages[0, table[b, i // 4], i % 4], pages[1, table[b, i // 4], i % 4] = k[row], v[row]
        tensors, given["block_table"] = [q, pages[0], pages[1]], table
    cu = int32(*starts_q), int32(*starts_k)
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *tensors, *cu, 4, 7, causal=True, return_attn_probs=True, sm_n=1.0, **given
    )
    for b in range(2):
        rows, begin = slice(starts_q[b], starts_q[b + 1]), starts_k[b]
        keys = slice(begin, begin + used_k[b] if how == "seqused" else starts_k[b + 1])
        truth, truth_lse = exact(q[None, rows], k[None, keys], v[None, keys], n=1.0, causal=True)
        assert torch.allclose(out[rows].double(), truth[0], atol=1e-5)
        assert torch.allclose(lse[:, rows].double(), truth_lse[0], atol=1e-5)


@pytest.mark.parametrize("paged", [False, True])
def test_with_kvcache(paged: bool) -> None:
    q, k, v = (x.detach() for x in inputs((2, 2)))
    past = [torch.randn(2, 16, 2, 8) for _ in "kv"]
    caches, given = [x.clone() for x in past], {}
    if paged:
        given["block_table"] = int32(3, 0, 2, 1, 7, 4, 6, 5).view(2, 4)
        order = given["block_table"].flatten().long()
        caches = [torch.empty(8, 4, 2, 8).index_copy_(0, order, x.reshape(8, 4, 2, 8)) for x in past]
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=int32(5, 12), causal=True, return_softmax_lse=True, s_aux=SINKS, **given
    )
    for b, length in enumerate((5, 12)):
        keys, values = (torch.cat([x[b, :length], new[b]])[None] for x, new in zip(past, (k, v), strict=True))
        truth, truth_lse = exact(q[b : b + 1], keys, values, causal=True, sinks=SINKS.double())
        assert torch.allclose(out[b].double(), truth[0], atol=1e-5)
        assert torch.allclose(lse[b].double(), truth_lse[0], atol=1e-5)


def test_positions_of_arguments() -> None:
    """Those of FlashAttention 2.8; what is ours comes by keyword alone."""
    options = "dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs"
    packing = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
    expected = {
        "flash_attn_func": f"q, k, v, {options}",
        "flash_attn_qkvpacked_func": f"qkv, {options}",
        "flash_attn_varlen_func": f"q, k, v, {packing}, {options}, block_table",
        "flash_attn_with_kvcache": "q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,"
        " cache_leftpad, block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes,"
        " num_splits, return_softmax_lse",
    }
    for name, positions in expected.items():
        parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
        assert ", ".join(x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD) == positions


def test_what_is_refused() -> None:
    x = inputs()
    with pytest.raises(UnsupportedError, match="return_attn_probs: with dropout"):
        flash_attn.flash_attn_func(*x, 0.1, return_attn_probs=True)
    with pytest.raises(ValueError, match="learnable_sink: expected None together with s_aux"):
        flash_attn.flash_attn_func(*x, s_aux=SINKS, learnable_sink=SINKS)


SHAPES = [
    ((2, 4, 5, 8), (2, 4, 7, 8)),
    ((2, 4, 7, 8), (2, 4, 5, 8)),
    ((5, 8), (7, 8)),
    ((3, 5, 8), (3, 7, 8)),
    ((2, 4, 5, 8), (4, 7, 8)),  # k and v of three dimensions
    ((2, 4, 5, 8), (1, 1, 7, 8)),
    ((1, 1, 5, 8), (2, 4, 7, 8)),
    ((2, 3, 4, 5, 8), (3, 4, 7, 8)),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("of_q", "of_k"), SHAPES, ids=str)
def test_scaled_dot_product_attention(of_q: tuple[int, ...], of_k: tuple[int, ...], is_causal: bool) -> None:
    """At n = 0 it is PyTorch's own, and at n > 0 that with one more key of logit log n and value 0."""
    q, k, v = torch.randn(of_q), torch.randn(of_k), torch.randn(of_k)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3)
    assert torch.allclose(scaled_dot_product_attention(q, k, v, None, 0.0, is_causal, 0.3), expected, atol=1e-5)
    mask = torch.zeros(q.shape[-2], k.shape[-2] + 1)
    if is_causal:
        mask[:, :-1].masked_fill_(torch.ones(q.shape[-2], k.shape[-2]).tril() == 0, -torch.inf)
    mask[:, -1] = torch.tensor(3.0).log()
    nothing = [torch.cat([x, torch.zeros_like(x[..., :1, :])], -2) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q, *nothing, attn_mask=mask, scale=0.3)
    found = scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3, sm_n=3.0)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("lengths", [(6, 6), (4, 6), (6, 4)], ids=str)
def test_causal_in_one_graph(lengths: tuple[int, int]) -> None:
    q, k = torch.randn(1, 2, lengths[0], 8), torch.randn(1, 2, lengths[1], 8)
    torch._dynamo.reset()
    compiled = torch.compile(scaled_dot_product_attention, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, k, is_causal=True), F.scaled_dot_product_attention(q, k, k, is_causal=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    def made(*lengths: int, layout: torch.layout = torch.jagged) -> Tensor:
        rows = [torch.randn(n, 4, 8, generator=torch.Generator().manual_seed(n)) for n in lengths]
        return torch.nested.nested_tensor(rows, layout=layout).transpose(1, 2)

    q = made(3, 5)
    for is_causal in (False, True):
        found = scaled_dot_product_attention(q, q, q, is_causal=is_causal, sm_n=2.0)
        for row, x in zip(found.unbind(), q.unbind(), strict=True):
            assert torch.allclose(row, scaled_dot_product_attention(x, x, x, is_causal=is_causal, sm_n=2.0), atol=1e-6)
    k = made(4, 7)
    assert scaled_dot_product_attention(q, k, k).shape == q.shape
    with pytest.raises(ValueError, match="is_causal: expected False for NestedTensors of two lengths"):
        scaled_dot_product_attention(q, k, k, is_causal=True)
    with pytest.raises(TypeError, match=r"got a NestedTensor of layout torch.strided"):
        scaled_dot_product_attention(*3 * [made(3, 5, layout=torch.strided)])


def test_masks_and_groups() -> None:
    q, k, v, mask = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8), torch.rand(5, 7) > 0.3
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert torch.allclose(scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), expected, atol=1e-5)
    with pytest.raises(ValueError, match="enable_gqa: expected True for 2 KV heads beside 4 heads of query"):
        scaled_dot_product_attention(q, k, v)
    with pytest.raises(ValueError, match="attn_mask: expected None together with is_causal=True"):
        scaled_dot_product_attention(q, q, q, torch.ones(5, 5) > 0, is_causal=True)
    with pytest.raises(ValueError, match="key: expected a tensor of 2 or more dimensions"):
        scaled_dot_product_attention(q, k[0, 0, 0], v)
