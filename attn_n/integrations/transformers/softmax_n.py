"""softmax_n in models of transformers that were made with plain softmax."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attn_n.integrations.transformers.layers import FIELD, NAMES, attach, attention_layers, detach, heads
from attn_n.integrations.transformers.registration import register
from attn_n.integrations.transformers.sharding import check_unsharded, follow_heads, stay_whole

Number: TypeAlias = float | Tensor


def set_softmax_n(
    model: PreTrainedModel, n: Number | Mapping[int | str, Number], *, learnable: bool = False
) -> PreTrainedModel:
    """Turn the softmax of a model's attention into softmax_n, and return the model.

    Args:
        n: a number >= 0, a tensor `(Hq,)`, or a mapping of these by layer: by `layer_idx`, or by the name that the
            attention layer has in `model.named_modules()`. Layers that are not named stay plain.
        learnable: make `log n` a parameter of each layer, `softmax_n.log_n`. n has to be greater than 0.

    The model runs by attn_n from now on, and refuses to run by anything else, which would ignore n. n is kept in the
    config too, so that `from_pretrained` restores it once `register()` was called; without it transformers warns of
    weights that it does not know. Where transformers shards the heads (`tp_plan`), it shards n alike.

    Raises:
        ValueError: the model has sinks of its own, or none of its layers is known to take n, or n is not as above; or
            n is learned and the model is sharded already, by FSDP2 or `parallelize_module`.
    """
    layers = dict(attention_layers(model))
    if not layers:
        raise ValueError(f"model: expected layers that use AttentionInterface, {type(model).__name__} has none")
    for name, layer in layers.items():
        if _has_sinks(layer):
            raise ValueError(
                f"model: expected plain softmax, {name} of {type(model).__name__} has sinks of its own; set these"
            )
    if learnable:
        check_unsharded(model)
    by_layer = {name: _checked(layers[name], x, learnable) for name, x in _by_layer(layers, n).items()}
    register()
    if model.config._attn_implementation not in NAMES:
        model.set_attn_implementation("attn_n")
    strip_softmax_n(model)
    for name, x in by_layer.items():
        attach(layers[name], x, learnable)
    follow_heads(model)
    setattr(model.config, FIELD, {"n": {name: x.tolist() for name, x in by_layer.items()}, "learnable": learnable})
    return model


def get_softmax_n(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return n `(Hq,)` by the name of each attention layer that has one; differentiable if it is learned."""
    return {
        name: layer.softmax_n(torch.empty(0, heads(layer), 0, 0)).exp()  # type: ignore[operator]
        for name, layer in attention_layers(model)
        if FIELD in layer._modules
    }


def strip_softmax_n(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with plain softmax again: what `set_softmax_n` has added is gone."""
    for _, layer in attention_layers(model):
        detach(layer)
    stay_whole(model)
    if hasattr(model.config, FIELD):
        delattr(model.config, FIELD)
    return model


def _has_sinks(layer: nn.Module) -> bool:
    constants = inspect.unwrap(type(layer).forward).__code__.co_consts
    keywords = {name for names in constants if isinstance(names, tuple) for name in names}
    return bool(keywords & {"s_aux", "sinks"})


def _by_layer(layers: dict[str, nn.Module], n: Number | Mapping[int | str, Number]) -> dict[str, Number]:
    if not isinstance(n, Mapping):
        return dict.fromkeys(layers, n)
    found = {}
    for key, x in n.items():
        names = [name for name, layer in layers.items() if key in (name, getattr(layer, "layer_idx", None))]
        if not names:
            raise ValueError(f"n: expected the names or the layer_idx of attention layers, got {key!r}")
        found.update(dict.fromkeys(names, x))
    return found


def _checked(layer: nn.Module, n: Number, learnable: bool) -> Tensor:
    x = torch.as_tensor(n, dtype=torch.float32).detach().cpu()
    if x.shape not in ((), (heads(layer),)):
        raise ValueError(f"n: expected a number or a tensor ({heads(layer)},), one a head, got {tuple(x.shape)}")
    positive = (x > 0 if learnable else x >= 0) & x.isfinite()
    if not bool(positive.all()):
        least = "greater than 0, because log n is learned" if learnable else ">= 0"
        raise ValueError(f"n: expected finite numbers {least}, got {x.tolist()}")
    return x
