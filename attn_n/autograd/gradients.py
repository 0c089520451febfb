"""The tensors that a forward saves for its backward, and the gradients under every way to differentiate a call."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_n.autograd import flops, passes
from attn_n.autograd.prepared import PreparedCall
from attn_n.backends.base import Backend
from attn_n.call import Options, Saved, autocast, transforms
from attn_n.call.errors import UnsupportedError


def save(
    ctx: Any, places: Sequence[int | None], arguments: Sequence[Any], options: Options, out: Tensor, lse: Tensor,
    rng_state: Tensor | None,
) -> None:  # fmt: skip
    """`places` says of each input of the function which of `passes.Found` is its gradient."""
    q, k, v, n, n_is_logit, log_n, numbers, backend = arguments
    checksum = _backend_checksum(backend) if options.dropout_p else None
    tensors = *options.tensors, numbers, checksum
    # Operators cannot return None: without dropout rng_state is an empty tensor there, and None in the plain function.
    saved = q, k, v, out, lse, rng_state if options.dropout_p else None, n
    if all(x is None for x in tensors):
        ctx.save_for_backward(*saved)
        ctx.options = options
    else:
        ctx.save_for_backward(*saved, *tensors)
        ctx.options = options.without_tensors()
    ctx.rest = n_is_logit, log_n, backend, places
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, saved: Sequence[Any], dout: Tensor | None, dlse: Tensor | None, call: PreparedCall | None = None
) -> tuple[Tensor | None, ...]:
    n_is_logit, log_n, backend, places = ctx.rest
    if dout is None and dlse is None:
        return (None,) * len(places)
    q, k, v, out, lse, rng_state, n, *tensors = saved
    options, numbers = ctx.options, None
    if tensors:
        *of_options, numbers, checksum = tensors
        options = options.with_tensors(of_options)
        if (
            checksum is not None
            and not torch.compiler.is_compiling()
            and not torch.equal(checksum, _backend_checksum(backend))
        ):
            raise RuntimeError(
                f"dropout_p: a checkpoint ran the forward again on another backend than {backend!r}, where the same"
                " seed drops other weights.\nTo do: pass backend=, or keep use_backend around the backward as well."
            )
    if transforms.have_tangents(dout, dlse, q, k, v, out, lse, n):
        raise no_second_derivative(backend)
    found: Sequence[Tensor | None]
    inputs: tuple[bool, ...] = ctx.needs_input_grad
    needed = passes.Needed(*[inputs[places.index(of)] for of in range(3, 6)])
    batched = transforms.is_batched(dout) or transforms.is_batched(dlse)
    if backend == passes.ANY_BACKEND and not (batched or transforms.needs_dispatcher(q)):
        chosen = passes.chosen_now(backend, q, k, v, n, options)
        if chosen.differentiates:
            if numbers is not None:
                log_n, options = passes.with_numbers(numbers, log_n, options)
            found = _by_autograd(chosen, dout, dlse, q, k, v, n, n_is_logit, log_n, options)
            return _of_inputs(found, places, inputs)
    if dout is None:
        dout = torch.zeros_like(out)
    if call is not None and call.serves(q, dout, dlse):
        found = call.backward(dout, dlse, Saved(q, k, v, out, lse, None, rng_state), n, needed, options)
        return _of_inputs(found, places, inputs)
    arguments = (
        dout, dlse, q, k, v, out, lse, rng_state, n, n_is_logit,
        log_n is None and passes.rows_may_be_empty_in(q, k, options), *needed, numbers, backend,
    )  # fmt: skip
    with autocast.suspended(q.device.type):
        if torch.is_grad_enabled():
            found = Backward.apply(*arguments, *options)  # type: ignore[no-untyped-call]
        elif batched or transforms.needs_dispatcher(q):
            flops.register()
            found = torch.ops.attn_n.backward(*arguments, *options)
        else:
            found = passes.backward(options, *arguments)
    return _of_inputs(found, places, inputs)


def _of_inputs(
    found: Sequence[Tensor | None], places: Sequence[int | None], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs, None for those that have or need none."""
    return tuple([
        None if place is None or not needs_it else found[place] for place, needs_it in zip(places, needed, strict=True)
    ])  # fmt: skip


def _by_autograd(
    chosen: Backend, dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None,
    n_is_logit: bool, log_n: float | None, options: Options,
) -> list[Tensor | None]:  # fmt: skip
    """`passes.Found` by a backend without a backward of its own, of an exported program whose forward it ran."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    of_n: float | Tensor | None = log_n if n is None else n.detach().requires_grad_()
    mask, slopes = [
        x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for x in (options.mask, options.alibi_slopes)
    ]
    options = options.replaced(mask=mask, alibi_slopes=slopes)
    with torch.enable_grad(), autocast.suspended(q.device.type):
        results = chosen.attend(q, k, v, of_n, n_is_logit or n is None, options, True)
    given = [(x, dx) for x, dx in zip(results, (dout, dlse), strict=True) if x is not None and dx is not None]
    inputs = (q, k, v, of_n, mask, slopes)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    found = iter(torch.autograd.grad([x for x, _ in given], leaves, [dx for _, dx in given], allow_unused=True))
    return [next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs]


class Backward(torch.autograd.Function):
    """The backward of a call under create_graph=True: it can be computed, but not differentiated once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = torch.ops.attn_n.backward(*arguments)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.backend = inputs[15]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise no_second_derivative(ctx.backend)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_second_derivative(ctx.backend)


def no_second_derivative(backend: str) -> UnsupportedError:
    return UnsupportedError(
        f"backend {backend!r} has no double backward: its gradients cannot be differentiated again.\n"
        "To do: use backend='reference', which is differentiable any number of times."
    )


def _backend_checksum(backend: str) -> Tensor:
    """Identifies the backend of a forward with dropout: a checkpoint recomputes saved tensors, and no other state."""
    return torch.tensor(zlib.crc32(backend.encode()), device="cpu")
