"""Models of transformers over several processes: FSDP2."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import Pools
from tests.tiny_models import DECODERS, LENGTH, make, tokens

pytest.importorskip("transformers", "5.17")

from attn_n.integrations.transformers import get_softmax_n, register, set_softmax_n

pytestmark = pytest.mark.slow

N = torch.tensor([0.5, 1.0, 4.0, 20.0])


def model_of(name: str) -> Any:
    """Return a model with sinks of its own, or with learned n."""
    register()
    model = make(DECODERS[name]).train()
    if DECODERS[name].sinks:
        model.set_attn_implementation("attn_n")
        return model
    return set_softmax_n(model, N, learnable=True)


def loss_of(model: nn.Module, rows: slice) -> Tensor:
    ids = tokens(4)[rows]
    seen = torch.arange(LENGTH) >= torch.tensor([0, 3, 6, 1])[rows, None]
    out = model(ids, attention_mask=seen.long(), use_cache=False).logits[seen]
    return (out * torch.linspace(-1, 1, out.shape[1])).sum()


def trained_by_fsdp(name: str, hybrid: bool) -> None:
    """The gradients, and the model after one step, are those of one process with the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = model_of(name)
    sharded = copy.deepcopy(whole)
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size, 1) if hybrid else (size,), mesh_dim_names=("a", "b")[: 1 + hybrid])
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    part = 4 // size
    loss_of(whole, slice(0, 4)).backward()
    loss_of(sharded, slice(part * dist.get_rank(), part * (dist.get_rank() + 1))).backward()
    learned = 0
    for (key, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert (other.to_local().numel() < one.numel()) != hybrid
        if one.grad is not None:
            torch.testing.assert_close(
                other.grad.full_tensor() * size, one.grad, msg=lambda text, of=key: f"{of}: {text}"
            )
            learned += "sinks" in key or "log_n" in key
    assert learned == 2
    for model, rate in ((whole, 1e-3), (sharded, size * 1e-3)):
        torch.optim.SGD(model.parameters(), rate).step()
    torch.testing.assert_close(sharded(tokens()).logits, whole(tokens()).logits)
    if not DECODERS[name].sinks:
        for key, n in get_softmax_n(sharded).items():
            torch.testing.assert_close(n.full_tensor(), get_softmax_n(whole)[key])


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_fsdp(pools: Pools, name: str, hybrid: bool) -> None:
    pools(2).run(trained_by_fsdp, name, hybrid)
