"""Checks of the arguments of `flash_attention_n_with_kvcache`: each error names the argument and what was expected."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_n.cache.layout import Layout
from attn_n.call import CacheRequest, checks

FLOAT8 = (torch.float8_e4m3fn,)


class Checked(NamedTuple):
    """A call whose arguments are valid has this cache, and these keys in it.

    Attributes:
        new: how many new keys each sequence has.
        before: how many keys each sequence has before them; None is a full cache.
    """

    layout: Layout
    new: int
    before: int | Tensor | None


def arguments(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: CacheRequest, cache_leftpad: Tensor | None
) -> Checked:
    """Check all arguments but those that `flash_attention_n` has too."""
    found = layout(q, k_cache, v_cache, cache.block_table, cache.cache_batch_idx)
    new = new_rows(q, k_cache, v_cache, cache.k, cache.v)
    before = seqlens(cache.cache_seqlens, q, new, found.most)
    if cache_leftpad is not None:
        leftpad(cache_leftpad, q, found.most)
    rotary(cache.rotary_cos, cache.rotary_sin, q, new, found.most)
    checks.flag("rotary_interleaved", cache.rotary_interleaved)
    descale("k_descale", cache.k_descale, q, k_cache)
    descale("v_descale", cache.v_descale, q, v_cache)
    checks.length("num_splits", cache.num_splits)
    table = found.block_table
    if table is not None and checks.readable(table):
        used = found.most if before is None else before + new
        in_use = used.tolist() if isinstance(used, Tensor) else [used] * found.batch
        table_in_use(table, k_cache.shape[0], found.block, in_use)
    return Checked(found, new, before)


def layout(
    q: object, k_cache: object, v_cache: object, block_table: Tensor | None, cache_batch_idx: Tensor | None
) -> Layout:
    """Check q and the cache, and return how that is laid out."""
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    found = {name: checks.tensor(name, x) for name, x in given.items()}
    for name, x in found.items():
        if x.dim() != 4:
            expected = "(B, Hq, L, E)" if name == "q" else "(B, Hkv, Smax, E) or, paged, (blocks, Hkv, block, E)"
            raise ValueError(f"{name}: expected 4 dimensions {expected}, got shape {tuple(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected no gradient, got a tensor that requires one: this function is for inference, call it"
                " under torch.no_grad(), or flash_attention_n with seqused_k to train"
            )
    queries, keys, values = found.values()
    checks.floating("q", queries)
    for name, x in (("k_cache", keys), ("v_cache", values)):
        checks.same_kind(name, x, queries)
        if x.dtype not in (queries.dtype, *FLOAT8):
            expected = f"{_name(queries)} as q, or float8_e4m3fn"
            raise TypeError(f"{name}: expected {expected}, got {_name(x)}")
        checks.same_device(name, x, queries)
    if keys.dtype != values.dtype:
        raise TypeError(f"v_cache: expected the dtype of k_cache, {_name(keys)}, got {_name(values)}")
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"v_cache: expected the shape of k_cache but for the head size, {tuple(keys.shape)}, got"
            f" {tuple(values.shape)}"
        )
    batch, heads = queries.shape[:2]
    if keys.shape[3] != queries.shape[3]:
        raise ValueError(f"k_cache: expected the head size of q, {queries.shape[3]}, got {keys.shape[3]}")
    if keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(
            f"k_cache: expected a number of heads that divides the {heads} heads of q, got {keys.shape[1]}"
        )
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx: expected None together with block_table, which says where sequences lie")
        table = checks.tensor("block_table", block_table)
        _int32("block_table", table, queries)
        if table.dim() != 2 or table.shape[0] != batch:
            raise ValueError(f"block_table: expected shape ({batch}, blocks), got {tuple(table.shape)}")
        return Layout(batch, keys.shape[2], table)
    if cache_batch_idx is not None:
        rows = checks.lengths("cache_batch_idx", cache_batch_idx, queries)
        if checks.readable(rows):
            in_range("cache_batch_idx", rows, 0, keys.shape[0] - 1, "a row of the cache")
    elif keys.shape[0] != batch:
        raise ValueError(f"k_cache: expected as many rows as q, {batch}, or cache_batch_idx, got {keys.shape[0]}")
    return Layout(batch, keys.shape[2], None, cache_batch_idx)


def new_rows(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: object, v: object) -> int:
    """Check the new keys and values, and return how many there are for each sequence."""
    if k is None and v is None:
        return 0
    if k is None or v is None:
        raise ValueError(f"{'k' if k is None else 'v'}: expected new keys and values together, or neither, got None")
    shapes = {}
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        new = checks.floating(name, checks.tensor(name, x))
        checks.same_kind(name, new, q)
        if new.dim() != 4 or (new.shape[0], new.shape[1], new.shape[3]) != (q.shape[0], cache.shape[1], cache.shape[3]):
            expected = f"({q.shape[0]}, {cache.shape[1]}, new keys, {cache.shape[3]})"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(new.shape)}")
        if new.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {_name(q)}, got {_name(new)}")
        checks.same_device(name, new, q)
        if new.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected no gradient: call it under torch.no_grad()")
        shapes[name] = new.shape[2]
    if shapes["k"] != shapes["v"]:
        raise ValueError(f"v: expected as many new rows as k, {shapes['k']}, got {shapes['v']}")
    return shapes["k"]


def seqlens(value: Any, q: Tensor, new: int, most: int) -> int | Tensor | None:
    """Check how many keys the cache has before the new ones are written."""
    if value is None:
        if new:
            raise ValueError("cache_seqlens: expected where the new k and v go, an integer or (B,) int32, got None")
        return None
    if isinstance(value, Tensor):
        found = checks.lengths("cache_seqlens", value, q)
        if checks.readable(found):
            in_range("cache_seqlens", found, 0, most - new, _room(most, new))
        return found
    length = checks.length("cache_seqlens", value)
    if length + new > most:
        raise ValueError(f"cache_seqlens: expected numbers from 0 to {most - new}, {_room(most, new)}, got {length}")
    return length


def leftpad(value: object, q: Tensor, most: int) -> None:
    found = checks.lengths("cache_leftpad", value, q)
    if checks.readable(found):
        in_range("cache_leftpad", found, 0, most, f"the {most} keys of the cache")


def rotary(cos: Tensor | None, sin: Tensor | None, q: Tensor, new: int, most: int) -> None:
    """Check the tables of rotary embedding: one line for each position that a cache may have."""
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError(f"rotary_{'cos' if cos is None else 'sin'}: expected both tables, or neither, got None")
    if not new:
        raise ValueError("rotary_cos: expected new keys k and v, which it turns as it turns q, got None")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        table = checks.floating(name, checks.tensor(name, x))
        if table.dim() != 2 or 2 * table.shape[1] > q.shape[3] or table.shape[0] < most:
            expected = f"(positions, pairs) with at least {most} positions and at most {q.shape[3] // 2} pairs"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(table.shape)}")
        checks.same_device(name, table, q)
    if cos.shape != sin.shape:
        raise ValueError(f"rotary_sin: expected the shape of rotary_cos, {tuple(cos.shape)}, got {tuple(sin.shape)}")


def descale(name: str, value: object, q: Tensor, cache: Tensor) -> None:
    """Check the factors `(B, Hkv)` of a float8 cache."""
    if value is None:
        return
    factors = checks.floating(name, checks.tensor(name, value))
    if cache.dtype not in FLOAT8:
        raise ValueError(f"{name}: expected None beside a cache in {_name(cache)}, which is not scaled, got a tensor")
    if factors.shape != (q.shape[0], cache.shape[1]):
        raise ValueError(f"{name}: expected shape ({q.shape[0]}, {cache.shape[1]}), got {tuple(factors.shape)}")
    checks.same_device(name, factors, q)


def table_in_use(block_table: Tensor, blocks: int, block: int, used: list[int]) -> None:
    """Check the entries of a block table that are followed; those behind the keys in use may be anything."""
    for b, (row, length) in enumerate(zip(block_table.tolist(), used, strict=True)):
        read = row[: -(-length // block)]
        if read and not (min(read) >= 0 and max(read) < blocks):
            expected = f"entries from 0 to {blocks - 1} for the {length} keys of sequence {b}"
            raise ValueError(f"block_table: expected {expected}, got {read}")


def in_range(name: str, x: Tensor, least: int, most: int, said: str) -> None:
    values = x.tolist()
    if values and not (min(values) >= least and max(values) <= most):
        raise ValueError(f"{name}: expected numbers from {least} to {most}, {said}, got {values}")


def _room(most: int, new: int) -> str:
    return f"the {most} keys of the cache" + (f" less the {new} new ones" if new else "")


def _int32(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {_name(x)}")
    checks.same_device(name, x, q)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
