"""Attention of the queries of this rank to keys that came from another one, by any backend.

The forward of a part is that of plain attention, n = 0. Its backward is that of a backend which is handed `out` and
`lse` of the whole rows, with n inside: with these, the gradients of the parts add up (section "backward" of
FlashAttention-2, T. Dao, 2023).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from attn_n.autograd import passes
from attn_n.backends import registry
from attn_n.backends.base import Backend
from attn_n.call import Options, describe
from attn_n.dispatch import choose
from attn_n.distributed.layout import Span
from attn_n.distributed.schedule import Part
from attn_n.sink.merging import merge_


class Attention(NamedTuple):
    """What all parts share.

    Attributes:
        backend: the one that is forced, or None.
        needs_grad: there will be a backward, and with `lse_has_grad` one of the lse too.
    """

    scale: float
    softcap: float | None
    backend: str | None
    needs_grad: bool
    lse_has_grad: bool

    def forward(self, part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return out `(B, Hq, rows, Ev)` and lse `(B, Hq, rows)` of these rows and keys, which are given alone."""
        options = self._options(part, q.device)
        q, k, v = _as_called(part, q, k, v)
        with torch.no_grad():
            out, lse, _ = passes.forward(
                options, True, q, k, v, None, False, None, None, self._chosen(options, q, k, v)
            )
        if part.starts is None:
            return out, lse
        return _of_batch(out), lse.T[None]

    def backward(
        self, part: Part, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        """Return dq, dk and dv of these rows and keys; `out` and `lse` are those of the whole rows, with n."""
        options = self._options(part, q.device)
        q, k, v, dout, out = _as_called(part, q, k, v, dout, out)
        if part.starts is not None:
            lse, dlse = lse[0].T, None if dlse is None else dlse[0].T
        name = self._chosen(options, q, k, v)
        chosen = registry.loaded(name)
        if chosen.differentiates:
            found = _by_autograd(chosen, dout, dlse, q, k, v, out, lse, options)
        else:
            found = passes.backward(
                options, dout, dlse, q, k, v, out, lse, None, None, False, False, False, False, False, None, name
            )[:3]
        return found if part.starts is None else tuple([_of_batch(x) for x in found])

    def _options(self, part: Part, device: torch.device) -> Options:
        options = Options(self.scale, part.left, part.right, softcap=self.softcap)
        if part.starts is None:
            return options
        starts = _on_device(part.starts, device)
        longest = max(stop - start for start, stop in zip(part.starts, part.starts[1:], strict=False))
        return options.replaced(cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest)

    def _chosen(self, options: Options, q: Tensor, k: Tensor, v: Tensor) -> str:
        call = describe(
            q, k, v, options, n_kind="none", return_lse=not self.needs_grad or self.lse_has_grad,
            needs_grad=self.needs_grad,
        )  # fmt: skip
        return choose.choose(call, self.backend)[0]


class Rows:
    """out and lse at n = 0 of all rows of this rank, over the keys that it has attended to so far."""

    def __init__(self, q: Tensor, width_v: int) -> None:
        self._like, self._width_v = q, width_v
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def merge(self, rows: Span, out: Tensor, lse: Tensor) -> None:
        if self._out is None and rows.length == self._like.shape[2]:
            self._out, self._lse = out.to(passes.lse_dtype(out)), lse
            return
        all_out, all_lse = self.merged()
        merge_(of(all_out, rows), of(all_lse, rows), out, lse)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return out in the dtype of lse, which the caller may write into, and lse."""
        if self._out is None or self._lse is None:
            q, dtype = self._like, passes.lse_dtype(self._like)
            self._out = q.new_zeros((*q.shape[:-1], self._width_v), dtype=dtype)
            self._lse = q.new_full(q.shape[:-1], -math.inf, dtype=dtype)
        return self._out, self._lse


class Sum:
    """The sum of the gradients of some tokens `(B, H, L, E)`, to each of which at most so many terms are added.

    It is in float32 (float64). Of two terms it is in their own dtype, which rounds their sum once, too: so beside the
    memory that the kernels need there is no float32 tensor where two ranks share a sequence.
    """

    def __init__(self, like: Tensor, terms: int) -> None:
        self._like, self._dtype = like, like.dtype if terms <= 2 else torch.promote_types(like.dtype, torch.float32)
        self._sum: Tensor | None = None

    def add(self, span: Span, x: Tensor) -> None:
        if span.length == 0:
            return
        if self._sum is None and span == (0, self._like.shape[2]):
            self._sum = x
            return
        like = self._like
        self._sum = torch.zeros_like(like, dtype=self._dtype) if self._sum is None else self._sum.to(self._dtype)
        of(self._sum, span).add_(x)

    def result(self) -> Tensor:
        """Return the sum in the dtype of the tokens."""
        return torch.zeros_like(self._like) if self._sum is None else self._sum.to(self._like.dtype)


def of(x: Tensor, span: Span) -> Tensor:
    """Return these tokens of `(B, H, L, ...)`."""
    return x if span == (0, x.shape[2]) else x[:, :, span.start : span.stop]


def _as_called(part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return `(1, H, T, E)` as `(T, H, E)` for a part that is of varlen sequences."""
    return tensors if part.starts is None else tuple([x[0].transpose(0, 1) for x in tensors])


def _of_batch(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


@functools.lru_cache(64)
def _on_device(starts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(starts, dtype=torch.int32, device=device)


def _by_autograd(
    chosen: Backend, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    options: Options,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients by a backend without a backward of its own.

    With the weight `w = exp(part_lse - lse)` of a part in its row, `d out / d part = w`,
    `d out / d part_lse = w (part - out)` and `d lse / d part_lse = w`.
    """
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        part, part_lse = chosen.attend(q, k, v, None, False, options, True)
    assert part_lse is not None
    with torch.no_grad():
        weight = (part_lse - lse).exp().masked_fill(part_lse == -math.inf, 0.0)
        wide = dout.to(lse.dtype)
        through_lse = (wide * (part.to(lse.dtype) - out.to(lse.dtype))).sum(-1)
        dpart_lse = weight * (through_lse if dlse is None else through_lse + dlse)
        dpart = (wide * weight[..., None]).to(part.dtype)
    return torch.autograd.grad((part, part_lse), (q, k, v), (dpart, dpart_lse))
