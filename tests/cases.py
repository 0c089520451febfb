"""The cases that every backend is tested on, and the table of which backend must serve which of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_n.backends import xformers
from attn_n.backends.flash_attn import version_2, version_3, version_4

# True if Triton's kernels run on the CPU here, under the interpreter: see conftest.py.
INTERPRETED = not torch.cuda.is_available()
# True if the Hopper kernels run here.
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call. `shift` is added to every logit, negative by default, so that n weighs as much as the keys."""

    name: str
    batch: int = 2
    heads_q: int = 2
    heads_kv: int = 2
    len_q: int = 33
    len_k: int = 33
    size: int = 16
    size_v: int = 16
    n: float | str = 1.0  # a number, "scalar" (a tensor), "per head", "zero per head", "sinks" or "sinks a row"
    sinks: tuple[float, ...] = ()
    sinks_shape: tuple[int, ...] = ()  # of sinks a row; by default that of the lse
    shift: float = -3.0
    causal: bool = False
    scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    # "bool", "float", "key padding", "hidden rows", "per head", "late" (hides the first keys), "float per head", or
    # "float of keys"
    mask: str = ""
    alibi: str = ""  # "per head" or "per batch"
    learned: bool = False  # the mask and the slopes have gradients
    layout: str = "heads first"  # of q, k and v, see LAYOUTS
    layout_of_dout: str = "heads first"
    lengths_q: tuple[int, ...] = ()  # varlen sequences, in place of batch and len_q
    lengths_k: tuple[int, ...] = ()
    used_q: tuple[int, ...] = ()  # seqused_q, seqused_k and leftpad_k
    used_k: tuple[int, ...] = ()
    leftpad: tuple[int, ...] = ()

    @property
    def padded(self) -> bool:
        return bool(self.used_q or self.used_k or self.leftpad)

    @property
    def varlen(self) -> bool:
        return bool(self.lengths_q)

    @property
    def features(self) -> set[str]:
        """Return the features of a case that a backend may have to refuse."""
        used = {
            "softcap": self.softcap is not None,
            "mask": bool(self.mask),
            "alibi": bool(self.alibi),
            "learned": self.learned,
            "window": self.window is not None,
            "causal, L != S": self.causal and (self.varlen or self.len_q != self.len_k) and self.len_q > 1,
            "varlen": self.varlen,
            "padded": self.padded,
            "leftpad, learned": bool(self.leftpad) and self.learned and bool(self.mask),
            "varlen, window": (self.varlen or self.padded) and self.window is not None and not self.causal,
            "window, open far before the keys": self._open_far_before_the_keys,
            "one query, one key": self.len_q == self.len_k == 1,
            "E != Ev": self.size != self.size_v,
            "E % 8": bool(self.size % 8),
            "E > 256": max(self.size, self.size_v) > 256,
            "E + 1 > 256": max(self.size, self.size_v) + 1 > 256,
        }
        return {name for name, present in used.items() if present}

    @property
    def _open_far_before_the_keys(self) -> bool:
        """Return True if FlashAttention 2 would hide keys: it takes S for the right side of a window that has none."""
        if self.window is None or self.causal or self.varlen or self.padded or self.len_q <= self.len_k + 1:
            return False
        return self.window[1] is None or self.window[1] >= self.len_k

    def __str__(self) -> str:
        return self.name


