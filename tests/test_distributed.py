"""`attn_n.distributed` against the oracle, computed by each rank from the whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attn_n.distributed import (
    ring_attention_n,
    ring_attention_n_varlen,
    shard,
    ulysses_attention_n,
    ulysses_attention_n_varlen,
    unshard,
)
from tests.oracle import attention_n
from tests.ranks import Pools, device

DENSE = {"ring": ring_attention_n, "ulysses": ulysses_attention_n}
VARLEN = {"ring": ring_attention_n_varlen, "ulysses": ulysses_attention_n_varlen}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of whole sequences: dense of `length`, or packed ones of `lengths`."""

    name: str
    length: int = 24
    lengths: tuple[int, ...] | None = None
    batch: int = 2
    heads: tuple[int, int] = (4, 2)
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    n: str = "number"  # or none, scalar, head, sinks, and rows with the shape of sinks after a colon
    lse_grad: bool = True
    dtype: torch.dtype = torch.float64
    backend: str | None = None

    @property
    def total(self) -> int:
        return self.length if self.lengths is None else sum(self.lengths)


CASES = (
    Case("causal", n="sinks"),
    Case("causal of other heads", heads=(4, 4), batch=1, n="head", lse_grad=False),
    Case("one KV head", heads=(4, 1), n="scalar"),
    Case("KV heads on the border of a rank", heads=(12, 3), n="sinks"),
    Case("full", causal=False, n="rows:NHL"),
    Case("full, n = 0", causal=False, n="none", lse_grad=False),
    Case("causal, n = 0", n="none"),
    Case("uneven", length=21, n="sinks"),
    Case("uneven, sinks a row", length=19, n="rows:NHL"),
    Case("odd chunks", length=20, n="rows:1HL"),
    Case("sinks of all heads", n="rows:N1L"),
    Case("sinks of all rows", length=23, n="rows:1H1"),
    Case("one token a rank", length=4, n="rows:NHL"),
    Case("ranks without tokens", length=1, n="sinks"),
    Case("three tokens", length=3, n="rows:NHL", causal=False),
    Case("no tokens", length=0, n="sinks"),
    Case("window", length=40, causal=False, window=(3, 2), n="sinks"),
    Case("causal window", length=40, window=(7, None), n="rows:NHL"),
    Case("wide window", length=33, window=(17, 0), causal=False, n="head"),
    Case("one-sided window", length=31, causal=False, window=(None, 4)),
    Case("the other side", length=31, causal=False, window=(4, None)),
    Case("window of one key", length=17, causal=False, window=(0, 0), n="sinks"),
    Case("softcap", softcap=2.0, n="sinks"),
    Case("softcap in a window", length=26, softcap=2.0, window=(5, 1), causal=False, n="rows:NHL"),
    Case("reference", length=14, n="sinks", backend="reference"),
    Case("float32", length=64, n="sinks", dtype=torch.float32),
    Case("varlen", lengths=(7, 13, 3, 1), n="sinks"),
    Case("varlen, full", lengths=(11, 2, 14), causal=False, n="rows:TH"),
    Case("varlen, one sequence", lengths=(25,), n="head"),
    Case("varlen, empty sequences", lengths=(0, 9, 0, 0, 12, 0), n="rows:T1"),
    Case("varlen, window", lengths=(5, 30, 6), window=(6, 0), n="sinks", heads=(4, 1)),
    Case("varlen, two-sided window", lengths=(21, 20), causal=False, window=(3, 5), n="none"),
    Case("varlen, softcap", lengths=(18, 4), softcap=1.5, n="scalar"),
    Case("varlen, few tokens", lengths=(1, 2), n="rows:1H"),
    Case("varlen, none", lengths=(), n="sinks"),
    Case("varlen, reference", lengths=(8, 9), n="rows:TH", backend="reference"),
)  # fmt: skip
FAST = {"causal", "uneven, sinks a row", "causal window", "ranks without tokens", "varlen"}


@pytest.mark.parametrize("how", ["ring", "ulysses"])
@pytest.mark.parametrize(
    ("case", "size"),
    [
        pytest.param(
            case, size, id=f"{case.name}-{size}", marks=() if case.name in FAST and size == 2 else pytest.mark.slow
        )
        for size in (2, 4)
        for case in CASES
    ],
)
def test_values_and_gradients(pools: Pools, case: Case, size: int, how: str) -> None:
    pools(size).run(check, case, how)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["ring", "ulysses"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if case.backend is None], ids=lambda case: case.name)
