"""DTensors: attention sharded by batches and by heads, with the gradients, under plans of tensor parallelism."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import attn_n
from tests.ranks import Pools, device


class Attention(nn.Module):
    """Grouped-query attention with learned sinks, as models write it: heads are counted by the projections."""

    def __init__(self, heads: int = 4, heads_kv: int = 2, size: int = 8) -> None:
        super().__init__()
        width = heads * size
        self.size = size
        self.wq, self.wo = nn.Linear(width, heads * size, bias=False), nn.Linear(heads * size, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, heads_kv * size, bias=False) for _ in "kv")
        self.sinks = nn.Parameter(torch.linspace(-2.0, 3.0, heads))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        out = attn_n.flash_attention_n(q, k, v, causal=True, sinks=self.sinks)
        assert isinstance(out, Tensor)
        return self.wo(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@contextlib.contextmanager
def collectives() -> Any:
    """Count what is exchanged."""
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        yield mode


def tensor_parallel(compile: bool, data_parallel: bool, heads_kv: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    size = dist.get_world_size()
    shape, names = ((size // 2, 2), ("data", "tensor")) if data_parallel else ((size,), ("tensor",))
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=names)
    module = Attention(heads_kv=heads_kv).double().to(device())
    x = torch.randn(4, 10, 32, dtype=torch.float64).to(device())
    expected = module(x)
    expected.square().sum().backward()
    parallel = copy.deepcopy(module)
    parallel.zero_grad()
    columns = ColwiseParallel(use_local_output=False)
    of_kv = columns if heads_kv > 1 else None
    plan = {"wq": columns, "wk": of_kv, "wv": of_kv, "wo": RowwiseParallel()}
    parallelize_module(parallel, mesh["tensor"], {name: style for name, style in plan.items() if style})
    if of_kv is None:
        for name in ("wk", "wv"):
            w = getattr(parallel, name)
            w.weight = nn.Parameter(distribute_tensor(w.weight.data, mesh["tensor"], [Replicate()]))
    parallel.sinks = nn.Parameter(distribute_tensor(parallel.sinks.data, mesh["tensor"], [Shard(0)]))
    mine = x
    if data_parallel:
        from torch.distributed.fsdp import fully_shard

        fully_shard(parallel, mesh=mesh["data"])
        mine = x.chunk(size // 2)[mesh["data"].get_local_rank()]
    if of_kv is None:
        mine = DTensor.from_local(mine, mesh["tensor"], [Replicate()])
    run = torch.compile(parallel, backend="aot_eager", fullgraph=not data_parallel) if compile else parallel
    alone = not compile and not data_parallel
    with collectives() if alone else contextlib.nullcontext() as exchanged:  # the mode would prevent compilation
        out = run(mine)
        if alone:
            forward = exchanged.get_total_counts()
            assert forward == 1, exchanged.get_comm_counts()  # the all-reduce of wo
    loss = (out.full_tensor() if isinstance(out, DTensor) else out).square().sum()
    loss.backward()
    for (name, one), other in zip(module.named_parameters(), parallel.parameters(), strict=True):
        gradient = other.grad.full_tensor() * (size // 2 if data_parallel else 1)
        torch.testing.assert_close(gradient, one.grad, msg=lambda text, of=name: f"{of}: {text}")


@pytest.mark.parametrize(
    ("size", "compile", "data_parallel", "heads_kv"),
    [
        (2, False, False, 2),
        pytest.param(2, True, False, 2, marks=pytest.mark.slow),
        pytest.param(2, False, False, 1, marks=pytest.mark.slow),
        pytest.param(4, False, True, 2, marks=pytest.mark.slow),
        pytest.param(4, True, True, 2, marks=pytest.mark.slow),
    ],
)
def test_tensor_parallel(pools: Pools, size: int, compile: bool, data_parallel: bool, heads_kv: int) -> None:
    pools(size).run(tensor_parallel, compile, data_parallel, heads_kv)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_tensor_parallel_on_two_gpus(pools: Pools, compile: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pools(2, "nccl").run(tensor_parallel, compile, False, 2)


SHAPES = {"mask": (2, 1, 6, 6), "mask of all": (1, 4, 6, 6), "slopes": (2, 4), "slopes of all": (4,)}


def placements(case: str) -> None:
    """Every placement gives the values and gradients of the whole; the results of a sharded call are sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    # Gradients of masks and slopes come from the portable kernels, here under the interpreter.
    backend, dtype = ("triton:portable", torch.float32) if case in SHAPES else ("sdpa:cpu", torch.float64)
    q, k, v = (torch.randn(2, heads, 6, 16, dtype=dtype) for heads in (4, 2, 2))
    extra: dict[str, Tensor] = {}
    shapes = {"sinks": (4,), "rows": (2, 4, 6), "rows of all": (1, 4, 1), "heads of all": (2, 1, 6)}
    if case in shapes:
        extra["sinks"] = torch.randn(shapes[case], dtype=torch.float64)
    elif case == "scalar":
        extra["sm_n"] = torch.tensor(2.0, dtype=torch.float64)
    elif case in SHAPES:
        name = "attn_mask" if "mask" in case else "alibi_slopes"
        extra[name] = torch.rand(SHAPES[case])
    elif case == "lengths":
        for name in ("seqused_q", "seqused_k"):
            extra[name] = torch.tensor([2, 5], dtype=torch.int32)
    weights = torch.randn(2, 4, 6, 16, dtype=dtype), torch.randn(2, 4, 6, dtype=dtype)

    def gradients(whole: list[Tensor], by_name: dict[str, Tensor], **keywords: Any) -> list[Tensor]:
        out, lse = attn_n.flash_attention_n(*whole, causal=True, return_lse=True, **by_name, **keywords)
        leaves = [x for x in (*whole, *by_name.values()) if x.requires_grad]
        loss = sum(
            (x * distribute_like(x, y)).sum()
            for x, y in zip((out, lse.masked_fill(lse == -torch.inf, 0)), weights, strict=True)
        )
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    def distribute_like(x: Tensor, y: Tensor) -> Tensor:
        return distribute_tensor(y, mesh, [Replicate()]) if hasattr(x, "placements") else y

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_(x.is_floating_point())

    expected = gradients([leaf(x) for x in (q, k, v)], {name: leaf(x) for name, x in extra.items()}, backend=backend)
    tried = (Shard(0), Shard(1)) if case in SHAPES else (Replicate(), Shard(0), Shard(1), Shard(2))
    for placement in tried:
        whole = [leaf(distribute_tensor(x, mesh, [placement])) for x in (q, k, v)]
        given = {name: leaf(distribute_tensor(x, mesh, [Replicate()])) for name, x in extra.items()}
        found = gradients(whole, given, backend=backend)
        if placement != Shard(2):
            assert found[0].placements == found[1].placements == found[2].placements == (placement,)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.full_tensor(), b)
    if case == "sinks":
        sharded = [leaf(distribute_tensor(x, mesh, [Shard(0)])) for x in (q, k, v)]
        given = {"sinks": leaf(distribute_tensor(extra["sinks"], mesh, [Replicate()]))}
        assert gradients(sharded, given)[-1].placements == (Partial(),)
        sharded = [leaf(distribute_tensor(x, mesh, [Shard(1)])) for x in (q, k, v)]
        given = {"sinks": leaf(distribute_tensor(extra["sinks"], mesh, [Shard(0)]))}
        with collectives() as exchanged:
            out = attn_n.flash_attention_n(*sharded, sinks=given["sinks"])
            torch.autograd.grad(out.to_local().sum(), [*sharded, given["sinks"]])
        assert exchanged.get_total_counts() == 0


