"""The torch operators attn_n::forward and attn_n::backward, and the autograd function over them.

Host cost of a call with gradients: `torch.library.custom_op` with `register_autograd` about 69 us, an operator of a
`torch.library.Library` under a plain `autograd.Function` about 31 us, a bare function under it about 10 us. Hence an
eager call runs the function itself. The registered operator wraps the same function; it is used only where somebody
looks at operators: a compiler, a tensor subclass, a dispatch mode, a functorch transform.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from attn_n.autograd import batching, flops
from attn_n.backends import registry
from attn_n.backends.base import Backend, Prepared, empty_in_order, lies_in_order
from attn_n.call import AttentionCall, Grads, Options, Saved, autocast, describe, transforms
from attn_n.call.checks import PLAIN
from attn_n.call.errors import UnsupportedError
from attn_n.sink import rescale

_OPTIONS = (
    "float scale, SymInt? window_left, SymInt? window_right, float? softcap, float dropout_p, Tensor? mask,"
    " Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
    " Tensor? seqused_q, Tensor? seqused_k, Tensor? leftpad_k"
)
_FORWARD = (
    "Tensor q, Tensor k, Tensor v, Tensor? n, bool n_is_logit, float? log_n, Tensor? numbers, str backend, " + _OPTIONS
)
_BACKWARD = (
    "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? rng_state, Tensor? n,"
    " bool n_is_logit, bool rows_may_be_empty, bool needs_n_grad, Tensor? numbers, str backend, " + _OPTIONS
)
_PURE, _RANDOM = "forward", "forward_with_dropout"

ANY_BACKEND = ""  # in place of a name: the choice is made when the operator runs
_choose: Callable[[AttentionCall], Backend]


def choose_by(choose: Callable[[AttentionCall], Backend]) -> None:
    """What chooses then. It is handed in from above: the operators know backends, and not how one is chosen."""
    global _choose
    _choose = choose


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
    f"backward({_BACKWARD}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dn)", tags=(torch.Tag.pt2_compliant_tag,)
)


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
    """

    def __init__(
        self, backend: str, options: Options, n_is_logit: bool, log_n: float | None, numbers: Tensor | None,
        lse_wanted: bool, needs_grad: bool,
    ) -> None:  # fmt: skip
        self.backend, self.options, self.n_is_logit, self.log_n = backend, options, n_is_logit, log_n
        self.numbers, self.lse_wanted, self.needs_grad = numbers, lse_wanted, needs_grad
        self._served: Backend | None = None
        self._passes: Prepared | None = None
        self._rows_may_be_empty = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, lse_wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`_forward`, with what the first call of its kind has found out."""
        passes = self._passes
        if passes is None or self._served is None:
            return self._first_forward(q, k, v, n, options, lse_wanted)
        log_n = self.log_n if n is None else _log_per_head(q, n, self.n_is_logit)
        if log_n is None or self._served.applies_n:
            return passes.forward(q, k, v, log_n, options)
        out, lse, rng_state = passes.forward(q, k, v, None, options)
        return out, rescale.add_sink_(out, lse, log_n, options.varlen, lse_wanted), rng_state

    def _first_forward(
        self, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, lse_wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        served = registry.loaded(self.backend)
        if not (served.differentiates or q.numel() == 0 or k.numel() == 0):
            log_n = self.log_n if n is None else _log_per_head(q, n, self.n_is_logit)
            self._passes = served.prepare(q, k, v, log_n if served.applies_n else None, options)
            self._rows_may_be_empty, self._served = _rows_may_be_empty(q, k, options), served
            return self.forward(q, k, v, n, options, lse_wanted)
        return _forward(options, lse_wanted, q, k, v, n, self.n_is_logit, self.log_n, None, self.backend)

    def at_other_lengths(self, packing: tuple[Any, ...]) -> PreparedCall:
        """The same for a call of other lengths; of `packing` the last two are the longest sequences."""
        options = self.options._replace(max_seqlen_q=packing[2], max_seqlen_k=packing[3]) if packing else self.options
        return PreparedCall(
            self.backend, options, self.n_is_logit, self.log_n, self.numbers, self.lse_wanted, self.needs_grad
        )

    @property
    def has_run(self) -> bool:
        return self._passes is not None

    def watched(self, q: Tensor, dout: Tensor | None, dlse: Tensor | None) -> bool:
        """Whether a backward is more than this call's: somebody looks at operators, autocasts, or batches gradients."""
        return needs_dispatcher(q) or _is_batched(dout) or _is_batched(dlse) or autocast.enabled(q.device.type)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, saved: Saved, n: Tensor | None, needs_n_grad: bool, options: Options
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`_backward`, with what the forward has found out."""
        assert self._passes is not None
        rows_may_be_empty = self.log_n is None and self._rows_may_be_empty
        return _backward_by(
            self._passes, dout, dlse, saved, n, self.n_is_logit, rows_may_be_empty, needs_n_grad, options
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, call: PreparedCall
) -> tuple[Tensor, Tensor]:
    """(out, lse) of canonical tensors by a backend with a forward and a backward; n is `()` or `(Hq,)`."""
    if not needs_dispatcher(q):
        return attend_eagerly(q, k, v, n, options, call)
    flops.register()
    arguments = (q, k, v, n, call.n_is_logit, call.log_n, call.numbers, call.backend, *options)
    if transforms.by_functional_gradient() and not torch.compiler.is_compiling():
        out, lse, _ = _Operator.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        out, lse, _ = _operator(arguments)
    return out, lse


def attend_eagerly(
    q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, call: PreparedCall
) -> tuple[Tensor, Tensor]:
    """`attend` where nobody watches operators."""
    if not call.needs_grad:
        out, lse, _ = call.forward(q, k, v, n, options, call.lse_wanted)
        return out, lse
    attended: tuple[Tensor, Tensor] = _Attention.apply(q, k, v, n, options, call)  # type: ignore[no-untyped-call]
    return attended


def needs_dispatcher(x: Tensor) -> bool:
    """Whether somebody looks at operators: a compiler, a subclass, a mode (checkpoints), functorch, forward-mode AD."""
    if torch.compiler.is_compiling():
        return True
    return (
        type(x) not in PLAIN
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def _operator(arguments: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    q, options = arguments[0], _options_of(arguments)
    results: tuple[Tensor, Tensor, Tensor]
    if options.dropout_p:
        # Drawn in a graph alone: in an eager call it would shift what the kernel draws.
        drawn = torch.randint(1 << 62, (), device=q.device) if torch.compiler.is_compiling() else None
        results = torch.ops.attn_n.forward_with_dropout(*arguments, drawn)
    else:
        results = torch.ops.attn_n.forward(*arguments)
    return results


def _options_of(arguments: Sequence[Any]) -> Options:
    return Options(*arguments[8 : 8 + len(Options._fields)])


class _Attention(torch.autograd.Function):
    """An eager call."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options, call: PreparedCall
    ) -> tuple[Tensor, Tensor]:
        # The lse always has n here. Under a checkpoint the backward gets what is saved from a second forward, which can
        # run in another way than the first: nothing may be known of it but what it returned.
        out, lse, rng_state = call.forward(q, k, v, n, options, True)
        if options is call.options and rng_state is None:
            ctx.save_for_backward(q, k, v, out, lse, None, n)
            ctx.options = options
            ctx.set_materialize_grads(False)
        else:
            arguments = q, k, v, n, call.n_is_logit, call.log_n, None, call.backend
            _save(ctx, 6, arguments, options, out, lse, rng_state)
        ctx.call = call
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        call = ctx.call
        if dout is None and dlse is None:
            return None, None, None, None, None, None
        q, k, v, out, lse, _, n, *_ = saved = ctx.saved_tensors
        if torch.is_grad_enabled() or call.watched(q, dout, dlse) or len(saved) > 7 or not call.has_run:
            ctx.rest = call.n_is_logit, call.log_n, call.backend, 6
            return _gradients(ctx, saved, dout, dlse, call)
        if dout is None:
            dout = torch.zeros_like(out)
        needs_n = n is not None and ctx.needs_input_grad[3]
        dq, dk, dv, dn = call.backward(dout, dlse, Saved(q, k, v, out, lse), n, needs_n, ctx.options)
        return dq, dk, dv, dn if needs_n else None, None, None