def _cases() -> list[Case]:
    few = {"len_q": 5, "len_k": 3}
    many = 770 if INTERPRETED else 1030  # from 768 on PyTorch's CPU kernel has blocks of up to 256 x 512; ours have 64
    numbers = [
        Case(f"n={n:g} at its own height", n=n, shift=math.log(n), len_q=7, len_k=5)
        for n in (1e-6, 1e-3, 1.0, 3.7, 1e4, 1e20)
    ]
    return [
        Case("plain softmax", n=0.0, shift=0.0),
        *numbers,
        Case("n=1, few keys", **few),
        Case("n=1e20, over small logits", n=1e20, shift=0.0, **few),
        Case("n=4, negative logits", n=4.0, shift=-3.0, **few),
        Case("one query, one key", len_q=1, len_k=1, shift=-1.0),
        Case("scalar tensor n", n="scalar", **few),
        Case("per-head n", n="per head", heads_q=4, heads_kv=4, **few),
        Case("per-head n, some zero", n="zero per head", **few),
        Case("sinks", n="sinks", sinks=(0.0, -2.0), **few),
        Case("sinks of 20 and 100", n="sinks", sinks=(20.0, 100.0), shift=0.0, **few),
        Case("sinks of 20 and 100 at their height", n="sinks", sinks=(20.0, 18.0), shift=19.0, **few),
        Case("one sink is minus infinity", n="sinks", sinks=(-math.inf, 1.0), **few),
        Case("sinks a row", n="sinks a row", shift=-1.0, **few),
        Case("sinks a row, causal, GQA", n="sinks a row", heads_q=2, causal=True, len_q=70, len_k=80, heads_kv=1),
        Case("sinks a batch", n="sinks a row", sinks_shape=(2, 2, 1), window=(3, 2), len_q=40, len_k=9),
        Case("sinks a query, for all heads", n="sinks a row", sinks_shape=(1, 1, 5), **few),
        Case("causal", causal=True),
        Case("causal, n=0", causal=True, n=0.0),
        Case("causal, more keys", causal=True, len_q=19, len_k=50),
        Case("causal, more keys, n=0", causal=True, len_q=19, len_k=50, n=0.0),
        Case("causal, fewer keys", causal=True, len_q=50, len_k=19),
        Case("causal, fewer keys, n=0", causal=True, len_q=50, len_k=19, n=0.0),
        Case("causal, one query, one key", causal=True, len_q=1, len_k=1),
        Case("causal, one query", causal=True, len_q=1, len_k=40),
        Case("window", window=(7, 3)),
        Case("window to the left", window=(7, None), len_q=20, len_k=41),
        Case("window to the right", window=(None, 2), len_q=20, len_k=41),
        Case("window one short of everything", window=(4, 3), len_q=5, len_k=6),
        Case("window to the left, far more queries", window=(3, None), len_q=40, len_k=9),
        Case("window wider than the keys, far more queries", window=(3, 12), len_q=40, len_k=9),
        Case("window of one key", window=(0, 0)),
        Case("causal window", causal=True, window=(5, 9), len_q=70, len_k=70),
        Case("window, rows without keys", window=(3, 2), len_q=40, len_k=9),
        Case("window, rows without keys, n=0", window=(3, 2), len_q=40, len_k=9, n=0.0),
        Case("long window in pieces", window=(40, 0), batch=1, len_q=600, len_k=600),
        Case("softcap", softcap=2.0, n=3.7, **few),
        Case("softcap, causal, ALiBi, GQA", softcap=5.0, causal=True, heads_q=4, alibi="per head"),
        Case(
            "softcap in pieces, GQA, window, mask",
            softcap=5.0,
            heads_q=2,
            batch=1,
            len_q=300,
            len_k=290,
            window=(40, 0),
            heads_kv=1,
            mask="hidden rows",
        ),
        Case("bool mask", mask="bool"),
        Case("float mask", mask="float"),
        Case("key padding mask", mask="key padding"),
        Case("mask per head", mask="per head"),
        Case("mask hides whole rows", mask="hidden rows"),
        Case("mask hides whole rows, n=0", mask="hidden rows", n=0.0),
        Case("mask hides the first block of keys", mask="late", batch=1, len_q=20, len_k=1100, n=100.0),
        Case("bool mask, causal", mask="bool", causal=True, len_q=20, len_k=30),
        Case("bool mask, window", mask="bool", window=(6, 1)),
        Case("ALiBi", alibi="per head"),
        Case("ALiBi, causal", alibi="per head", causal=True),
        Case("ALiBi per batch, causal", alibi="per batch", causal=True, len_q=20, len_k=31),
        Case("ALiBi, mask, window", alibi="per head", mask="float", window=(9, 9)),
        Case("learned mask", mask="float", learned=True),
        Case(
            "learned mask per head, causal, GQA",
            mask="float per head",
            learned=True,
            causal=True,
            heads_q=2,
            len_q=70,
            len_k=90,
            heads_kv=1,
        ),
        Case("learned mask of keys, softcap", mask="float of keys", learned=True, softcap=5.0, len_k=70, n=20.0),
        Case(
            "learned mask and ALiBi, window",
            mask="float",
            alibi="per batch",
            learned=True,
            window=(9, 4),
            len_q=40,
            len_k=30,
        ),
        Case(
            "learned ALiBi, causal, sinks",
            alibi="per head",
            learned=True,
            causal=True,
            n="sinks",
            sinks=(0.0, -2.0),
            len_k=70,
        ),
        Case("GQA", heads_q=6, heads_kv=2, n="per head"),
        Case("MQA, causal", heads_q=4, heads_kv=1, causal=True, len_q=20, len_k=33),
        Case("GQA, mask per head", heads_q=4, heads_kv=2, mask="per head"),
        Case("E=1", size=1, size_v=1, shift=0.0, **few),
        Case("E=3, Ev=5", size=3, size_v=5),
        Case("E=20", size=20, size_v=20),
        Case("E=64, Ev=32", size=64, size_v=32, len_q=8),
        Case("E=64, Ev=128, causal", size=64, size_v=128, causal=True),
        Case("E=128", size=128, size_v=128, len_q=9),
        Case("E=256", size=256, size_v=256, len_q=9),
        Case(
            "E=512, MQA, sinks, causal",
            size=512,
            size_v=512,
            heads_kv=1,
            len_q=40,
            len_k=40,
            n="sinks",
            sinks=(0.0, -2.0),
            causal=True,
        ),
        Case("E=300", size=300, size_v=300, len_q=9),
        Case("scale", scale=0.9, shift=-2.0, **few),
        Case("negative scale", scale=-0.4, shift=0.0, **few),
        Case("zero scale", scale=0.0, shift=0.0, **few),
        Case("many blocks", batch=1, heads_q=1, heads_kv=1, len_q=many, len_k=many, causal=True, shift=-6.0),
        Case("varlen", lengths_q=(5, 17, 1), lengths_k=(7, 17, 30)),
        Case("varlen, causal", lengths_q=(5, 17, 9), lengths_k=(5, 30, 4), causal=True),
        Case("varlen, causal, n=0", lengths_q=(5, 17, 9), lengths_k=(5, 30, 4), causal=True, n=0.0),
        Case("varlen, whole blocks", lengths_q=(64, 32), lengths_k=(64, 40), causal=True),
        Case("varlen, an empty sequence", lengths_q=(5, 0, 7, 6), lengths_k=(5, 4, 0, 6), n="per head"),
        Case(
            "varlen, GQA, sinks", lengths_q=(9, 8), lengths_k=(3, 8), heads_q=4, n="sinks", sinks=(0.0, 1.0, 2.0, -1.0)
        ),
        Case(
            "varlen, sinks a row, causal",
            lengths_q=(5, 0, 17, 6),
            lengths_k=(5, 4, 30, 0),
            n="sinks a row",
            causal=True,
        ),
        Case("varlen, sinks a token", lengths_q=(70, 17), lengths_k=(90, 30), n="sinks a row", sinks_shape=(87, 1)),
        Case("varlen, ALiBi, causal", lengths_q=(9, 18), lengths_k=(12, 18), alibi="per batch", causal=True),
        Case("varlen, causal window", lengths_q=(9, 18), lengths_k=(12, 18), causal=True, window=(4, None)),
        Case("varlen, window to the left", lengths_q=(40, 5), lengths_k=(9, 12), window=(3, None)),
        Case("varlen, window, ALiBi", lengths_q=(9, 18), lengths_k=(9, 18), window=(4, 2), alibi="per batch"),
        Case("varlen, mask", lengths_q=(9, 18), lengths_k=(3, 18), mask="per head"),
        Case("varlen, mask per sequence", lengths_q=(9, 18), lengths_k=(3, 18), mask="bool"),
        Case(
            "varlen, learned mask and ALiBi",
            lengths_q=(9, 18, 0),
            lengths_k=(12, 18, 3),
            mask="float per head",
            alibi="per head",
            learned=True,
            causal=True,
        ),
        Case("varlen, softcap", lengths_q=(9, 8), lengths_k=(3, 8), softcap=2.0),
        Case("padded, causal", batch=3, used_q=(20, 33, 0), used_k=(20, 33, 0), causal=True),
        Case("padded, causal, n=0", batch=3, used_q=(20, 33, 0), used_k=(20, 33, 0), causal=True, n=0.0),
        Case("padded keys", batch=3, used_k=(9, 33, 0), n="per head"),
        Case("padded keys, causal", batch=3, used_k=(9, 33, 31), causal=True, heads_kv=1),
        Case("padded queries, sinks a row", batch=3, used_q=(9, 33, 0), causal=True, n="sinks a row"),
        Case("padded left, causal", batch=3, leftpad=(0, 12, 33), causal=True, n="sinks", sinks=(0.0, -2.0)),
        Case(
            "padded on both sides, causal window, GQA",
            batch=4,
            heads_q=4,
            used_q=(10, 33, 8, 5),
            used_k=(30, 20, 5, 33),
            leftpad=(3, 0, 7, 30),
            causal=True,
            window=(5, None),
        ),
        Case("padded on both sides, window", batch=2, used_q=(30, 9), used_k=(31, 33), leftpad=(3, 20), window=(4, 2)),
        Case(
            "padded, whole blocks",
            heads_q=1,
            heads_kv=1,
            len_q=130,
            len_k=200,
            used_q=(128, 3),
            used_k=(192, 64),
            leftpad=(64, 0),
        ),
        Case("padded, mask, softcap", batch=2, used_q=(30, 9), leftpad=(3, 20), mask="float per head", softcap=3.0),
        Case("padded, mask per batch", batch=2, used_k=(30, 9), leftpad=(3, 0), mask="bool", causal=True),
        Case(
            "padded, learned mask and ALiBi",
            batch=2,
            used_q=(30, 9),
            used_k=(20, 33),
            mask="float per head",
            alibi="per batch",
            learned=True,
            causal=True,
        ),
        Case("padded left, learned ALiBi", batch=2, leftpad=(3, 20), alibi="per head", learned=True, window=(20, 3)),
        Case("padded left, learned mask", batch=2, leftpad=(3, 20), mask="float per head", learned=True),
    ]


