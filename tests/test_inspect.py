"""What `attn_n.inspect` says of heads and activations, against the whole matrix of weights in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_n import UnsupportedError, flash_attention_n, flash_attention_n_varlen, flash_attention_n_with_kvcache
from attn_n.dispatch import run
from attn_n.inspect import Distribution, Heads, attention, moments, parameters, record
from attn_n.nn import MultiheadAttentionN
from tests.oracle import attention_n

F64 = torch.float64


class Calls(nn.Module):
    """Runs a function that attends."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def qkv(heads: int = 4, heads_kv: int = 2, len_q: int = 5, len_k: int = 7, batch: int = 2) -> list[Tensor]:
    sizes = (heads, len_q), (heads_kv, len_k), (heads_kv, len_k)
    return [2 * torch.randn(batch, *size, 8, dtype=F64) for size in sizes]


def rows_of(q: Tensor, k: Tensor, first: int | list[int] = 0, **given: Any) -> Tensor:
    """Return rows, weight to nothing, entropy and weight on the first key `(4, B, Hq, L)`, by the oracle."""
    keys = torch.eye(k.shape[2], dtype=F64).expand(*k.shape[:3], -1)
    weights, _ = attention_n(q, k, keys, **given)
    nothing = (1 - weights.sum(-1)).clamp_min(0.0)
    entropy = -(torch.special.xlogy(weights, weights).sum(-1) + torch.special.xlogy(nothing, nothing))
    index = torch.as_tensor(first).expand(k.shape[0])
    on_first = torch.stack([weights[b, :, :, i] for b, i in enumerate(index)])
    sees = (weights > 0).any(-1)
    return torch.where(sees, torch.stack([torch.ones_like(nothing), nothing, entropy, on_first]), 0.0)


def assert_heads(found: Heads, *expected: Tensor) -> None:
    """Compare with the rows `(4, B, Hq, L)` of one or several batches."""
    rows, *sums = sum(each.sum((1, 3)) for each in expected)  # type: ignore[misc]
    assert found.rows == rows.tolist()
    for name, total in zip(("to_nothing", "entropy", "first_token"), sums, strict=True):
        torch.testing.assert_close(torch.tensor(getattr(found, name), dtype=F64), total / rows, rtol=1e-9, atol=1e-9)


def recorded(function: Callable[..., Any], *batches: list[Any]) -> Heads:
    with record(Calls(function)) as found:
        pass
    assert found.attention == {}
    model = Calls(function)
    with record(model) as found:
        for inputs in batches:
            model(*inputs)
            function(*inputs)  # outside of the model
    model(*batches[0])
    assert run.watchers == []
    assert found.attention["Calls"].calls == len(batches)
    return found.attention["Calls"]