class _Operator(torch.autograd.Function):
    """The operator, with its own arguments: for functorch, whose kind of a function costs an eager call 25 us."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _operator(arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, len(inputs), inputs[:8], _options_of(inputs), *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Any) -> Any:
        return _gradients(ctx, ctx.saved_tensors, dout, dlse)


def _save(
    ctx: Any, inputs: int, arguments: Sequence[Any], options: Options, out: Tensor, lse: Tensor,
    rng_state: Tensor | None,
) -> None:  # fmt: skip
    q, k, v, n, n_is_logit, log_n, numbers, backend = arguments
    checksum = _backend_checksum(backend) if options.dropout_p else None
    tensors = options.mask, options.alibi_slopes, options.cu_seqlens_q, options.cu_seqlens_k, numbers, checksum
    # Operators cannot return None: without dropout rng_state is an empty tensor there, and None in the plain function.
    saved = q, k, v, out, lse, rng_state if options.dropout_p else None, n
    if all(x is None for x in tensors):
        ctx.save_for_backward(*saved)
        ctx.options = options
    else:
        ctx.save_for_backward(*saved, *tensors)
        ctx.options = options.replaced(mask=None, alibi_slopes=None, cu_seqlens_q=None, cu_seqlens_k=None)
    ctx.rest = n_is_logit, log_n, backend, inputs
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, saved: Sequence[Any], dout: Tensor | None, dlse: Tensor | None, call: PreparedCall | None = None
) -> tuple[Tensor | None, ...]:
    n_is_logit, log_n, backend, inputs = ctx.rest
    if dout is None and dlse is None:
        return _only_needed((), (), inputs)
    q, k, v, out, lse, rng_state, n, *tensors = saved
    options, numbers = ctx.options, None
    if tensors:
        mask, slopes, starts_q, starts_k, numbers, checksum = tensors
        options = options.replaced(mask=mask, alibi_slopes=slopes, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
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
        raise _no_second_derivative(backend)
    found: Sequence[Tensor | None]
    needed: tuple[bool, ...] = ctx.needs_input_grad
    batched = _is_batched(dout) or _is_batched(dlse)
    if backend == ANY_BACKEND and not (batched or needs_dispatcher(q)):
        chosen = _chosen(backend, q, k, v, n, options)
        if chosen.differentiates:
            if numbers is not None:
                log_n, options = _numbers(numbers, log_n, options)
            found = _by_autograd(chosen, dout, dlse, q, k, v, n, n_is_logit, log_n, options)
            return _only_needed(found, needed, inputs)
    if call is not None and call.has_run and not (batched or torch.is_grad_enabled() or needs_dispatcher(q)):
        if dout is None:
            dout = torch.zeros_like(out)
        with autocast.suspended(q.device.type):
            of_forward = Saved(q, k, v, out, lse, None, rng_state)
            found = call.backward(dout, dlse, of_forward, n, needed[3], options)
        return _only_needed(found, needed, inputs)
    arguments = (
        torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, out, lse, rng_state, n, n_is_logit,
        log_n is None and _rows_may_be_empty(q, k, options), needed[3], numbers, backend,
    )  # fmt: skip
    with autocast.suspended(q.device.type):
        if torch.is_grad_enabled():
            found = _Backward.apply(*arguments, *options)  # type: ignore[no-untyped-call]
        elif batched or needs_dispatcher(q):
            flops.register()
            found = torch.ops.attn_n.backward(*arguments, *options)
        else:
            found = _backward(options, *arguments)
    return _only_needed(found, needed, inputs)


def _is_batched(x: Tensor | None) -> bool:
    """By torch.autograd.grad(is_grads_batched=True)."""
    return x is not None and _functorch.is_legacy_batchedtensor(x)


def _only_needed(found: Sequence[Tensor | None], needed: Sequence[bool], inputs: int) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs, of which the first four, q, k, v and n, have one."""
    wanted = [x if of_x else None for x, of_x in zip(found, needed, strict=False)]
    return *wanted, *[None] * (inputs - len(wanted))


