"""`attn_n.distributed` as programs use it: within DDP and FSDP2, under autocast and torch.compile; and its errors."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import attn_n
from attn_n.distributed import (
    ring_attention_n,
    ring_attention_n_varlen,
    shard,
    ulysses_attention_n,
    ulysses_attention_n_varlen,
    unshard,
)
from tests.ranks import Pools, Ranks, device

BOTH = (ring_attention_n, ulysses_attention_n)
by_name = pytest.mark.parametrize("attend", BOTH, ids=["ring", "ulysses"])
HEADS, SIZE, LENGTH = 4, 8, 22


class Block(nn.Module):
    """Attention with projections and learned sinks, of tokens `(N, L, C)`."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.attend = attend
        self.qkv, self.out = nn.Linear(SIZE, 3 * HEADS * SIZE), nn.Linear(HEADS * SIZE, SIZE)
        self.sinks = nn.Parameter(torch.linspace(-2, 3, HEADS))

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).transpose(1, 3).unbind(2)
        attended: Tensor = self.attend(q, k, v, True, sinks=self.sinks, **keywords)
        return self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def trained_as_one(wrap: str, compile: bool, attend: Callable[..., Any]) -> None:
    """The gradients that DDP and FSDP2 average over ranks are, times their number, those of one process."""
    module = Block(attn_n.flash_attention_n).double().to(device())
    x = torch.randn(2, LENGTH, SIZE, dtype=torch.float64).to(device())
    module(x).square().sum().backward()
    parallel = copy.deepcopy(module)
    parallel.attend = attend
    parallel.zero_grad()
    if wrap == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(parallel)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(parallel, mesh=init_device_mesh(device().type, (dist.get_world_size(),)))
    run = torch.compile(wrapped, backend="aot_eager") if compile else wrapped
    run(shard(x, 1), total_length=LENGTH).square().sum().backward()
    for (name, expected), found in zip(module.named_parameters(), parallel.parameters(), strict=True):
        assert found.grad is not None
        gradient = found.grad.full_tensor() if hasattr(found.grad, "full_tensor") else found.grad
        torch.testing.assert_close(
            gradient * dist.get_world_size(), expected.grad, msg=lambda text, of=name: f"{of}: {text}"
        )


@by_name
@pytest.mark.parametrize(
    ("wrap", "compile"),
    [
        ("ddp", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fsdp2", False), ("ddp", True), ("fsdp2", True))),
    ],
)
def test_wrapped_modules_sum_the_gradients(pools: Pools, wrap: str, compile: bool, attend: Callable[..., Any]) -> None:
    pools(2).run(trained_as_one, wrap, compile, attend)


@pytest.mark.gpu
@by_name
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_wrapped_modules_on_two_gpus(pools: Pools, wrap: str, attend: Callable[..., Any]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pools(2, "nccl").run(trained_as_one, wrap, False, attend)


def compiled(attend: Callable[..., Any]) -> None:
    """Ulysses is part of one graph, and the ring breaks it."""
    module = Block(attend).double()
    x = shard(torch.randn(1, LENGTH, SIZE, dtype=torch.float64), 1)
    expected = module(x, total_length=LENGTH)
    if attend is ring_attention_n:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(module, backend="aot_eager", fullgraph=True)(x, total_length=LENGTH)
    whole = attend is ulysses_attention_n
    found = torch.compile(module, backend="aot_eager", fullgraph=whole)(x, total_length=LENGTH)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.sum(), list(module.parameters())) for y in (expected, found)]
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
@by_name
def test_within_compiled_code(pools: Pools, attend: Callable[..., Any]) -> None:
    pools(2).run(compiled, attend)