SINKS = torch.tensor([-1.0, 0.5, 2.0, 5.0], dtype=F64)
MASK = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0]]).bool()[:, None, None]
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "n": ({"sm_n": 3.0, "causal": True}, {"n": 3.0, "causal": True}),
    "n of a head": ({"sm_n": SINKS.exp()}, {"n": SINKS.exp()}),
    "sinks": ({"sinks": SINKS, "window": (1, 1)}, {"sinks": SINKS, "window": (1, 1)}),
    "sinks of a row": ({"sinks": torch.arange(5.0).double().view(1, 1, 5)},
                       {"sinks": torch.arange(5.0).double().view(1, 1, 5)}),
    "softcap": ({"softcap": 2.0, "sm_n": 1.0, "sm_scale": 0.3}, {"softcap": 2.0, "n": 1.0, "scale": 0.3}),
    "alibi": ({"alibi_slopes": SINKS.abs()}, {"alibi_slopes": SINKS.abs()}),
    "mask": ({"attn_mask": MASK, "sm_n": 1.0}, {"mask": MASK, "n": 1.0, "first": [1, 2]}),
    "floating mask": ({"attn_mask": torch.zeros(2, 1, 1, 7).masked_fill(~MASK, -math.inf)},
                      {"mask": MASK, "first": [1, 2]}),
    "hidden rows": ({"attn_mask": torch.ones(5, 7).triu(5) > 0}, {"mask": torch.ones(5, 7).triu(5) > 0, "first": 5}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("logits", [1, 100, 1 << 22])
def test_heads_of_every_kind_of_call(kind: str, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LOGITS", logits)
    given, meant = CALLS[kind]
    batches = [qkv(), qkv()]
    found = recorded(lambda *x: flash_attention_n(*x, **given), *batches)
    expected = [rows_of(q, k, **meant) for q, k, _ in batches]
    assert_heads(found, *expected)
    if kind == "hidden rows":
        assert found.rows == [2 * 2 * 2] * 4
    if any(name in meant for name in ("n", "sinks")):
        assert min(found.to_nothing) > 0.001


def test_padded_batches_whose_padding_is_nan() -> None:
    q, k, v = qkv(len_q=7)
    used_q, used_k, first = (torch.tensor(x, dtype=torch.int32) for x in ((5, 7), (6, 5), (0, 2)))
    for x, used in ((q, used_q), (k, used_k), (v, used_k)):
        x[0, :, used[0] :] = x[1, :, used[1] :] = math.nan
    k[1, :, :2] = math.nan
    given = {"causal": True, "seqused_q": used_q, "seqused_k": used_k, "leftpad_k": first, "sm_n": 1.0}
    found = recorded(lambda *x: flash_attention_n(*x, **given), [q, k, v])
    parts = [
        rows_of(q[b : b + 1, :, :i], k[b : b + 1, :, begin:j], causal=True, n=1.0)
        for b, (i, begin, j) in enumerate(zip(used_q, first, used_k, strict=True))
    ]
    assert_heads(found, *parts)


@pytest.mark.parametrize("how", ["sinks of a head", "sinks of a row", pytest.param("jagged", marks=pytest.mark.slow)])
def test_varlen(how: str) -> None:
    sinks = torch.randn(11, 4, dtype=F64) if how == "sinks of a row" else SINKS
    q, k, v = (torch.randn(11, heads, 8, dtype=F64) for heads in (4, 2, 2))
    starts = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    cu = starts, starts, 7, 7
    parts = []
    for begin, end in ((0, 4), (4, 11)):
        one_q, one_k = (x[begin:end].transpose(0, 1)[None] for x in (q, k))
        of_one = sinks if sinks.dim() == 1 else sinks[begin:end].t()[None]
        parts.append(rows_of(one_q, one_k, causal=True, sinks=of_one))
    if how == "jagged":
        offsets = starts.long()
        nested = [torch.nested.nested_tensor_from_jagged(x, offsets, max_seqlen=7).transpose(1, 2) for x in (q, k, v)]
        assert_heads(recorded(lambda *x: flash_attention_n(*x, causal=True, sinks=sinks), nested), *parts)
        return
    found = recorded(lambda *x: flash_attention_n_varlen(*x, *cu, causal=True, sinks=sinks), [q, k, v])
    assert_heads(found, *parts)


@pytest.mark.parametrize("paged", [False, True])
def test_kv_caches(paged: bool, ran: list[str]) -> None:
    """On a CPU `triton:decode` reads a paged cache in place, under the interpreter, and the other one is a batch."""
    q, k, _ = (x.float() for x in qkv(len_q=2, len_k=8))
    lengths, given = torch.tensor([5, 8], dtype=torch.int32), {}
    cache = k
    if paged:
        given = {"block_table": torch.tensor([[3, 0], [1, 2]], dtype=torch.int32), "backend": "triton"}
        cache = torch.full((4, 2, 4, 8), math.nan)
        for b, blocks in enumerate(given["block_table"]):
            cache[blocks.long()] = k[b].unflatten(1, (2, 4)).transpose(0, 1)
    found = recorded(
        lambda q, k: flash_attention_n_with_kvcache(q, k, k, cache_seqlens=lengths, sm_n=1.0, **given), [q, cache]
    )
    assert ("forward triton:decode" in ran) == paged
    parts = [rows_of(q[b : b + 1].double(), k[b : b + 1, :, :j].double(), causal=True, n=1.0)
             for b, j in enumerate(lengths)]  # fmt: skip
    rows = sum(each.sum((1, 3)) for each in parts)
    for name, total in zip(("to_nothing", "entropy", "first_token"), rows[1:], strict=True):
        torch.testing.assert_close(torch.tensor(getattr(found, name)), (total / rows[0]).float(), atol=1e-5, rtol=1e-5)


class Blocks(nn.Module):
    """Two attention layers, one of them called twice, and checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MultiheadAttentionN(8, 2, batch_first=True, softmax_n=n) for n in (1.0, 4.0))
        self.up = nn.Linear(8, 6)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layers[0], self.layers[1], self.layers[1]):
            if self.checkpointed:
                x = x + checkpoint(self.attend, layer, x, use_reentrant=False)
            else:
                x = x + self.attend(layer, x)
        return self.up(x)

    def attend(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, x, x)[0]


def test_modules_are_found_by_their_names() -> None:
    model = Blocks()
    with record(model) as found:
        model(torch.randn(3, 5, 8))
        model(torch.randn(1, 4, 8))
    assert {name: heads.calls for name, heads in found.attention.items()} == {"layers.0": 2, "layers.1": 4}
    assert found.attention["layers.0"].rows == [19, 19]
    assert found.attention["layers.1"].rows == [38, 38]
    names = {"layers.0", "layers.0.out_proj", "layers.1", "layers.1.out_proj", "up", "Blocks"}
    assert found.activations.keys() == names
    assert found.activations["up"].count == 19 * 6
    assert not any(module._forward_hooks or len(module._forward_pre_hooks) > 1 for module in model.modules())
    with record(model, layers=["layers.*", "up"]) as found:
        model(torch.randn(1, 4, 8))
    assert found.activations.keys() == names - {"Blocks"}
    with (
        pytest.raises(ValueError, match="layers: expected names or patterns of modules, got 'blocks"),
        record(model, ["blocks.*"]),
    ):
        pass


def test_attention_twice_in_one_module() -> None:
    small, large = qkv(), qkv(heads=6)
    model = Calls(lambda: (flash_attention_n(*small), flash_attention_n(*large, sm_n=1.0)))
    with record(model) as found:
        model()
    assert_heads(found.attention["Calls"], rows_of(*small[:2]))
    assert_heads(found.attention["Calls#1"], rows_of(*large[:2], n=1.0))


def test_a_checkpoint_is_not_counted_twice() -> None:
    model, x = Blocks(), torch.randn(3, 5, 8, requires_grad=True)
    with record(model) as expected:
        model(x).sum().backward()
    model.checkpointed = True
    with record(model) as found:
        model(x).sum().backward()
    assert found.json() == expected.json()


@pytest.mark.slow
def test_compiled_models_run_eagerly() -> None:
    model, x = Blocks().eval(), torch.randn(1, 4, 8)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with record(model) as found:
        compiled(x)
    assert {name: heads.calls for name, heads in found.attention.items()} == {"layers.0": 1, "layers.1": 2}


def test_errors_within() -> None:
    model, x = Blocks(), torch.randn(1, 4, 8)
    with record(model) as found:
        with pytest.raises(ValueError, match="query: expected shape"):
            model(x[..., :4])
        model(x)
    assert found.attention["layers.0"].calls == 1
    with record(model), pytest.raises(UnsupportedError, match=r"a transform of torch\.func hides the values"):
        torch.func.vmap(model)(torch.randn(2, 1, 4, 8))
    assert run.watchers == []


def test_half_precision_and_autocast() -> None:
    q, k, v = (x.bfloat16() for x in qkv())
    found = recorded(lambda *x: flash_attention_n(*x, sm_n=1.0), [q, k, v])
    expected = rows_of(q.double(), k.double(), n=1.0)
    rows = expected.sum((1, 3))
    torch.testing.assert_close(torch.tensor(found.entropy), (rows[2] / rows[0]).float(), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert recorded(lambda *x: flash_attention_n(*x, sm_n=1.0), [q.float(), k.float(), v.float()]) == found


def distribution(*batches: Tensor) -> Distribution:
    """Return the statistics of all batches, with all of their values at once."""
    x = torch.cat([batch.double().flatten() for batch in batches])
    z = (x - x.mean()) / x.var(correction=0).sqrt()
    beyond = [
        int(((batch.double() - batch.double().mean()).abs() > 6 * batch.double().var(correction=0).sqrt()).sum())
        for batch in batches
    ]
    third, fourth = float(z.pow(3).mean()), float(z.pow(4).mean())
    variance = float(x.var(correction=0))
    return Distribution(len(x), float(x.mean()), variance, third, fourth, float(x.abs().max()), sum(beyond))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_moments_of_batches_are_those_of_all_values(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mean far from zero, where sums of powers would cancel, and batches that differ."""
    monkeypatch.setattr(moments, "CHUNK", chunk)
    batches = [1000 + torch.randn(40, 3), 1000 + 3 * torch.randn(2, 3).exp(), torch.full((5,), 1010.0)]
    batches[0][3, 1] += 200
    batches = [batch.to(dtype) for batch in batches]
    model = nn.Identity()
    with record(model) as found:
        for batch in batches:
            model(batch)
        model(torch.randn(0, 3))
    expected = distribution(*batches)
    assert expected.beyond_6_sigma == 1
    one = found.activations["Identity"]
    for name, value in vars(expected).items():
        assert getattr(one, name) == pytest.approx(value, rel=1e-9), name


def test_parameters() -> None:
    model = nn.Sequential(nn.Linear(50, 60), nn.Linear(60, 3, bias=False))
    found = parameters(model)
    assert found.keys() == {"0.weight", "0.bias", "1.weight"}
    assert found["0.weight"].kurtosis == pytest.approx(distribution(model[0].weight.detach()).kurtosis)


def test_outputs_that_are_no_tensor() -> None:
    x = torch.randn(5)
    for output in ({"ids": torch.arange(3), "x": (None, x)}, (torch.arange(3), [x]), x):
        model = Calls(lambda output=output: output)
        with record(model) as found:
            model()
        assert found.activations["Calls"].count == 5
    model = Calls(lambda: None)
    with record(model) as found:
        model()
    assert str(found) == "No attention recorded.\n\nNo activations recorded."


def test_table_and_json() -> None:
    model = Blocks()
    with record(model) as found:
        model(torch.randn(3, 5, 8))
    lines = str(found).splitlines()
    assert lines[0].split() == ["attention", "head", "rows", "to", "nothing", "entropy", "first", "token"]
    heads = found.attention["layers.1"]
    assert lines[3].split() == ["layers.1", "0", "30", f"{heads.to_nothing[0]:.2%}", f"{heads.entropy[0]:.3f}",
                                f"{heads.first_token[0]:.2%}"]  # fmt: skip
    assert any(line.startswith("layers.0.out_proj ") for line in lines)
    stored = json.loads(found.json())
    assert stored["attention"]["layers.1"]["to_nothing"] == heads.to_nothing
    assert stored["activations"]["up"]["kurtosis"] == found.activations["up"].kurtosis
    model = nn.Identity()
    with record(model) as constant:
        model(torch.ones(3))
    assert json.loads(constant.json())["activations"]["Identity"]["kurtosis"] is None


@pytest.mark.slow
def test_picture(tmp_path: Path) -> None:
    model = Blocks()
    with record(model) as found:
        found.draw(tmp_path / "empty.png")
        model(torch.randn(3, 5, 8))
    found.draw(tmp_path / "record.png")
    assert (tmp_path / "record.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 10_000


def test_first_token_of_two_recorders_at_once() -> None:
    model = Blocks()
    with record(model) as outer, record(model.layers[0]) as inner:
        model(torch.randn(3, 5, 8))
    assert inner.attention["MultiheadAttentionN"] == outer.attention["layers.0"]
    assert len(outer.attention) == 2


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model, x = Blocks(), torch.randn(3, 5, 8)
    with record(model) as expected:
        model(x)
    with record(model.cuda()) as found:
        model(x.cuda())
    for name, heads in expected.attention.items():
        assert found.attention[name].rows == heads.rows
        assert found.attention[name].entropy == pytest.approx(heads.entropy, rel=1e-3)
    assert found.activations["up"].variance == pytest.approx(expected.activations["up"].variance, rel=1e-2)
