"""The return of n when a model is loaded."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from attn_n.integrations.transformers.layers import FIELD, NAMES, attach, attention_layers
from attn_n.integrations.transformers.sharding import follow_heads

logger = logging.getLogger(__name__)


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
    follow_heads(model)
    if not found:
        logger.warning("the config of %s has softmax_n for layers that it does not have", type(model).__name__)
    elif model.config._attn_implementation not in NAMES:
        logger.warning("%s has softmax_n: its attn_implementation is attn_n", type(model).__name__)
        model.set_attn_implementation("attn_n")
