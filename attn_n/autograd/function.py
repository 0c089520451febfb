"""Attention with its gradients, by PyTorch's autograd.

Host cost of a call with gradients: `torch.library.custom_op` with `register_autograd` about 69 us, an operator of a
`torch.library.Library` under a plain `autograd.Function` about 31 us, a bare function under it about 10 us. Hence an
eager call runs the function itself. The registered operator wraps the same function; it is used only where somebody
looks at operators: a compiler, a tensor subclass, a dispatch mode, a functorch transform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_n.autograd import flops, gradients, operators, sharding
from attn_n.autograd.passes import Needed
from attn_n.autograd.prepared import PreparedCall
from attn_n.call import Options, Saved, transforms


def attend(
    q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, call: PreparedCall
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of canonical tensors by a backend with a forward and a backward; n is `()` or `(Hq,)`."""
    if not transforms.needs_dispatcher(q):
        return attend_eagerly(q, k, v, n, options, call)
    flops.register()
    sharding.register()
    arguments = (q, k, v, n, call.n_is_logit, call.log_n, call.numbers, call.backend, *options)
    if transforms.by_functional_gradient() and not torch.compiler.is_compiling():
        out, lse, _ = operators.Operator.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        out, lse, _ = operators.run(arguments)
    return out, lse


def attend_eagerly(
    q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, call: PreparedCall
) -> tuple[Tensor, Tensor | None]:
    """`attend` where nobody watches operators; an lse that nobody wants may be None."""
    if not call.needs_grad:
        out, lse, _ = call.forward(q, k, v, n, options, call.lse_wanted)
        return out, lse
    # Here autograd sees them as tensors, beside the options.
    mask, slopes = options.mask if call.of_mask else None, options.alibi_slopes if call.of_slopes else None
    attended = _apply(q, k, v, n, mask, slopes, options, call)
    return attended if call.lse_wanted else (attended, None)


_PLACES = (0, 1, 2, 3, 4, 5, None, None)  # the arguments of `_Attention`, by their places in `passes.Found`


class _Attention(torch.autograd.Function):
    """An eager call."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, mask: Tensor | None, slopes: Tensor | None,
        options: Options, call: PreparedCall,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        # The lse always has n here. Under a checkpoint the backward gets what is saved from a second forward, which can
        # run in another way than the first: nothing may be known of it but what it returned.
        out, lse, rng_state = call.forward(q, k, v, n, options, True)
        if options is call.options and rng_state is None:
            ctx.save_for_backward(q, k, v, out, lse, None, n)
            ctx.options = options
            ctx.set_materialize_grads(False)
        else:
            arguments = q, k, v, n, call.n_is_logit, call.log_n, None, call.backend
            gradients.save(ctx, _PLACES, arguments, options, out, lse, rng_state)
        ctx.call = call
        return (out, lse) if call.lse_wanted else out  # each output takes autograd 2 us

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> Any:
        call = ctx.call
        if dout is None and dlse is None:
            return (None,) * len(_PLACES)
        q, k, v, out, lse, _, n, *rest = saved = ctx.saved_tensors
        if rest or not call.serves(q, dout, dlse):
            ctx.rest = call.n_is_logit, call.log_n, call.backend, _PLACES
            return gradients.gradients(ctx, saved, dout, dlse, call)
        if dout is None:
            dout = torch.zeros_like(out)
        needs_n = n is not None and ctx.needs_input_grad[3]
        dq, dk, dv, dn, _, _ = call.backward(dout, dlse, Saved(q, k, v, out, lse), n, Needed(needs_n), ctx.options)
        return dq, dk, dv, dn if needs_n else None, None, None, None, None


# `Function.apply` looks for functorch first, which takes a quarter of its time on the host; `attend` has done so.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Attention).apply