CASES = _cases()


@dataclass
class Inputs:
    """The tensors of a case, and the keyword arguments of the call beyond q, k and v."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    n: float | Tensor | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    dout: Tensor = field(init=False)
    dlse: Tensor = field(init=False)

    @property
    def keywords(self) -> dict[str, Any]:
        case = self.case
        return {
            "causal": case.causal,
            "sm_scale": case.scale,
            "sm_n": self.n,
            "sinks": self.sinks,
            "attn_mask": self.mask,
            "window": case.window,
            "softcap": case.softcap,
            "alibi_slopes": self.alibi_slopes,
            **self.lengths(),
        }

    def lengths(self) -> dict[str, Tensor]:
        """Return seqused_q, seqused_k and leftpad_k of a padded case."""
        case = self.case
        given = {"seqused_q": case.used_q, "seqused_k": case.used_k, "leftpad_k": case.leftpad}
        return {name: torch.tensor(x, dtype=torch.int32, device=self.q.device) for name, x in given.items() if x}

    @property
    def differentiable(self) -> dict[str, Tensor]:
        tensors = {"q": self.q, "k": self.k, "v": self.v}
        if isinstance(self.n, Tensor):
            tensors["n"] = self.n
        if self.sinks is not None:
            tensors["sinks"] = self.sinks
        if self.case.learned and self.mask is not None:
            tensors["mask"] = self.mask
        if self.case.learned and self.alibi_slopes is not None:
            tensors["slopes"] = self.alibi_slopes
        return tensors

    def packing(self) -> tuple[Tensor, Tensor, int, int]:
        """Return cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k. Equal boundaries are one tensor."""
        lengths = self.case.lengths_q, self.case.lengths_k
        starts = [
            torch.tensor([0, *torch.tensor(one).cumsum(0)], dtype=torch.int32, device=self.q.device) for one in lengths
        ]
        return starts[0], starts[lengths[0] != lengths[1]], max(lengths[0]), max(lengths[1])


def make(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Make random inputs of a case; all that are differentiable require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if case.varlen:
        tokens_q, tokens_k, batch = sum(case.lengths_q), sum(case.lengths_k), len(case.lengths_q)
        rows, columns = max(case.lengths_q), max(case.lengths_k)
        shapes = [(tokens_q, case.heads_q), (tokens_k, case.heads_kv)]
    else:
        batch, rows, columns = case.batch, case.len_q, case.len_k
        shapes = [(batch, case.heads_q, rows), (batch, case.heads_kv, columns)]
    q, k, v = normal(*shapes[0], case.size), normal(*shapes[1], case.size), normal(*shapes[1], case.size_v)
    if case.shift:  # one component of q and k carries the shift, so that the logits keep their spread
        scale = 1 / math.sqrt(case.size) if case.scale is None else case.scale
        size = math.sqrt(abs(case.shift) / scale)
        q[..., 0], k[..., 0] = math.copysign(size, case.shift), size
    q, k, v = (x.to(dtype).to(device) for x in (q, k, v))
    if case.layout == "one storage":
        inputs = Inputs(case, *_in_one_storage(q, k, v))
    else:
        inputs = Inputs(case, *(laid_out(x, case.layout) for x in (q, k, v)))

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    heads = torch.linspace(0.3, 4.0, case.heads_q, dtype=wide, device=device)
    if case.n == "scalar":
        inputs.n = torch.tensor(1.7, dtype=wide, device=device)
    elif case.n == "per head":
        inputs.n = heads
    elif case.n == "zero per head":
        inputs.n = torch.where(torch.arange(case.heads_q, device=device) % 2 == 0, 0.0, heads)
    elif case.n == "sinks a row":
        inputs.sinks = (case.shift + 1 + 2 * normal(*(case.sinks_shape or shapes[0]))).to(wide).to(device)
    elif case.n == "sinks":
        inputs.sinks = torch.tensor(case.sinks, dtype=wide, device=device)
    else:
        assert isinstance(case.n, float)
        inputs.n = case.n

    mask_shape = (batch, 1, rows, columns)
    if case.mask == "bool":
        inputs.mask = (normal(*mask_shape) > -0.5).to(device)
    elif case.mask == "float":
        inputs.mask = normal(*mask_shape).masked_fill(normal(*mask_shape) > 1.0, -math.inf).to(dtype).to(device)
    elif case.mask == "key padding":
        inputs.mask = (torch.arange(columns) < torch.arange(1, batch + 1)[:, None] * 9)[:, None, None].to(device)
    elif case.mask == "hidden rows":
        inputs.mask = (normal(1, 1, rows, columns) > 0).logical_and(torch.arange(rows)[:, None] % 3 != 1).to(device)
    elif case.mask == "per head":
        inputs.mask = (normal(1, case.heads_q, 1, columns) > -0.5).to(device)
    elif case.mask == "float per head":
        inputs.mask = normal(1, case.heads_q, rows, columns).to(dtype).to(device)
    elif case.mask == "float of keys":
        inputs.mask = normal(batch, 1, 1, columns).to(dtype).to(device)
    elif case.mask == "late":
        inputs.mask = (torch.arange(columns) >= torch.arange(rows)[:, None] * 50).to(device)
    if case.alibi:
        slopes = torch.linspace(0.1, 0.9, case.heads_q, dtype=wide if case.learned else torch.float32, device=device)
        batches = torch.arange(1.0, batch + 1, device=device)[:, None]
        inputs.alibi_slopes = slopes if case.alibi == "per head" else slopes * batches

    out_shape = (*inputs.q.shape[:-1], case.size_v)
    inputs.dout = laid_out(normal(*out_shape).to(dtype).to(device), case.layout_of_dout)
    inputs.dlse = normal(*out_shape[:-1]).to(wide).to(device)
    if case.layout_of_dout in ("transposed", "of a sum"):
        inputs.dlse = laid_out(inputs.dlse, case.layout_of_dout)
    for b, (end_q, begin, end_k) in enumerate(in_use(case)):
        for x in (inputs.q, inputs.dout, inputs.dlse):
            x[b, :, end_q:] = math.nan
        for x in (inputs.k, inputs.v):
            x[b, :, :begin] = x[b, :, end_k:] = math.nan
    for tensor in inputs.differentiable.values():
        tensor.requires_grad_()
    return inputs


def in_use(case: Case) -> list[tuple[int, int, int]]:
    """Return for each batch of a padded case how many queries exist, and the first key and the end of those."""
    if not case.padded:
        return []
    every = (case.len_q,) * case.batch, (0,) * case.batch, (case.len_k,) * case.batch
    given = (case.used_q, case.leftpad, case.used_k)
    return list(zip(*(one or other for one, other in zip(given, every, strict=True)), strict=True))


# From the outermost dimension to the innermost one, of (B, H, L, E), of varlen (T, H, E), and of the lse (B, H, L).
ORDERS = {
    "heads first": ((0, 1, 2, 3), (0, 1, 2)),
    "tokens first": ((0, 2, 1, 3), (0, 1, 2)),
    "heads innermost": ((0, 2, 3, 1), (0, 2, 1)),
    "batch innermost": ((1, 2, 3, 0), (1, 2, 0)),
    "transposed": ((0, 1, 3, 2), (0, 2, 1), (1, 0)),
}
LAYOUTS = (
    *ORDERS, "channels last", "sliced", "expanded over the batch", "expanded over heads", "overlapping rows",
    "offset by one", "one storage",
)  # fmt: skip
# TMA descriptors cannot address these: strided columns, or a stride of 0 between heads or rows.
NO_DESCRIPTORS = (
    "heads innermost", "batch innermost", "transposed", "channels last", "expanded over heads", "overlapping rows",
)  # fmt: skip


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return x in another memory layout; where elements share memory, with some of its values."""
    if layout == "channels last":  # as heads innermost, but its strides differ for one head
        return x.contiguous(memory_format=torch.channels_last)
    if layout in ORDERS:
        order = next(order for order in ORDERS[layout] if len(order) == x.dim())
        inverse = sorted(range(x.dim()), key=lambda place: order[place])
        return x.permute(order).contiguous().permute(inverse)
    if layout == "sliced":  # in every dimension, by multiples of 16 bytes
        wider = x.new_full([size + (16 if dim == x.dim() - 1 else 3) for dim, size in enumerate(x.shape)], math.nan)
        inside = wider[tuple(slice(1, -2) for _ in x.shape[:-1])][..., 8:-8]
        return inside.copy_(x)
    if layout == "expanded over the batch":
        return x[:1].expand(x.shape)
    if layout == "expanded over heads":
        return x[:, :1].expand(x.shape)
    if layout == "overlapping rows":
        return torch.cat([x[..., 0, :], x[..., 1:, -1]], -1).unfold(-1, x.shape[-1], 1)
    if layout == "offset by one":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert layout == "of a sum"
    return x.flatten()[0].expand(x.shape)


