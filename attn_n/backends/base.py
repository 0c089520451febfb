"""What a backend is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from attn_n.call import AttentionCall, Options
from attn_n.sink import rescale


class Backend:
    """One implementation of attention; subclass it and hand an instance to `attn_n.register_backend`.

    A backend honours every field of the call, or says in `why_not` that it does not serve it.

    Attributes:
        name: what `backend=` and `ATTN_N_BACKEND` call it.
        summary: one line on what it is.
        applies_n: forward returns `out` and `lse` with n inside. Otherwise it gets no n and returns plain softmax
            attention, and `attn_n.sink.rescale` applies n for it.
        differentiates: the backend implements `attend` out of differentiable torch operations, in place of the pair
            `forward` and `backward`.
    """

    name: str
    summary: str = ""
    applies_n: bool = False
    differentiates: bool = False

    def why_not(self, call: AttentionCall) -> str | None:
        """The reason why this backend cannot serve `call` here, with the remedy if there is one; None if it can.

        Pure and cheap: it sees metadata alone, and every call that chooses this backend pays for it.
        """
        raise NotImplementedError

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attention of q `(B, Hq, L, E)`, k `(B, Hkv, S, E)` and v `(B, Hkv, S, Ev)`, or of packed `(T, H, E)`.

        No dimension is empty. `log_n` is None for n = 0, a number, or `(Hq,)`; only a backend that `applies_n`
        is given anything but None.

        Returns:
            `out` `(B, Hq, L, Ev)`; `lse` `(B, Hq, L)`, natural logarithm, float32 (float64 for float64 inputs),
            -inf for a row without visible keys; and the `(2,)` int64 state of the dropout generator, or None.
        """
        raise NotImplementedError

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rng_state: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients dq, dk, dv, given the output and the lse with n inside.

        With `P = exp(S - lse)` and `delta = rowsum(dout * out) - dlse`: `dS = P * (dout V^T - delta)`. n appears
        nowhere else, so that the backward of plain attention is the backward of softmax_n. `lse` is +inf for rows
        without visible keys, which makes their P zero. dk and dv may have Hq heads: the caller sums each group.
        """
        raise NotImplementedError

    def backward_with_n(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rng_state: Tensor | None,
        log_n: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, and the `(Hq,)` gradient of `log_n` `(Hq,)`, or without that the gradient of n itself."""
        dn = rescale.gradient_of_n(dout, dlse, out, lse, log_n, options.cu_seqlens_q is not None)
        return *self.backward(dout, dlse, q, k, v, out, lse, rng_state, options), dn

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        n: float | Tensor | None,
        n_is_logit: bool,
        options: Options,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The same by differentiable torch operations; `n` is n itself, or `log n` if `n_is_logit`."""
        raise NotImplementedError

    def out_order(self, q: Tensor) -> tuple[int, ...]:
        """The dimensions of `out` from the outermost to the innermost in memory: by default those of q."""
        return memory_order(q)

    def lse_order(self, q: Tensor) -> tuple[int, ...]:
        """The same for `lse`: by default contiguous."""
        return tuple(range(q.dim() - 1))

    def gradient_order(self, x: Tensor) -> tuple[int, ...]:
        """The same for the gradient of x, one of q, k and v."""
        return memory_order(x)


class Family(Backend):
    """A backend of several kernels, each a backend of its own that can be forced by the name `"family:member"`.

    It serves a call if a member does, and the first one in `order` that serves it runs.
    """

    members: Mapping[str, Backend]

    def order(self, call: AttentionCall) -> Sequence[str]:
        """The members to try for `call`, the fastest first; those that are for other devices left out."""
        return tuple(self.members)

    def by_name(self, call: AttentionCall) -> Mapping[str, str]:
        """The members for the device of `call` that run only when asked for by their full name, and why."""
        return {}

    def serving(self, call: AttentionCall) -> str | None:
        """The member that serves `call`."""
        for name in self.order(call):
            if self.members[name].why_not(call) is None:
                return name
        return None

    def why_not(self, call: AttentionCall) -> str | None:
        reasons = []
        for name in self.order(call):
            reason = self.members[name].why_not(call)
            if reason is None:
                return None
            reasons.append(f"{name}: {reason}")
        return "; ".join(reasons) or f"has no kernel for device {call.device}"


def memory_order(x: Tensor) -> tuple[int, ...]:
    """The dimensions of x by decreasing stride; the last dimension always comes last."""
    return (*sorted(range(x.dim() - 1), key=x.stride, reverse=True), x.dim() - 1)


def empty_in_order(like: Tensor, shape: Sequence[int], order: tuple[int, ...]) -> Tensor:
    """An uninitialised dense tensor of `shape` whose dimensions lie in memory in `order`."""
    if order == tuple(range(len(order))):
        return like.new_empty(shape)
    inverse = sorted(range(len(order)), key=lambda place: order[place])
    return like.new_empty([shape[dim] for dim in order]).permute(inverse)


def gradients_like(*tensors: Tensor) -> list[Tensor]:
    """Uninitialised dense tensors that lie in memory as their inputs do, but with the last dimension innermost."""
    return [empty_in_order(x, x.shape, memory_order(x)) for x in tensors]


def lies_in_order(x: Tensor, order: tuple[int, ...]) -> bool:
    """Whether x is dense with its dimensions in memory in `order` (dimensions of size 1 lie anywhere)."""
    expected = 1
    for dim in reversed(order):
        if x.shape[dim] != 1:
            if x.stride(dim) != expected:
                return False
            expected *= x.shape[dim]
    return True
