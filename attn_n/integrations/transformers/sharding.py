"""n beside heads that transformers shards: under a `tp_plan` each rank has the n of its own heads."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.distributed import tensor_parallel

from attn_n.integrations.transformers.layers import FIELD, SoftmaxN, attention_layers

STYLE = "attn_n_heads"  # of the module `softmax_n`, among transformers' parallel styles
_OF_HEADS = {"colwise", "packed_colwise"}


class HeadsOfN(tensor_parallel.TensorParallelLayer):  # type: ignore[misc]
    """Shards a module `SoftmaxN` in one dimension of a mesh."""

    def install_forward(self, module: SoftmaxN, mesh: Any) -> SoftmaxN:
        if not module.learnable:
            module.part = mesh.get_local_rank(), mesh.size()
            return module
        from torch.distributed.tensor import Shard, distribute_tensor

        whole = module.log_n
        sharded = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
        module.log_n = nn.Parameter(sharded, requires_grad=whole.requires_grad)
        return module


def register_style() -> None:
    tensor_parallel.ALL_PARALLEL_STYLES.register(STYLE, HeadsOfN())


def follow_heads(model: PreTrainedModel) -> None:
    """Let n be sharded where the model's `tp_plan` shards the heads, at once if it has done so."""
    plan = model._tp_plan
    if not plan:
        return
    mesh = getattr(model, "_device_mesh", None) if (getattr(model, "_tp_size", None) or 1) > 1 else None
    for name, layer in attention_layers(model):
        key = tensor_parallel.replace_layer_number_by_wildcard(name)
        projections = {style for of, style in plan.items() if of.startswith(f"{key}.")}
        if FIELD not in layer._modules or not projections & _OF_HEADS:
            continue
        plan[f"{key}.{FIELD}"] = STYLE
        if mesh is not None:
            HeadsOfN().install_forward(layer.softmax_n, mesh["tp"] if mesh.ndim > 1 else mesh)  # type: ignore[arg-type]


def stay_whole(model: PreTrainedModel) -> None:
    """Undo what `follow_heads` has said to the model's plan."""
    for key in [key for key, style in (model._tp_plan or {}).items() if style == STYLE]:
        del model._tp_plan[key]


def check_unsharded(model: PreTrainedModel) -> None:
    """Refuse a model whose new parameters nobody would shard or reduce."""
    by_transformers = (getattr(model, "_tp_size", None) or 1) > 1 and (getattr(model, "_fsdp_size", None) or 1) == 1
    if not by_transformers and any(hasattr(x, "placements") for x in model.parameters()):
        raise ValueError(
            "model: expected one that is not sharded yet, because n is learned: FSDP2 and parallelize_module look for"
            " parameters once.\nTo do: call set_softmax_n first, and shard the model then."
        )
