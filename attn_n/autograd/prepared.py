"""A call that is prepared once for all that look like it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_n.autograd import passes
from attn_n.backends import registry
from attn_n.backends.base import Prepared
from attn_n.call import Options, Saved, transforms
from attn_n.call.checks import PLAIN


class PreparedCall:
    """How the calls of one kind run: they differ in the contents of their tensors alone.

    Attributes:
        backend: the name of the one that serves, or `ANY_BACKEND`.
        options: without the tensors, which each call brings.
        n_is_logit: a tensor n holds log n.
        log_n: n as a number; None if it is a tensor, or 0.
        numbers: `(log_n, scale)` as a float64 tensor on the CPU, which then stands for both of them: a number that is
            handed to an operator is a constant of a compiled graph, and each value would compile another one.
        lse_wanted: otherwise the lse that a call without gradients returns may lack n, which saves a launch.
        needs_grad: it will be differentiated.
        of_mask, of_slopes: by its mask, and by its ALiBi slopes.
        under_autocast: autocast surrounds it, and is off while the backend runs.
    """

    def __init__(
        self, backend: str, options: Options, n_is_logit: bool, log_n: float | None, numbers: Tensor | None,
        lse_wanted: bool, needs_grad: bool, of_mask: bool, of_slopes: bool, under_autocast: bool,
    ) -> None:  # fmt: skip
        self.backend, self.options, self.n_is_logit, self.log_n = backend, options, n_is_logit, log_n
        self.numbers, self.lse_wanted, self.needs_grad = numbers, lse_wanted, needs_grad
        self.of_mask, self.of_slopes, self.under_autocast = of_mask, of_slopes, under_autocast
        self._passes: Prepared | None = None
        self._applies_n = self._rows_may_be_empty = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, lse_wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`passes.forward`, with what the first call of its kind has found out."""
        prepared = self._passes
        if prepared is None:
            return self._first_forward(q, k, v, n, options, lse_wanted)
        log_n = self.log_n if n is None else passes.log_of(q, n, self.n_is_logit)
        if self._applies_n:
            return prepared.forward(q, k, v, log_n, options)
        return passes.forward_by(prepared, False, q, k, v, log_n, options, lse_wanted)

    def _first_forward(
        self, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, lse_wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        served = registry.loaded(self.backend)
        if q.numel() and k.numel():
            log_n = self.log_n if n is None else passes.log_of(q, n, self.n_is_logit)
            self._applies_n, self._rows_may_be_empty = served.applies_n, passes.rows_may_be_empty_in(q, k, options)
            # Last, because it tells other threads that all of this is known.
            self._passes = served.prepare(q, k, v, log_n if served.applies_n else None, options)
            return self.forward(q, k, v, n, options, lse_wanted)
        return passes.forward(options, lse_wanted, q, k, v, n, self.n_is_logit, self.log_n, None, self.backend)

    def at_other_lengths(self, packing: tuple[Any, ...]) -> PreparedCall:
        """Return this call for other lengths; the last two of `packing` are the longest sequences."""
        options = self.options._replace(max_seqlen_q=packing[2], max_seqlen_k=packing[3]) if packing else self.options
        return PreparedCall(
            self.backend, options, self.n_is_logit, self.log_n, self.numbers, self.lse_wanted, self.needs_grad,
            self.of_mask, self.of_slopes, self.under_autocast,
        )  # fmt: skip

    def serves(self, q: Tensor, dout: Tensor | None, dlse: Tensor | None) -> bool:
        """Return False where `backward` does not: dispatch modes, autocast, batched or differentiable gradients.

        Nor does it on devices that have no key in the cache of calls.
        """
        return not (
            self._passes is None
            or torch.is_grad_enabled()
            or not (q.is_cuda or q.is_cpu)
            or torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu")
            or transforms.watched()
            or type(q) not in PLAIN
            or transforms.is_batched(dout)
            or (dlse is not None and transforms.is_batched(dlse))
        )

    def backward(
        self, dout: Tensor, dlse: Tensor | None, saved: Saved, n: Tensor | None, needed: passes.Needed, options: Options
    ) -> passes.Found:
        """`passes.backward`, with what the forward has found out."""
        assert self._passes is not None
        rows_may_be_empty = self.log_n is None and self._rows_may_be_empty
        return passes.backward_by(
            self._passes, dout, dlse, saved, n, self.n_is_logit, rows_may_be_empty, needed, options
        )
