"""n in the attention layers of a model, and its return when the model is loaded."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

NAMES: set[str] = set()  # of attn_n among the attention implementations
FIELD = "softmax_n"  # of a model's config, and the child of each attention layer


class SoftmaxN(nn.Module):
    """The n of one attention layer: `log_n` `(Hq,)`, a parameter if it is learned, else a buffer.

    As a child of its layer, and called, it is saved, sharded and wrapped as any other module is: PEFT takes
    `modules_to_save=["softmax_n"]`.
    """

    log_n: Tensor

    def __init__(self, log_n: Tensor, learnable: bool) -> None:
        super().__init__()
        self.learnable = learnable
        if learnable:
            self.log_n = nn.Parameter(log_n)
        else:
            self.register_buffer("log_n", log_n)

    def forward(self, query: Tensor) -> Tensor:
        """Return the sinks `(Hq,)` for a query `(N, Hq, L, E)`."""
        if self.log_n.shape[0] != query.shape[1]:
            raise ValueError(
                f"softmax_n: expected one number for each of the layer's {query.shape[1]} heads,"
                f" got {self.log_n.shape[0]}; heads that are sharded need their part of it"
            )
        return self.log_n

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftmaxN:
        kept = self.log_n
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.learnable and self.log_n.dtype != kept.dtype:  # a model in half precision has the n it was given
            self.log_n = kept.to(self.log_n.device)
        return self


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


@functools.cache
def restore_on_loading() -> None:
    """Give models whose config has n their layers of n, before their weights are loaded."""
    post_init = PreTrainedModel.post_init

    @functools.wraps(post_init)
    def restoring(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = post_init(self, *args, **kwargs)
        if kept := getattr(self.config, FIELD, None):
            _restore(self, kept["n"], kept["learnable"])
        return result

    PreTrainedModel.post_init = restoring


def _restore(model: PreTrainedModel, by_name: dict[str, list[float]], learnable: bool) -> None:
    found = False
    for name, layer in attention_layers(model):
        # A part of the model that was saved has shorter names, a larger model has longer ones.
        alike = [x for x in by_name if x == name or x.endswith(f".{name}") or name.endswith(f".{x}")]
        found = found or bool(alike)
        kept = name if name in by_name else alike[0] if len(alike) == 1 else None
        if kept is not None:
            attach(layer, torch.tensor(by_name[kept]), learnable)
    if not found:
        logger.warning("the config of %s has softmax_n for layers that it does not have", type(model).__name__)
    elif model.config._attn_implementation not in NAMES:
        logger.warning("%s has softmax_n: its attn_implementation is attn_n", type(model).__name__)
        model.set_attn_implementation("attn_n")