def _by_autograd(
    chosen: Backend, dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None,
    n_is_logit: bool, log_n: float | None, options: Options,
) -> list[Tensor | None]:  # fmt: skip
    """dq, dk, dv and dn by a backend without a backward of its own, of an exported program whose forward it ran."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    of_n: float | Tensor | None = log_n if n is None else n.detach().requires_grad_()
    with torch.enable_grad(), autocast.suspended(q.device.type):
        results = chosen.attend(q, k, v, of_n, n_is_logit or n is None, options, True)
    given = [(x, dx) for x, dx in zip(results, (dout, dlse), strict=True) if x is not None and dx is not None]
    leaves = [q, k, v, *([of_n] if isinstance(of_n, Tensor) else [])]
    found = torch.autograd.grad([x for x, _ in given], leaves, [dx for _, dx in given], allow_unused=True)
    return [*found, *[None] * (4 - len(found))]


class _Backward(torch.autograd.Function):
    """The backward of a call under create_graph=True: it can be computed, but not differentiated once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.attn_n.backward(*arguments)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.backend = inputs[13]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _no_second_derivative(ctx.backend)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_second_derivative(ctx.backend)


def _no_second_derivative(backend: str) -> UnsupportedError:
    return UnsupportedError(
        f"backend {backend!r} has no double backward: its gradients cannot be differentiated again.\n"
        "To do: use backend='reference', which is differentiable any number of times."
    )