@pytest.mark.parametrize(
    "case",
    [
        "sinks", "rows",
        *(pytest.param(case, marks=pytest.mark.slow) for case in (
            "none", "scalar", "rows of all", "heads of all", "lengths", *SHAPES,
        )),
    ],
)  # fmt: skip
def test_placements(pools: Pools, case: str) -> None:
    pools(2).run(placements, case)


def asked_in_turn() -> None:
    """What DTensor keeps of one call is not taken for another one that asks for other gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    q, k, v = (distribute_tensor(torch.randn(2, 4, 6, 8), mesh, [Shard(1)]).requires_grad_() for _ in range(3))
    sinks = distribute_tensor(torch.randn(4), mesh, [Shard(0)])
    for learned in (False, True, False):
        given = sinks.clone().detach().requires_grad_(learned)
        out = attn_n.flash_attention_n(q, k, v, sinks=given)
        found = torch.autograd.grad(out.sum(), [q, given] if learned else [q])
        assert found[-1].shape == (given if learned else q).shape
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    cu = distribute_tensor(torch.tensor([0, 2, 6], dtype=torch.int32), mesh, [Replicate()])
    out = attn_n.flash_attention_n_varlen(*packed, cu, cu, 4, 4, True, sinks=sinks)
    assert out.placements == (Shard(1),)


class Dropping(attn_n.Backend):
    name = "dropping"
    honours = ("dropout",)


def refusals() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from attn_n.distributed import ring_attention_n

    mesh = init_device_mesh("cpu", (2,))
    q, k, v = (distribute_tensor(torch.randn(2, 4, 6, 8), mesh, [Shard(1)]) for _ in range(3))
    attn_n.register_backend(Dropping())
    with pytest.raises(attn_n.UnsupportedError, match=r"dropout_p: .* how DTensors are sharded"):
        attn_n.flash_attention_n(q, k, v, dropout_p=0.5, backend="dropping")
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
        attn_n.flash_attention_n(q, k, v, sinks=torch.zeros(4))
    with pytest.raises(TypeError, match=r"q: expected a plain torch.Tensor with the tokens of this rank, got DTensor"):
        ring_attention_n(q, k, v)
    three = [distribute_tensor(torch.randn(2, heads, 6, 8), mesh, [Shard(1)]) for heads in (6, 3, 3)]
    whole = [x.full_tensor() for x in three]
    torch.testing.assert_close(attn_n.flash_attention_n(*three).full_tensor(), attn_n.flash_attention_n(*whole))


@pytest.mark.parametrize("what", [asked_in_turn, refusals])
def test_others(pools: Pools, what: Any) -> None:
    pools(2).run(what)
