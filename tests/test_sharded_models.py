"""Models of transformers over several processes: FSDP2 and tensor parallelism."""

from __future__ import annotations

import copy
from pathlib import Path
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


# Heads of gpt-oss, whose own plan shards none of them.
HEADS = {f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"} | {
    "model.layers.*.self_attn.o_proj": "rowwise", "model.layers.*.self_attn.sinks": "colwise",
    "model.layers.*.self_attn": "local_params",
}  # fmt: skip


def tensor_parallel(name: str, how: str, folder: str) -> None:
    """Values, gradients, generated tokens and what is saved are those of one process, whose checkpoint is loaded."""
    from transformers.distributed import DistributedConfig

    model = model_of(name)
    if how == "fixed":
        set_softmax_n(model, N)
    if dist.get_rank() == 0:
        model.save_pretrained(f"{folder}/whole")
    dist.barrier()
    plan: Any = HEADS if name == "gpt_oss" else "auto"
    config = DistributedConfig(tp_plan=plan, tp_size=dist.get_world_size())
    keywords = {"dtype": torch.float64, "attn_implementation": "attn_n"}
    whole, sharded = (
        type(model).from_pretrained(f"{folder}/whole", **keywords, distributed_config=x).train() for x in (None, config)
    )
    if how == "afterwards":
        set_softmax_n(sharded, N, learnable=True)
    for each in (whole, sharded):
        if each._can_set_experts_implementation():
            each.set_experts_implementation("eager")
        loss_of(each, slice(0, 4)).backward()
    local = 0
    for (key, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        if one.grad is not None:
            gradient = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
            bound = DECODERS[name].tolerance * max(float(one.grad.abs().max()), 1.0)
            torch.testing.assert_close(gradient, one.grad, atol=bound, rtol=0, msg=lambda text, of=key: f"{of}: {text}")
        if "sinks" in key or "log_n" in key:
            assert other.to_local().shape == (2,)
            local += 1
    assert local == (0 if how == "fixed" else 1 if name == "mimo_v2_flash" else 2)
    found = [each.eval().generate(tokens(), max_new_tokens=4, do_sample=False) for each in (whole, sharded)]
    assert torch.equal(*found)
    sharded.save_pretrained(f"{folder}/sharded")
    dist.barrier()
    again = type(model).from_pretrained(f"{folder}/sharded", **keywords)
    torch.testing.assert_close(dict(again.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "auto") for name in ("gpt_oss", "granite_swa", "mimo_v2_flash", "hy_v4", "llama")),
        ("llama", "fixed"),
        ("llama", "afterwards"),
    ],
)
def test_tensor_parallel(pools: Pools, name: str, how: str, tmp_path: Path) -> None:
    pools(2).run(tensor_parallel, name, how, str(tmp_path))


def refused_once_sharded() -> None:
    from torch.distributed.fsdp import fully_shard

    register()
    model = make(DECODERS["llama"])
    fully_shard(model)
    with pytest.raises(ValueError, match="expected one that is not sharded yet, because n is learned"):
        set_softmax_n(model, 1.0, learnable=True)
    set_softmax_n(model, 1.0)
    assert model(tokens()).logits.isfinite().all()


def test_n_is_set_before_parameters_are_sharded(pools: Pools) -> None:
    pools(2).run(refused_once_sharded)
