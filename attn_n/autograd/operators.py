"""The torch operators attn_n::forward and attn_n::backward, for compilers, dispatch modes and functorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from attn_n.autograd import batching, gradients, passes
from attn_n.backends import registry
from attn_n.backends.base import Backend, empty_in_order, lies_in_order
from attn_n.call import Options

# How a schema spells the types of `Options`. Lengths are symbols of a compiled graph.
_TYPES: tuple[tuple[Any, str], ...] = (
    (float, "float"), (float | None, "float?"), (int, "SymInt"), (int | None, "SymInt?"), (Tensor | None, "Tensor?"),
)  # fmt: skip
_OPTIONS = ", ".join(
    f"{next(spelled for kind, spelled in _TYPES if kind == hint)} {name}"
    for name, hint in get_type_hints(Options).items()
)
# `n_is_logit` is no bool because DTensor keeps its decisions by what follows the first integer of a schema.
_FORWARD = (
    "Tensor q, Tensor k, Tensor v, Tensor? n, int n_is_logit, float? log_n, Tensor? numbers, str backend, " + _OPTIONS
)
_BACKWARD = (
    "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? rng_state, Tensor? n,"
    " int n_is_logit, bool rows_may_be_empty, bool needs_n_grad, bool needs_mask_grad, bool needs_slopes_grad,"
    " Tensor? numbers, str backend, " + _OPTIONS
)
_PURE, _RANDOM = "forward", "forward_with_dropout"

_library: Any = torch.library.Library("attn_n", "DEF")
_library.define(
    f"{_PURE}({_FORWARD}) -> (Tensor out, Tensor lse, Tensor rng_state)", tags=(torch.Tag.pt2_compliant_tag,)
)
# Dropout has its own operator, because `nondeterministic_seeded` makes torch.compile save and restore the generator's
# state around a checkpoint, which costs time. CSE still merges equal calls; the unused argument `drawn`, a random
# number of the graph, makes them differ.
_library.define(
    f"{_RANDOM}({_FORWARD}, Tensor? drawn) -> (Tensor out, Tensor lse, Tensor rng_state)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
_library.define(
    f"backward({_BACKWARD}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dn, Tensor dmask, Tensor dslopes)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def run(arguments: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    q, options = arguments[0], options_of(arguments)
    results: tuple[Tensor, Tensor, Tensor]
    if options.dropout_p:
        # Drawn in a graph alone: in an eager call it would shift what the kernel draws.
        drawn = torch.randint(1 << 62, (), device=q.device) if torch.compiler.is_compiling() else None
        results = torch.ops.attn_n.forward_with_dropout(*arguments, drawn)
    else:
        results = torch.ops.attn_n.forward(*arguments)
    return results


def options_of(arguments: Sequence[Any]) -> Options:
    return Options(*arguments[8 : 8 + len(Options._fields)])


class Operator(torch.autograd.Function):
    """The operator, with its own arguments: for functorch, whose kind of a function costs an eager call 25 us."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return run(arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gradients.save(ctx, _PLACES[: len(inputs)], inputs[:8], options_of(inputs), *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Any) -> Any:
        return gradients.gradients(ctx, ctx.saved_tensors, dout, dlse)


# The inputs of a forward operator, with `drawn` at the end, by the places of their gradients in `passes.Found`.
_PLACES = (
    0, 1, 2, 3, None, None, None, None, *[{"mask": 4, "alibi_slopes": 5}.get(name) for name in Options._fields], None,
)  # fmt: skip


def _forward_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, backend, options = arguments[0], arguments[7], options_of(arguments)
    out, lse, rng_state = passes.forward(options, True, *arguments[:8])
    if rng_state is None:
        rng_state = torch.empty(2 if options.dropout_p else 0, dtype=torch.int64, device=q.device)
    promised = _promises(backend)
    return _in_order(out, promised.out_dim_order(q)), _in_order(lse, promised.lse_dim_order(q)), rng_state


def _backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    q, k, v, backend = *arguments[2:5], arguments[15]
    dq, dk, dv, *others = passes.backward(Options(*arguments[16:]), *arguments[:16])
    order = _promises(backend).gradient_dim_order
    return _in_order(dq, order(q)), _in_order(dk, order(k)), _in_order(dv, order(v)), *others


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, v, promised, options = arguments[0], arguments[2], _promises(arguments[7]), options_of(arguments)
    out = empty_in_order(q, (*q.shape[:-1], v.shape[-1]), promised.out_dim_order(q))
    lse = empty_in_order(q, q.shape[:-1], promised.lse_dim_order(q)).to(passes.lse_dtype(q))
    return out, lse, q.new_empty(2 if options.dropout_p else 0, dtype=torch.int64)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    q, k, v, lse, n, promised = *arguments[2:5], arguments[6], arguments[8], _promises(arguments[15])
    options = Options(*arguments[16:])
    others = zip((n, options.mask, options.alibi_slopes), arguments[11:14], strict=True)
    dq, dk, dv = (empty_in_order(x, x.shape, promised.gradient_dim_order(x)) for x in (q, k, v))
    nothing = lse.new_empty(0)
    of_n, *of_options = [x if needs_it else nothing for x, needs_it in others]
    return dq, dk, dv, lse.new_empty(of_n.shape), *[x.new_empty(x.shape) for x in of_options]


def _promises(backend: str) -> Backend:
    """The backend whose orders of dimensions the results have; of an open choice the default ones."""
    return Backend() if backend == passes.ANY_BACKEND else registry.loaded(backend)


def _in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x with the strides that the fake promised to torch.compile; a copy where the backend returned others."""
    return x if lies_in_order(x, order) else empty_in_order(x, x.shape, order).copy_(x)


for _name in (_PURE, _RANDOM):
    _library.impl(_name, _forward_operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attn_n::{_name}", _fake_forward, lib=_library)
    torch.library.register_autograd(
        f"attn_n::{_name}", Operator.backward, setup_context=Operator.setup_context, lib=_library
    )
    torch.library.register_vmap(f"attn_n::{_name}", batching.rule(getattr(torch.ops.attn_n, _name)), lib=_library)
_library.impl("backward", _backward_operator, "CompositeExplicitAutograd")
torch.library.register_fake("attn_n::backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "attn_n::backward", gradients.Backward.backward, setup_context=gradients.Backward.setup_context, lib=_library
)
torch.library.register_vmap("attn_n::backward", batching.rule(torch.ops.attn_n.backward), lib=_library)
