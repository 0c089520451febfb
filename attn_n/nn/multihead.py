"""`torch.nn.MultiheadAttention`, with n."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_n.call import autocast, checks
from attn_n.functional import flash_attention_n, flash_attention_n_varlen
from attn_n.nn import masks
from attn_n.softmax import softmax_n


class MultiheadAttentionN(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose weights are `exp(s_ij) / (n + sum_j exp(s_ij))`.

    It has the arguments, the parameters and the state_dict of PyTorch's, and takes its place in
    `TransformerEncoderLayer` and `TransformerDecoderLayer` (`layer.self_attn = MultiheadAttentionN(...)`). PyTorch's
    fused layer for inference, which knows no n, is then not taken.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, kdim, vdim, batch_first, device, dtype: as PyTorch has them.
        add_zero_attn: one more key and value of zeros, which is one more n; its weight is the last column of the
            weights, as PyTorch has it.
        softmax_n: n >= 0: a number; or a tensor `()` or `(num_heads,)`, which is learned and in the state_dict if it is
            a `torch.nn.Parameter`, and else fixed. None is 0.
        sinks: `log n` in place of it, a tensor `(num_heads,)`; the better one to learn, since it may be any number.
        backend: as in `flash_attention_n`.

    Raises:
        TypeError, ValueError: the text names the argument, what was expected and what came.
    """

    softmax_n: float | Tensor | None
    sinks: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        softmax_n: float | Tensor | None = None,
        sinks: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if softmax_n is not None and sinks is not None:
            raise ValueError("sinks: expected None together with softmax_n (a sink is log n), got both")
        if not isinstance(softmax_n, Tensor):
            softmax_n = None if softmax_n is None else checks.n_number("softmax_n", softmax_n)
        for name, n, shapes in (("softmax_n", softmax_n, ((), (num_heads,))), ("sinks", sinks, ((num_heads,),))):
            if isinstance(n, Tensor) and tuple(n.shape) not in shapes:
                raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(n.shape)}")
            if isinstance(n, Tensor) and not isinstance(n, nn.Parameter):
                self.register_buffer(name, n, persistent=False)
            else:
                setattr(self, name, n)
        self.backend = backend
        # TransformerEncoderLayer would take a fused kernel past this module, which it does not where there are hooks.
        self.register_forward_pre_hook(_bars_the_fused_layer)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; shapes, masks and results are those of `torch.nn.MultiheadAttention`.

        Args:
            query: `(L, N, embed_dim)`, with batch_first `(N, L, embed_dim)`, without a batch `(L, embed_dim)`; or, with
                batch_first and `need_weights=False`, a NestedTensor `(N, j, embed_dim)`, as key and value then are.
            key: the same with S and kdim; value: the same with S and vdim.
            key_padding_mask: `(N, S)` or `(S,)`: bool (True is hidden) or floating (added to the logits).
            need_weights: also return the weights, which takes memory proportional to L * S.
            attn_mask: `(L, S)` or `(N * num_heads, L, S)`: bool (True is hidden) or floating.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: says that attn_mask is causal, which then need not be read; without attn_mask, for L = S, query i
                sees the keys `j <= i` (PyTorch refuses that).

        Returns:
            out, shaped as query; and None or the weights `(N, L, S)`, for each head `(N, num_heads, L, S)`, without N
            for inputs without a batch. They sum to less than 1. add_bias_kv and add_zero_attn add a column each. With
            dropout the weights are those after it.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if need_weights or key_padding_mask is not None or attn_mask is not None or self.bias_k is not None:
                raise ValueError(
                    "query: expected a dense tensor together with need_weights, masks or add_bias_kv, got a"
                    " NestedTensor: pass need_weights=False and no mask, or a padded tensor and key_padding_mask"
                )
            return self._attend_nested(query, key, value, is_causal), None
        batched = query.dim() == 3
        for name, x, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() not in (2, 3) or (x.dim() == 3) != batched or x.shape[-1] != size:
                layout = "(N, length" if self.batch_first else "(length, N"
                expected = f"{layout}, {size})" if batched else f"(length, {size})"
                raise ValueError(f"{name}: expected shape {expected} beside query {_shape(query)}, got {_shape(x)}")
        q, k, v = (self._heads(x, batched) for x in self._projected(query, key, value))
        len_q, len_k = q.shape[2], k.shape[2]
        if is_causal and self.bias_k is None and len_q == len_k:
            attn_mask, causal = None, True
        elif is_causal and attn_mask is None:
            raise ValueError(
                f"attn_mask: expected a mask together with is_causal=True for {len_q} queries and {len_k} keys or with"
                " add_bias_kv, got None"
            )
        else:
            causal = False
        mask = masks.combined(key_padding_mask, attn_mask, q, len_k, batched)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._with_one_more(k, self.bias_k), self._with_one_more(v, self.bias_v)
            mask = None if mask is None else masks.with_one_more_key(mask)
        dropout_p = self.dropout if self.training else 0.0
        attend: Any = flash_attention_n
        # With weights that are dropped out is made of these; this call then is for those who watch calls.
        of_call = 0.0 if need_weights else dropout_p
        out = attend(q, k, v, causal, attn_mask=mask, dropout_p=of_call, backend=self.backend, **self._n())
        if not need_weights:
            return self._joined(out, batched), None
        weights = F.dropout(self._weights(q, k, mask, causal), dropout_p)
        if dropout_p:
            out = weights[..., : k.shape[2]].to(v.dtype) @ v
        weights = weights.to(q.dtype)
        weights = weights.mean(1) if average_attn_weights else weights
        return self._joined(out, batched), weights if batched else weights[0]

    def extra_repr(self) -> str:
        return f"sinks={self.sinks}" if self.softmax_n is None and self.sinks is not None else f"n={self.softmax_n}"

    def _n(self) -> dict[str, Any]:
        """Return n for `flash_attention_n`; a key of zeros has the logit 0."""
        if self.sinks is not None:
            sinks = self.sinks
            return {"sinks": torch.logaddexp(sinks, torch.zeros_like(sinks)) if self.add_zero_attn else sinks}
        if not self.add_zero_attn:
            return {"sm_n": self.softmax_n}
        return {"sm_n": 1.0 if self.softmax_n is None else self.softmax_n + 1.0}

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(*each) for each in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x: Tensor, batched: bool = True) -> Tensor:
        """Return `(N, heads, length, head_dim)` of what query, key or value was projected to."""
        x = (x if batched else x[None]).unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if self.batch_first or not batched else x.permute(1, 2, 0, 3)

    def _with_one_more(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return keys or values `(N, heads, S, head_dim)` with a bias `(1, 1, embed_dim)` behind them."""
        of_heads = bias.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return torch.cat([x, of_heads.to(x.dtype).expand(len(x), -1, -1, -1)], 2)

    def _joined(self, out: Tensor, batched: bool) -> Tensor:
        """Return the result in the layout of query for out `(N, heads, L, head_dim)`."""
        order = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        joined: Tensor = self.out_proj(out.permute(order).flatten(2))
        return joined if batched else joined[0]

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Return the weights `(N, heads, L, S)`, at least in float32; add_zero_attn has one more column."""
        compute = torch.promote_types(q.dtype, torch.float32)
        with autocast.suspended(q.device.type):
            logits = q.to(compute) @ k.to(compute).mT / math.sqrt(self.head_dim)
        if causal:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(hidden, -math.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        if self.add_zero_attn:
            logits = F.pad(logits, (0, 1))
        if self.sinks is not None:
            of_sinks = self.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
            return softmax_n(torch.cat([logits, of_sinks], -1))[..., :-1]
        n = self.softmax_n
        return softmax_n(logits, n[:, None, None] if isinstance(n, Tensor) and n.dim() else n)

    def _attend_nested(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        """Attend in NestedTensors of either layout, as `TransformerEncoder` makes them of padded batches."""
        if not self.batch_first or not (query.is_nested and key.is_nested and value.is_nested):
            raise ValueError("query, key, value: expected NestedTensors all, with batch_first=True, or none")
        if is_causal and query is not key:
            raise ValueError("is_causal: expected False for NestedTensors of two lengths, got True")
        sequences = [x.unbind() for x in (query, key, value)]
        lengths_q, lengths_k = ([len(x) for x in each] for each in sequences[:2])
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim)) for x in self._projected(*map(torch.cat, sequences))
        )
        starts_q, starts_k = (
            F.pad(torch.tensor(each, dtype=torch.int32, device=q.device).cumsum(0, dtype=torch.int32), (1, 0))
            for each in (lengths_q, lengths_k)
        )
        attend: Any = flash_attention_n_varlen
        out = attend(
            q, k, v, starts_q, starts_k, max(lengths_q, default=0), max(lengths_k, default=0), is_causal,
            dropout_p=self.dropout if self.training else 0.0, backend=self.backend, **self._n(),
        )  # fmt: skip
        joined: Tensor = self.out_proj(out.flatten(1))
        nested: Any = query
        if query.layout is torch.jagged:
            return torch.nested.nested_tensor_from_jagged(joined, nested.offsets())
        return torch.nested.as_nested_tensor(list(joined.split(lengths_q)))


def _bars_the_fused_layer(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Do nothing, where PyTorch sees it."""


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
