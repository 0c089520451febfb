"""n in the attention layers of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAMES: set[str] = set()  # of attn_n among the attention implementations
FIELD = "softmax_n"  # of a model's config, and the child of each attention layer


class SoftmaxN(nn.Module):
    """The n of one attention layer: `log_n` `(Hq,)`, a parameter if it is learned, else a buffer.

    As a child of its layer, and called, it is saved, sharded and wrapped as any other module is: PEFT takes
    `modules_to_save=["softmax_n"]`.
    """

    log_n: Tensor
    part: tuple[int, int] | None = None  # (rank, ranks) of tensor parallelism, where n is not learned

    def __init__(self, log_n: Tensor, learnable: bool) -> None:
        super().__init__()
        self.learnable = learnable
        if learnable:
            self.log_n = nn.Parameter(log_n)
        else:
            self.register_buffer("log_n", log_n)

    def forward(self, query: Tensor) -> Tensor:
        """Return the sinks `(Hq,)` for a query `(N, Hq, L, E)`, of one rank's heads if these are sharded."""
        log_n = self.log_n
        if log_n.shape[0] != query.shape[1]:
            if self.part is not None:
                log_n = log_n.chunk(self.part[1])[self.part[0]]
            log_n = of_this_rank(log_n, query)
        if log_n.shape[0] != query.shape[1]:
            raise ValueError(
                f"softmax_n: expected one number for each of the layer's {query.shape[1]} heads, got {log_n.shape[0]}."
                "\nTo do: where a plan of your own shards the heads, let it shard n alike: in a tp_plan of transformers"
                ' {"model.layers.*.self_attn.softmax_n": "attn_n_heads"}, else make log_n a DTensor, Shard(0).'
            )
        return log_n

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftmaxN:
        kept = self.log_n
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.learnable and self.log_n.dtype != kept.dtype:  # a model in half precision has the n it was given
            self.log_n = kept.to(self.log_n.device)
        return self


def of_this_rank(x: Tensor, query: Tensor) -> Tensor:
    """Return the local part of a DTensor beside a query that is one."""
    if hasattr(x, "to_local") and not hasattr(query, "to_local"):
        local: Tensor = x.to_local()
        return local
    return x


def attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the layers that look their attention function up, with their names."""
    for name, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            yield name, module


def heads(layer: nn.Module) -> int:
    found: int = getattr(layer, "num_heads", None) or layer.config.num_attention_heads  # type: ignore[union-attr, assignment]
    return found


def attach(layer: nn.Module, n: Tensor, learnable: bool) -> None:
    """Give n `()` or `(Hq,)` to an attention layer, which then refuses implementations other than ours."""
    where = next(layer.parameters())
    log_n = n.float().log().expand(heads(layer)).clone()
    log_n = log_n.to(device=where.device, dtype=where.dtype if learnable else torch.float32)
    detach(layer)
    layer.add_module(FIELD, SoftmaxN(log_n, learnable))
    layer.register_forward_pre_hook(_check_implementation)


def detach(layer: nn.Module) -> None:
    if FIELD in layer._modules:
        del layer._modules[FIELD]
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _check_implementation:
                del layer._forward_pre_hooks[key]


def _check_implementation(layer: nn.Module, args: Any) -> None:
    config: Any = layer.config
    if config._attn_implementation not in NAMES:
        raise ValueError(
            "attn_implementation: expected attn_n, because this model has softmax_n, which"
            f" {config._attn_implementation!r} would ignore.\n"
            'To do: model.set_attn_implementation("attn_n"), or strip_softmax_n(model).'
        )