def _in_one_storage(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Lay q, k and v out as one projection of each token gives them: its queries, keys and values follow each other."""
    varlen = q.dim() == 3
    tokens_first = [x if varlen else x.transpose(1, 2) for x in (q, k, v)]
    widths = [x.shape[-2] * x.shape[-1] for x in tokens_first]
    tokens = max(x.shape[-3] for x in tokens_first)
    together = q.new_full((*tokens_first[0].shape[:-3], tokens, sum(widths)), math.nan)
    views = []
    for part, x in zip(together.split(widths, -1), tokens_first, strict=True):
        view = part.unflatten(-1, x.shape[-2:]).narrow(-3, 0, x.shape[-3]).copy_(x)
        views.append(view if varlen else view.transpose(1, 2))
    return views


def why_not_usable(backend: str) -> str | None:
    """Return the reason why the library of `backend` cannot be used here; None if it can."""
    problems = {
        "flash_attn:2": version_2.why_not_usable,
        "flash_attn:3": version_3.why_not_usable,
        "flash_attn:4": version_4.why_not_usable,
        "xformers:flash": lambda: xformers.why_not_usable("flash"),
        "xformers:cutlass": lambda: xformers.why_not_usable("cutlass"),
    }
    return problems[backend]() if backend in problems else None


def must_serve(backend: str, device: str, dtype: torch.dtype, case: Case, lse_grad: bool, grad: bool = True) -> bool:
    """Return True if `backend` has to serve the case there: any other refusal or acceptance fails a test.

    `lse_grad`: lse is returned and differentiated; `grad`: anything is.
    """
    features, half = case.features, dtype in (torch.bfloat16, torch.float16)
    on_gpu, half_on_gpu = device == "cuda", device == "cuda" and half
    flash = {"mask", "E > 256", "learned"}
    flash_2 = flash | {"window, open far before the keys"} | ({"E + 1 > 256"} if lse_grad and grad else set())
    cudnn_features = {
        "softcap", "mask", "alibi", "window", "causal, L != S", "varlen", "padded", "one query, one key", "E != Ev",
        "E % 8", "E > 256", "learned",
    }  # fmt: skip
    efficient = (
        on_gpu
        and dtype != torch.float64
        and not features & ({"softcap", "learned", "padded", "alibi"} if half else {"softcap", "learned", "padded"})
    )
    softcap_3 = {"softcap"} if version_3.left_out("SOFTCAP") else set()
    table = {
        "reference": True,
        "sdpa:cpu": device == "cpu" and "learned" not in features,
        "sdpa:flash": half_on_gpu and not features & (flash_2 | {"softcap", "alibi"}),
        "sdpa:cudnn": half_on_gpu and not features & cudnn_features and not (lse_grad and grad),
        "sdpa:efficient": efficient,
        "triton:portable": (on_gpu or INTERPRETED)
        and dtype != torch.float64
        and (half or "E > 256" not in features)
        and "leftpad, learned" not in features,
        "triton:hopper": half_on_gpu
        and HOPPER
        and not features & {"mask", "alibi"}
        and 32 < max(case.size, case.size_v) <= 256
        and case.size % 8 == case.size_v % 8 == 0
        and case.layout not in NO_DESCRIPTORS,
        "flash_attn:2": half_on_gpu and not features & flash_2,
        "flash_attn:3": half_on_gpu
        and not features & (flash | softcap_3 | {"alibi"})
        and not (grad and version_3.left_out("BACKWARD")),
        "flash_attn:4": half_on_gpu and not features & (flash | {"alibi"}),
        "xformers:flash": half_on_gpu and not features & (flash_2 | {"softcap", "alibi", "varlen, window"}),
        "xformers:cutlass": efficient,
    }
    for family in ("sdpa", "triton"):
        table[family] = any(serves for name, serves in table.items() if name.startswith(f"{family}:"))
    return table[backend]