def _backend_checksum(backend: str) -> Tensor:
    """Identifies the backend of a forward with dropout: a checkpoint recomputes saved tensors, and no other state."""
    return torch.tensor(zlib.crc32(backend.encode()), device="cpu")


def _log_per_head(q: Tensor, n: Tensor, n_is_logit: bool) -> Tensor:
    """log n as `(Hq,)` in the dtype of the lse, with a stride of 1, or 0 for a scalar."""
    dtype = _lse_dtype(q)
    if n_is_logit and n.dtype is dtype and n.dim() == 1 and n.is_contiguous():
        return n.detach()
    n = n.detach()
    if not n_is_logit:  # a float64 n may be no number of float32, and its logarithm is one
        n = n.to(torch.promote_types(n.dtype, dtype)).log()
    return n.to(dtype).contiguous().expand(q.shape[1])


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _rows_may_be_empty(q: Tensor, k: Tensor, options: Options) -> bool:
    if options.mask is not None or options.cu_seqlens_q is not None:
        return True
    right = options.window_right
    bounded = options.window_left is not None or right is not None
    return k.shape[-2] == 0 or (right is not None and right < 0) or (bounded and q.shape[-2] > k.shape[-2])


def _forward(
    options: Options, lse_wanted: bool, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, n_is_logit: bool,
    log_n: float | None, numbers: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """out, lse (unless it is wanted maybe still without n), and the state of dropout."""
    if numbers is not None:
        log_n, options = _numbers(numbers, log_n, options)
    packed = options.cu_seqlens_q is not None
    log_of_n = log_n if n is None else _log_per_head(q, n, n_is_logit)
    if q.numel() == 0 or k.numel() == 0:
        out, lse = _nothing_to_see(q, v)
        return out, lse if log_of_n is None else rescale.add_to_lse(lse, log_of_n, packed), None
    chosen = _chosen(backend, q, k, v, n, options)
    if chosen.differentiates:
        with torch.no_grad():
            out, attended_lse = chosen.attend(q, k, v, log_of_n, True, options, True)
        assert attended_lse is not None
        return out, attended_lse, None
    if log_of_n is None or chosen.applies_n:
        return chosen.forward(q, k, v, log_of_n, options)
    out, lse, rng_state = chosen.forward(q, k, v, None, options)
    return out, rescale.add_sink_(out, lse, log_of_n, packed, lse_wanted), rng_state


def _backward(
    options: Options, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rng_state: Tensor | None, n: Tensor | None, n_is_logit: bool, rows_may_be_empty: bool, needs_n_grad: bool,
    numbers: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if numbers is not None:
        _, options = _numbers(numbers, None, options)
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv, dn = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), lse.new_empty(0)
        if needs_n_grad:
            log_n = _log_per_head(q, n, True) if n is not None and n_is_logit else None
            dn = rescale.gradient_of_n(dout, dlse, out, lse, log_n, options.varlen)
        return dq, dk, dv, _shaped_as(dn, n)
    chosen = _chosen(backend, q, k, v, n, options)
    if chosen.differentiates:
        raise UnsupportedError(
            f"an exported program that was compiled cannot be differentiated by {chosen.name}, which is chosen here.\n"
            "To do: name a backend that has a backward, by use_backend or ATTN_N_BACKEND."
        )
    saved = Saved(q, k, v, out, lse, None, rng_state)
    dq, dk, dv, dn_found = _backward_by(
        chosen, dout, dlse, saved, n, n_is_logit, rows_may_be_empty, needs_n_grad, options
    )
    return dq, dk, dv, lse.new_empty(0) if dn_found is None else dn_found


def _backward_by(
    passes: Prepared, dout: Tensor, dlse: Tensor | None, saved: Saved, n: Tensor | None, n_is_logit: bool,
    rows_may_be_empty: bool, needs_n_grad: bool, options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    # The gradient of a complex loss may have its sign in a flag, which kernels do not see.
    if dout.is_neg() or (dlse is not None and dlse.is_neg()):
        dout, dlse = dout.resolve_neg(), None if dlse is None else dlse.resolve_neg()
    q, k, v, out, lse, _, rng_state = saved
    log_n = _log_per_head(q, n, True) if n is not None and n_is_logit and needs_n_grad else None
    if rows_may_be_empty:
        lse, dlse = rescale.lse_for_backward(lse, dlse)
    of_n: Any = None if not needs_n_grad else "n" if log_n is None else "log n"
    found = passes.backward(Grads(dout, dlse, of_n), Saved(q, k, v, out, lse, log_n, rng_state), options)
    dn = found.dn
    if needs_n_grad:
        if dn is None:
            dn = rescale.gradient_of_n(dout, dlse, out, lse, log_n, options.varlen)
        dn = _shaped_as(dn, n)
    heads_kv = k.shape[1]
    return found.dq, _sum_groups(found.dk, heads_kv), _sum_groups(found.dv, heads_kv), dn


def _chosen(name: str, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, options: Options) -> Backend:
    """The backend of that name, or that of the automatic order here and now (an exported program runs anywhere)."""
    if name != ANY_BACKEND:
        return registry.loaded(name)
    needs_grad = any(x is not None and x.requires_grad for x in (q, k, v, n))
    # What one of the two passes does not know is left out: whether a number n is 0, and whether lse has a gradient.
    n_kind = "float" if n is None else "per head"
    call = describe(q, k, v, options, n_kind=n_kind, return_lse=needs_grad, needs_grad=needs_grad)
    return _choose(call)


def _numbers(numbers: Tensor, log_n: float | None, options: Options) -> tuple[float | None, Options]:
    log_of_n, scale = numbers.tolist()
    return None if log_n is None else log_of_n, options.replaced(scale=scale)


def _shaped_as(dn: Tensor, n: Tensor | None) -> Tensor:
    """The gradient of n per head as that of a scalar, if n is one."""
    return dn.sum() if n is not None and n.dim() == 0 and dn.numel() else dn


def _nothing_to_see(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention without queries or without keys."""
    lse = torch.full(q.shape[:-1], -math.inf, dtype=_lse_dtype(q), device=q.device)
    return q.new_zeros((*q.shape[:-1], v.shape[-1])), lse


def _sum_groups(dx: Tensor, heads_kv: int) -> Tensor:
    """The gradient of k or v per key head, where the backend returned it per query head."""
    if dx.shape[1] == heads_kv:
        return dx
    return dx.view(dx.shape[0], heads_kv, -1, *dx.shape[2:]).sum(2)


def _in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x with the strides that the fake promised to torch.compile; a copy where the backend returned others."""
    return x if lies_in_order(x, order) else empty_in_order(x, x.shape, order).copy_(x)


def _promises(backend: str) -> Backend:
    """The backend whose orders of dimensions the results have; of an open choice the default ones."""
    return Backend() if backend == ANY_BACKEND else registry.loaded(backend)


def _forward_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, backend, options = arguments[0], arguments[7], _options_of(arguments)
    out, lse, rng_state = _forward(options, True, *arguments[:8])
    if rng_state is None:
        rng_state = torch.empty(2 if options.dropout_p else 0, dtype=torch.int64, device=q.device)
    promised = _promises(backend)
    return _in_order(out, promised.out_dim_order(q)), _in_order(lse, promised.lse_dim_order(q)), rng_state


def _backward_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, backend = *arguments[2:5], arguments[13]
    dq, dk, dv, dn = _backward(Options(*arguments[14:]), *arguments[:14])
    order = _promises(backend).gradient_dim_order
    return _in_order(dq, order(q)), _in_order(dk, order(k)), _in_order(dv, order(v)), dn


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, v, promised, options = arguments[0], arguments[2], _promises(arguments[7]), _options_of(arguments)
    out = empty_in_order(q, (*q.shape[:-1], v.shape[-1]), promised.out_dim_order(q))
    lse = empty_in_order(q, q.shape[:-1], promised.lse_dim_order(q)).to(_lse_dtype(q))
    return out, lse, q.new_empty(2 if options.dropout_p else 0, dtype=torch.int64)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, lse, n, needs_n_grad, promised = (
        *arguments[2:5], arguments[6], arguments[8], arguments[11], _promises(arguments[13]),
    )  # fmt: skip
    dq, dk, dv = (empty_in_order(x, x.shape, promised.gradient_dim_order(x)) for x in (q, k, v))
    return dq, dk, dv, lse.new_empty(n.shape if needs_n_grad else 0)


for _name in (_PURE, _RANDOM):
    _library.impl(_name, _forward_operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attn_n::{_name}", _fake_forward, lib=_library)
    torch.library.register_autograd(
        f"attn_n::{_name}", _Operator.backward, setup_context=_Operator.setup_context, lib=_library
    )
    torch.library.register_vmap(f"attn_n::{_name}", batching.rule(getattr(torch.ops.attn_n, _name)), lib=_library)
_library.impl("backward", _backward_operator, "CompositeExplicitAutograd")
torch.library.register_fake("attn_n::backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "attn_n::backward", _Backward.backward, setup_context=_Backward.setup_context, lib=_library
)
torch.library.register_vmap("attn_n::backward", batching.rule(torch.ops.attn_n.backward), lib=_library)
