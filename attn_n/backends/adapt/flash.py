"""Libraries with FlashAttention's interface: tokens before heads, windows, varlen, one head size for q, k and v."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from attn_n.backends.adapt import padding
from attn_n.backends.adapt.layout import common_width, is_of_width, lse_as_value_column, narrowed, of_width
from attn_n.backends.base import HALF, Backend, Prepared, aligned
from attn_n.call import AttentionCall, Gradients, Grads, Options, Saved


class FlashBackend(Backend):
    """A backend on a library that takes `(B, L, H, E)`, or varlen `(T, H, E)`, with lse `(B, H, L)`, or `(H, T)`.

    Attributes:
        takes_dlse: its backward takes the gradient of lse; otherwise that is passed as one more column of v.
        backward_multiple: its backward gets head sizes that are multiples of this.
    """

    devices = ("cuda",)
    dtypes = HALF
    rocm = False
    compares_lengths = True
    takes_dlse = False
    backward_multiple = 8

    def kernel_forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return out, lse, which is -inf for rows without visible keys, and the state of dropout."""
        raise NotImplementedError

    def kernel_backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        """Return dq, dk and dv; dlse is None unless the library takes it."""
        raise NotImplementedError

    def too_wide(self, call: AttentionCall, widest: int = 256) -> str | None:
        """Return the reason why the head sizes of the call are not served, or None."""
        extra = 1 if call.return_lse and call.needs_grad and not self.takes_dlse else 0
        width = common_width(call.head_dim, call.head_dim_v, extra)
        if width > widest:
            of = ", of which one carries the gradient of lse" if extra else ""
            return f"takes head sizes up to {widest}, got {width}{of}"
        return None

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> Prepared:
        of_batch, width = not (options.varlen or options.padded), q.shape[-1]
        if of_batch and width % 8 == 0 and all(is_of_width(x, width) for x in (q, k, v)):
            return FlashBatch(self)
        return self

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if options.padded:
            return padding.forward_packed(self, q, k, v, options)
        size_v = v.shape[-1]
        q, k, v = _tokens_first(options, common_width(q.shape[-1], size_v), q, k, v)
        out, lse, rng_state = self.kernel_forward(q, k, v, options)
        if options.cu_seqlens_q is None:
            out = out.transpose(1, 2)
        else:
            lse = lse.transpose(0, 1)
        return narrowed(out, size_v), lse, rng_state

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        if options.padded:
            return padding.backward_packed(self, grads, saved, options)
        dout, dlse, *_ = grads
        q, k, v, out, lse, log_n, rng_state = saved
        size, size_v = q.shape[-1], v.shape[-1]
        as_column = dlse is not None and not self.takes_dlse
        width = common_width(size, size_v, 1 if as_column else 0, self.backward_multiple)
        if dlse is not None and not self.takes_dlse:
            dout, v, out = lse_as_value_column(dout, dlse, v, out, width)
            dlse = None
        dout, q, k, v, out = _tokens_first(options, width, dout, q, k, v, out)
        if options.varlen:
            lse, dlse = lse.transpose(0, 1), None if dlse is None else dlse.transpose(0, 1)
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        gradients = self.kernel_backward(Grads(dout, dlse), Saved(q, k, v, out, lse, log_n, rng_state), options)
        dq, dk, dv = gradients[:3] if options.varlen else (x.transpose(1, 2) for x in gradients[:3])
        return Gradients(narrowed(dq, size), narrowed(dk, size), narrowed(dv, size_v))


class FlashBatch:
    """A prepared call of a batch whose q, k and v the library takes as they are, if they are aligned."""

    def __init__(self, backend: FlashBackend) -> None:
        self._backend, self.backward = backend, backend.backward

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not aligned(q, k, v):
            return self._backend.forward(q, k, v, log_n, options)
        out, lse, rng_state = self._backend.kernel_forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), options
        )
        return out.transpose(1, 2), lse, rng_state


class Sequences(NamedTuple):
    """The starts of varlen sequences and the longest lengths; for batches the lengths alone."""

    starts_q: Tensor | None
    starts_k: Tensor | None
    max_q: int
    max_k: int


def sequences(options: Options, q: Tensor, k: Tensor) -> Sequences:
    """Return the starts and lengths of q and k, whose tokens come before heads."""
    if options.cu_seqlens_q is None:
        return Sequences(None, None, q.shape[1], k.shape[1])
    # max_seqlen may be overstated: the kernels round it up, and count tiles by it in 32 bits.
    longest = min(options.max_seqlen_q, q.shape[0]), min(options.max_seqlen_k, k.shape[0])
    return Sequences(options.cu_seqlens_q, options.cu_seqlens_k, *longest)


def _tokens_first(options: Options, width: int, *tensors: Tensor) -> list[Tensor]:
    """Transpose `(B, H, L, E)` to `(B, L, H, E)`; varlen tensors have that order already."""
    wide = [of_width(x, width) for x in tensors]
    return wide if options.varlen else [x.transpose(1, 2) for x in wide]