def dtypes_and_dimensions(attend: Callable[..., Any]) -> None:
    """Autocast decides the dtype; one head without a batch, and two batches."""
    whole = [torch.randn(3, 2, 4, 16, 8) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(*(shard(x, -2) for x in whole), True, sm_n=1.0, return_lse=True)
        expected, expected_lse = attn_n.flash_attention_n(*whole, True, sm_n=1.0, return_lse=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(unshard(out, 3), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(unshard(lse, 3), expected_lse, atol=0.02, rtol=0.02)
    if attend is ring_attention_n:
        q, k, v = (torch.randn(9, 8, dtype=torch.float64) for _ in range(3))
        out = attend(*(shard(x, 0) for x in (q, k, v)), total_length=9, window=(2, 1))
        torch.testing.assert_close(unshard(out, 0), attn_n.flash_attention_n(q, k, v, window=(2, 1)))


@by_name
def test_dtypes_and_dimensions(pools: Pools, attend: Callable[..., Any]) -> None:
    pools(2).run(dtypes_and_dimensions, attend)


class Counting(attn_n.Backend):
    """Causal or full attention by plain formulas, which notes its calls."""

    name = "counting"
    honours = ("causal", "window")

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def logits(self, q: Tensor, k: Tensor, options: attn_n.Options) -> Tensor:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        return (q @ k.mT * options.scale).masked_fill(hidden & (options.window_right == 0), -torch.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_n: Any, options: attn_n.Options) -> Any:
        assert log_n is None  # n is applied to the sum of the parts
        self.calls.append(("forward", q.shape[2], k.shape[2]))
        logits = self.logits(q, k, options)
        return logits.softmax(-1) @ v, logits.logsumexp(-1), None

    def backward(self, grads: attn_n.Grads, saved: attn_n.Saved, options: attn_n.Options) -> attn_n.Gradients:
        q, k, v, out, lse, *_ = saved
        self.calls.append(("backward", q.shape[2], k.shape[2]))
        weights = (self.logits(q, k, options) - lse[..., None]).exp()
        delta = (grads.dout * out).sum(-1)
        dlogits = weights * (grads.dout @ v.mT - delta[..., None]) * options.scale
        return attn_n.Gradients(dlogits @ k, dlogits.mT @ q, weights.mT @ grads.dout)


def calls_of_a_backend() -> None:
    """The backend that `use_backend` names at the forward runs each part of both passes."""
    counting = Counting()
    attn_n.register_backend(counting)
    whole = [torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with attn_n.use_backend("counting"):
        out = ring_attention_n(*(shard(x) for x in whole), True, sm_n=1.0)
    found = torch.autograd.grad(out.square().sum(), whole)
    expected = torch.autograd.grad(attn_n.flash_attention_n(*whole, True, sm_n=1.0).square().sum(), whole)
    for a, b in zip(found, expected, strict=True):
        dist.all_reduce(a)
        torch.testing.assert_close(a, b)
    other = (2, 4) if dist.get_rank() == 0 else (4, 2)  # half of the queries, or half of the keys
    assert counting.calls == [(of, *sizes) for of in ("forward", "backward") for sizes in ((4, 4), other)]


def test_calls_of_a_backend(pools: Pools) -> None:
    pools(2).run(calls_of_a_backend)


def gradient_of_unshard() -> None:
    x = torch.arange(7.0, requires_grad=True)
    whole = unshard(shard(x, 0), 0)
    torch.testing.assert_close(whole.detach(), x.detach())
    weights = torch.arange(7.0) * (1 + dist.get_rank())
    (whole * weights).sum().backward()
    assert x.grad is not None
    dist.all_reduce(x.grad)
    torch.testing.assert_close(x.grad, 3 * torch.arange(7.0))  # the losses of both ranks


def test_the_gradient_of_unshard(pools: Pools) -> None:
    pools(2).run(gradient_of_unshard)


def groups_of_a_mesh() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    torch.manual_seed(dist.get_rank() // 2)  # other data in the other row of the mesh
    q, k, v = (torch.randn(1, 2, 10, 8, dtype=torch.float64) for _ in range(3))
    expected = attn_n.flash_attention_n(q, k, v, True, sm_n=1.0)
    for attend in BOTH:
        for group in (mesh["context"], mesh.get_group("context")):
            out = attend(*(shard(x, 2, group) for x in (q, k, v)), True, sm_n=1.0, group=group)
            torch.testing.assert_close(unshard(out, 2, group), expected)
        with pytest.raises(ValueError, match=r"group: expected a DeviceMesh with one dimension.*mesh\['context'\]"):
            attend(q, k, v, group=mesh)


@pytest.mark.slow
def test_groups_of_a_mesh(pools: Pools) -> None:
    pools(4).run(groups_of_a_mesh)


def shards_of_pytorch() -> None:
    """Where chunks are of one length, PyTorch's context_parallel shards buffers as `shard` does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (2,))
    whole = [torch.randn(1, 2, 16, 8) for _ in range(3)]
    buffers = [x.clone() for x in whole]
    expected = attn_n.flash_attention_n(*whole, True, sm_n=1.0)
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
        for x, buffer in zip(whole, buffers, strict=True):
            assert torch.equal(buffer, shard(x))
        for attend in BOTH:
            torch.testing.assert_close(unshard(attend(*buffers, True, sm_n=1.0)), expected)


@pytest.mark.slow
def test_within_context_parallel_of_pytorch(pools: Pools) -> None:
    pools(2).run(shards_of_pytorch)


def refusals() -> None:
    q, k, v = (torch.randn(1, 4, 6, 8) for _ in range(3))
    cu = torch.tensor([0, 12], dtype=torch.int32)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    for attend in (*BOTH, ring_attention_n_varlen, ulysses_attention_n_varlen):
        varlen = "varlen" in attend.__name__
        arguments: tuple[Any, ...] = (*packed, cu) if varlen else (q, k, v)
        for name, value in (
            ("attn_mask", torch.ones(6, 6, dtype=torch.bool)), ("dropout_p", 0.1), ("alibi_slopes", torch.ones(4)),
            ("seqused_q", torch.ones(1, dtype=torch.int32)), ("leftpad_k", torch.ones(1, dtype=torch.int32)),
        ):  # fmt: skip
            with pytest.raises(attn_n.UnsupportedError, match=f"{name}: {attend.__name__} does not take it"):
                attend(*arguments, **{name: value})
        attend(*arguments, attn_mask=None, dropout_p=0.0)
        with pytest.raises(TypeError, match="unexpected keyword argument 'is_causal': here it is causal"):
            attend(*arguments, is_causal=True)
        with pytest.raises(TypeError, match="group: expected None, a ProcessGroup or a DeviceMesh, got str"):
            attend(*arguments, group="world")
        with pytest.raises(ValueError, match="k: expected the 6 tokens of q, got 5"):
            attend(arguments[0], *(x[:5] if varlen else x[:, :, :5] for x in arguments[1:3]), *arguments[3:])
        if varlen:
            with pytest.raises(ValueError, match=r"q: expected 7 tokens on rank . of 2, as shard divides 14, got 6"):
                attend(*packed, cu + torch.tensor([0, 2], dtype=torch.int32))
            with pytest.raises(ValueError, match="cu_seqlens: expected values that never decrease"):
                attend(*packed, torch.tensor([0, 13, 12], dtype=torch.int32))
            with pytest.raises(TypeError, match="cu_seqlens: expected int32, got int64"):
                attend(*packed, cu.long())
        else:
            with pytest.raises(ValueError, match=r"q: expected 7 tokens on rank . of 2, as shard divides 14, got 6"):
                attend(q, k, v, total_length=14)
    with pytest.raises(ValueError, match="q: expected a number of heads that the 2 ranks divide, got 3"):
        ulysses_attention_n(q[:, :3], k[:, :3], v[:, :3])
    for x in (q, k, v):
        x.requires_grad_()
    dq = torch.autograd.grad(ring_attention_n(q, k, v).square().sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
    with pytest.raises(ValueError, match=r"x: expected .* tokens on the ranks"):
        unshard(torch.ones(3 * dist.get_rank()), 0)


def test_refusals(pools: Pools) -> None:
    pools(2).run(refusals)


def test_without_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"group: expected torch.distributed to be initialised"):
        shard(torch.ones(4), 0)


def dies(attend: Callable[..., Any]) -> None:
    if dist.get_rank() == 1:
        os._exit(1)
    attend(*(torch.randn(1, 2, 8, 8) for _ in range(3)))


def comes_too_late(attend: Callable[..., Any]) -> None:
    if dist.get_rank() == 1:
        time.sleep(15)
    else:
        attend(*(torch.randn(1, 2, 8, 8) for _ in range(3)))


@by_name
@pytest.mark.parametrize("what", [dies, pytest.param(comes_too_late, marks=pytest.mark.slow)])
def test_others_end_with_an_error(what: Callable[..., None], attend: Callable[..., Any]) -> None:
    ranks = Ranks(2, "gloo", timeout=5)
    first, second = ranks.results(what, attend, within=40)
    ranks.stop()
    assert first is not None
    assert "RuntimeError" in first or "DistBackendError" in first, first
    assert second == ("died" if what is dies else None)