def test_on_two_gpus(pools: Pools, case: Case, dtype: torch.dtype, how: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pools(2, "nccl").run(check, dataclasses.replace(case, dtype=dtype), how)


def check(case: Case, how: str) -> None:
    """Compare out, lse and all gradients of this rank with those of the whole."""
    whole = {name: x.to(device()) for name, x in inputs(case).items()}
    expected = by_oracle(case, whole, torch.float64)
    found = by_ranks(case, whole, how)
    if case.dtype == torch.float64:
        allowed = {name: 1e-11 * (1 + x.abs().max().item() if x.numel() else 1) for name, x in expected.items()}
    else:  # FlashAttention's rule: twice the error of the same computation by plain PyTorch, and rounding
        plain = by_oracle(case, whole, case.dtype)
        eps = torch.finfo(case.dtype).eps
        allowed = {
            name: 2 * (plain[name].double() - x).abs().max().item() + eps * (1 + x.abs().max().item())
            if x.numel() else 0.0
            for name, x in expected.items()
        }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, x in found.items():
        mine = expected[name] if name == "dn" and per_head(case) else shard(expected[name], tokens(case, name))
        assert x.shape == mine.shape, (name, x.shape, mine.shape)
        assert x.isfinite().all(), name
        worst = (x.double() - mine).abs().max().item() if x.numel() else 0.0
        assert worst <= allowed[name], f"{name}: off by {worst:.1e}, allowed {allowed[name]:.1e}"


def inputs(case: Case) -> dict[str, Tensor]:
    """Return the whole q, k, v, n, dout and dlse, the same on all ranks; n matters beside the few keys."""
    generator = torch.Generator().manual_seed(1)
    (heads, heads_kv), total = case.heads, case.total
    leading = (case.batch,) if case.lengths is None else ()

    def random(heads: int, size: int) -> Tensor:
        shape = (*leading, heads, total, size) if leading else (total, heads, size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    found = {"q": random(heads, 8), "k": random(heads_kv, 8), "v": random(heads_kv, 16)}
    sizes = {"N": case.batch, "H": heads, "L": total, "T": total, "1": 1}
    kind, _, shape = case.n.partition(":")
    if kind in ("scalar", "head"):
        size = () if kind == "scalar" else (heads,)
        found["n"] = torch.rand(size, generator=generator, dtype=torch.float64) * 3 + 0.5
    elif kind == "sinks":
        found["n"] = torch.linspace(-3, 20, heads, dtype=torch.float64)
    elif kind == "rows":
        found["n"] = torch.randn([sizes[letter] for letter in shape], generator=generator, dtype=torch.float64) * 3
    found["dout"] = random(heads, 16)
    found["dlse"] = random(heads, 1)[..., 0].to(torch.promote_types(case.dtype, torch.float32))
    return found


def keywords(case: Case, n: Tensor | None) -> dict[str, Any]:
    by = {"scalar": "sm_n", "head": "sm_n", "sinks": "sinks", "rows": "sinks"}.get(case.n.partition(":")[0])
    of_n = {by: n} if by is not None else {"sm_n": 1.0 if case.n == "number" else None}
    return {**of_n, "causal": case.causal, "window": case.window, "softcap": case.softcap}


def per_head(case: Case) -> bool:
    """Return True if n has no dimension of tokens: each rank has a partial gradient of all of it."""
    return not any(letter in case.n.partition(":")[2] for letter in "LT")


def tokens(case: Case, name: str) -> int:
    """Return the dimension of tokens."""
    return 0 if case.lengths is not None else 2


def by_oracle(case: Case, whole: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: x.to(wide if name == "n" else dtype).requires_grad_() for name, x in whole.items() if name[0] != "d"
    }
    n = leaves.get("n")
    given = keywords(case, n)
    given["n"] = given.pop("sm_n", None) or 0.0 if not isinstance(given.get("sm_n"), Tensor) else given.pop("sm_n")
    q, k, v = (leaves[name] for name in "qkv")
    if case.lengths is None:
        out, lse = attention_n(q, k, v, **given)
    else:
        none = 0 * q[:0, :, :1]
        outs, lses, start = [none.expand(-1, -1, v.shape[2])], [none[..., 0].to(wide)], 0
        for length in case.lengths:
            span = slice(start, start + length)
            one = dict(given)
            if n is not None and n.dim() == 2:
                one["sinks"] = n.expand(case.total, q.shape[1])[span].T[None]
            part, part_lse = attention_n(*(x[span].transpose(0, 1)[None] for x in (q, k, v)), **one)
            outs.append(part[0].transpose(0, 1))
            lses.append(part_lse[0].T)
            start += length
        out, lse = torch.cat(outs), torch.cat(lses)
    loss = (out * whole["dout"].to(dtype)).sum()
    if case.lse_grad:
        loss = loss + (lse * whole["dlse"].to(wide)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    found = {"out": out, "lse": lse} | dict(zip([f"d{name}" for name in leaves], gradients, strict=True))
    return {name: x.detach() for name, x in found.items()}


def by_ranks(case: Case, whole: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    dim = tokens(case, "q")
    mine = {
        name: (x if name == "n" and per_head(case) else shard(x, dim)).clone().requires_grad_(name[0] != "d")
        for name, x in whole.items()
    }
    given = keywords(case, mine.get("n")) | {"return_lse": True, "backend": case.backend}
    if case.lengths is None:
        out, lse = DENSE[how](mine["q"], mine["k"], mine["v"], total_length=case.total, **given)
    else:
        starts = torch.tensor([0, *case.lengths], device=device()).cumsum(0, dtype=torch.int32)
        out, lse = VARLEN[how](mine["q"], mine["k"], mine["v"], starts, **given)
    assert out.dtype == case.dtype
    torch.testing.assert_close(unshard(out.detach(), dim).shape, whole["dout"].shape)
    loss = (out * mine["dout"]).sum()
    if case.lse_grad:
        loss = loss + (lse * mine["dlse"]).sum()
    leaves = {name: x for name, x in mine.items() if x.requires_grad}
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    if "n" in gradients and per_head(case):
        dist.all_reduce(gradients["n"])
    found = {"out": out, "lse": lse} | {f"d{name}": x for name, x in gradients.items()}
    return {name: x.detach() for name, x in found.items()}
