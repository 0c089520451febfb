"""Models of transformers over several processes: FSDP2, tensor and context parallelism."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import Pools
from tests.tiny_models import DECODERS, LENGTH, make, tokens

transformers = pytest.importorskip("transformers", "5.17")

from attn_n import UnsupportedError
from attn_n.integrations.transformers import get_softmax_n, register, set_softmax_n

pytestmark = pytest.mark.slow

WORDS = 62  # transformers 5.17 wants the ranks to divide it
N = torch.tensor([0.5, 1.0, 4.0, 20.0])


def model_of(name: str) -> Any:
    """Return a model with sinks of its own, or with learned n."""
    register()
    tiny = DECODERS[name]._replace(fields=DECODERS[name].fields | {"vocab_size": WORDS})
    model = make(tiny).train()
    if tiny.sinks:
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
HEADS = {f"model.layers.*.self_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj", "sinks")}
HEADS["model.layers.*.self_attn.o_proj"] = "rowwise"


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


def both_parallel(folder: str) -> None:
    """FSDP2 divides by rows of the batch what tensor parallelism has divided by heads."""
    from transformers.distributed import DistributedConfig

    whole = model_of("llama")
    if dist.get_rank() == 0:
        whole.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_size=2, fsdp_size=2)
    sharded = type(whole).from_pretrained(folder, dtype=torch.float64, distributed_config=config).train()
    loss_of(whole, slice(0, 4)).backward()
    half = dist.get_rank() // 2
    loss_of(sharded, slice(2 * half, 2 * half + 2)).backward()
    for (key, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        if "log_n" in key:
            assert other.to_local().shape == (1,)
            torch.testing.assert_close(other.grad.full_tensor() * 2, one.grad)


def test_fsdp_and_tensor_parallel(pools: Pools, tmp_path: Path) -> None:
    if transformers.__version__ < "5.18":
        pytest.skip("transformers 5.17 makes a mesh for one of the two alone")
    pools(4).run(both_parallel, str(tmp_path))


def parallelized() -> None:
    """By a plan of PyTorch, which knows nothing of n: it is sharded by hand, or refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    whole = model_of("llama")
    sharded, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    parallelize_module(sharded, mesh, plan | {"model.layers.*.self_attn.o_proj": RowwiseParallel()})
    with pytest.raises(ValueError, match="one number for each of the layer's 2 heads, got 4"):
        sharded(tokens())
    for n in layers_of_n(sharded):
        n.log_n = nn.Parameter(distribute_tensor(n.log_n.detach(), mesh, [Shard(0)]))
    for model in (whole, sharded):
        loss_of(model, slice(0, 4)).backward()
    for one, other in zip(layers_of_n(whole), layers_of_n(sharded), strict=True):
        torch.testing.assert_close(other.log_n.grad.full_tensor(), one.log_n.grad)


def layers_of_n(model: Any) -> list[Any]:
    return [layer.self_attn.softmax_n for layer in model.model.layers]


def test_plan_of_pytorch(pools: Pools) -> None:
    pools(2).run(parallelized)


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


def context_parallel(name: str, hooks: bool) -> None:
    """Within PyTorch's context_parallel, as accelerate enters it, each rank has its rows of the whole."""
    from accelerate.big_modeling import _attach_context_parallel_hooks
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as within

    whole = model_of(name)
    ranks, sharded = dist.get_world_size(), copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    if hooks:
        _attach_context_parallel_hooks(sharded)
    ids = tokens(2, 12)
    weights = torch.randn(2, 12, WORDS, dtype=torch.float64)
    positions = torch.arange(12).repeat(2, 1)
    (whole(ids, use_cache=False).logits * weights).sum().backward()
    with within(mesh, buffers=[ids, positions, weights], buffer_seq_dims=[1, 1, 1]):
        out = sharded(ids, position_ids=positions, use_cache=False).logits
        assert out.shape[1] == 12 // ranks
        (out * weights).sum().backward()
    for (key, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        if one.grad is not None:
            dist.all_reduce(other.grad)
            bound = DECODERS[name].tolerance * max(float(one.grad.abs().max()), 1.0)
            torch.testing.assert_close(
                other.grad, one.grad, atol=bound, rtol=0, msg=lambda text, of=key: f"{of}: {text}"
            )


def refused_in_context_parallel() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as within

    model, mesh = model_of("gpt_oss"), init_device_mesh("cpu", (2,))
    positions, packed = torch.arange(12)[None], torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
    for length, given, error, message in (
        (12, {}, RuntimeError, "position_ids: attn_n expected those of one sequence"),  # of the tokens 0 to 5
        (12, {"position_ids": packed}, RuntimeError, "Packed sequences have no place in it"),
        (
            12,
            {"position_ids": positions, "attention_mask": torch.arange(12)[None] % 5 > 0},
            UnsupportedError,
            "without pad",
        ),
        (10, {"position_ids": positions[:, :10]}, UnsupportedError, "a length of 10, which 4 does not divide"),
    ):
        buffers = [tokens(1, length), *(x.clone() for x in given.values())]
        with (
            within(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers)),
            pytest.raises(error, match=message),
        ):
            model(buffers[0], use_cache=False, **dict(zip(given, buffers[1:], strict=True)))


def test_what_context_parallel_refuses(pools: Pools) -> None:
    pools(2).run(refused_in_context_parallel)


def test_trainer_refuses_context_parallel() -> None:
    """By itself: its context parallelism is for "sdpa" alone."""
    config = SimpleNamespace(cp_enabled=True, cp_backend="torch")
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(parallelism_config=config))
    with pytest.raises(ValueError, match="only with SDPA attention, you are using attn_n"):
        transformers.Trainer._prepare_context_parallel_inputs(trainer, model_of("llama"), {"input_ids": tokens()})


# accelerate takes masks away, and refuses models with windows; those that do not look at positions need no hooks.
@pytest.mark.parametrize(("name", "hooks"), [("llama", True), ("gpt_oss", False)])
def test_context_parallel(pools: Pools, name: str, hooks: bool) -> None:
    pools(2).run(context_parallel, name, hooks)
