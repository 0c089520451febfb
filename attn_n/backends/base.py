"""The base class of backends, of families of them, and the memory layouts that they promise."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from attn_n.call import FEATURES, AttentionCall, Gradients, Grads, Options, Saved

HALF = (torch.float16, torch.bfloat16)
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}


class Prepared(Protocol):
    """The two passes of a backend for one kind of call; `Backend` documents them."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients: ...


class Backend:
    """One implementation of attention; subclass it and hand an instance to `attn_n.register_backend`.

    The attributes declare what it serves. A call that asks for more is refused before `why_not` is asked, so that a
    backend cannot ignore an argument that it does not know.

    Attributes:
        name: the name in `backend=` and `ATTN_N_BACKEND`.
        summary: one line about the backend.
        honours: the arguments that it takes beyond plain attention, by their names in `attn_n.FEATURES`.
        devices: the device types that it runs on; None is any.
        dtypes: the dtypes of q, k and v that it takes; None is any.
        capability: the least compute capability of a CUDA device; None is any.
        rocm: it has been tested on ROCm, whose devices are of the type "cuda" too.
        compares_lengths: `why_not` asks of lengths only how they compare with each other and with the sides of a
            window, and of strides what `dispatch.similar` holds, so that a choice serves calls of other lengths too.
        applies_n: forward returns `out` and `lse` with n inside. Otherwise forward gets no n and returns plain softmax
            attention, to which `attn_n.sink` applies n.
        differentiates: the backend implements `attend` by differentiable torch operations, in place of `forward` and
            `backward`.
    """

    name: str
    summary: str = ""
    honours: Collection[str] = ()
    devices: Sequence[str] | None = None
    dtypes: Sequence[torch.dtype] | None = None
    capability: tuple[int, int] | None = None
    rocm: bool = True
    compares_lengths: bool = False
    applies_n: bool = False
    differentiates: bool = False

    def refusal(self, call: AttentionCall) -> str | None:
        """Return the reason why it does not serve `call`, with the remedy if there is one; None if it does."""
        if self.devices is not None and call.device not in self.devices:
            return f"runs on {' and '.join(_DEVICES[device] for device in self.devices)}, not on {call.device}"
        if call.device == "cuda":
            if torch.version.hip is not None:
                if not self.rocm:
                    return "has not been tested on ROCm"
            elif self.capability is not None and (call.capability or (0, 0)) < self.capability:
                return f"needs compute capability {_dotted(self.capability)} or later, got {_dotted(call.capability)}"
        if self.dtypes is not None and call.dtype not in self.dtypes:
            taken = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
            names = " and ".join([", ".join(taken[:-1]), taken[-1]] if len(taken) > 1 else taken)
            return f"takes {names}, not {str(call.dtype).removeprefix('torch.')}"
        asked = call.features
        if not (self.applies_n or self.differentiates):
            asked = asked - {"n a row"}  # PyTorch 2.11's compiler cannot trace `-=` of a frozenset
        if not asked.issubset(self.honours):
            missing = [words for feature, words in FEATURES.items() if feature in asked and feature not in self.honours]
            return f"has no {', no '.join(missing)}"
        if call.needs_grad and self._is_forward_only():
            return "has no backward"
        return self.why_not(call)

    def _is_forward_only(self) -> bool:
        kind = type(self)
        return kind.backward is Backend.backward and kind.prepare is Backend.prepare and not self.differentiates

    def why_not(self, call: AttentionCall) -> str | None:
        """Return the reason why it does not serve a call that its attributes allow; None if it does.

        It is pure and cheap, and sees metadata alone.
        """
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute attention of q `(B, Hq, L, E)`, k `(B, Hkv, S, E)` and v `(B, Hkv, S, Ev)`, or of varlen `(T, H, E)`.

        No dimension is empty. `log_n` is None for n = 0, a number, or `(Hq,)`, in the dtype of lse; of
        one that honours "n a row" also dense and of the shape of lse. Only a backend that `applies_n` is given anything
        but None.

        Returns:
            `out` `(B, Hq, L, Ev)`; `lse` `(B, Hq, L)`, natural logarithm, float32 (float64 for float64 inputs),
            -inf for a row without visible keys; and the `(2,)` int64 state of the dropout generator, or None.
        """
        raise NotImplementedError

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, log_n: float | Tensor | None, options: Options) -> Prepared:
        """Return an object that runs this call, and every other one that differs in the contents of tensors alone.

        A backend that has to find a variant, a grid, strides or sizes before it runs keeps them in this object. By
        default the backend itself is returned.
        """
        return self

    def backward(self, grads: Grads, saved: Saved, options: Options) -> Gradients:
        """Compute the gradients of q, k and v, given the output and the lse with n inside.

        With `P = exp(S - lse)` and `delta = rowsum(dout * out) - dlse`: `dS = P * (dout V^T - delta)`. n appears
        nowhere else, so that the backward of plain attention is the backward of softmax_n.
        """
        raise NotImplementedError

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
        """Compute attention by differentiable torch operations; `n` is n itself, or `log n` if `n_is_logit`."""
        raise NotImplementedError

    def out_dim_order(self, q: Tensor) -> tuple[int, ...]:
        """Return the dimensions of `out` from the outermost to the innermost in memory: by default those of q."""
        return memory_order(q)

    def lse_dim_order(self, q: Tensor) -> tuple[int, ...]:
        """Return the dimension order of `lse` in memory: by default it is contiguous."""
        return tuple(range(q.dim() - 1))

    def gradient_dim_order(self, x: Tensor) -> tuple[int, ...]:
        """Return the dimension order of the gradient of x, which is q, k or v: by default that of x."""
        return memory_order(x)


class Family(Backend):
    """A backend of several kernels, each a backend itself, which can be forced by the name `"family:member"`.

    It serves a call if a member in `priority` does; the first of those runs.
    """

    members: Mapping[str, Backend]

    def priority(self, call: AttentionCall) -> Sequence[str]:
        """Return the members to try for `call`, the fastest first, without those for other devices."""
        return tuple(self.members)

    def by_name(self, call: AttentionCall) -> Mapping[str, str]:
        """Return the members for the device of `call` that run only if named in full, each with the reason."""
        return {}

    def serving(self, call: AttentionCall) -> str | None:
        """Return the first member that serves `call`."""
        for name in self.priority(call):
            if self.members[name].refusal(call) is None:
                return name
        return None

    def refusal(self, call: AttentionCall) -> str | None:
        reasons = []
        for name in self.priority(call):
            reason = self.members[name].refusal(call)
            if reason is None:
                return None
            reasons.append(f"{name}: {reason}")
        return "; ".join(reasons) or f"has no kernel for device {call.device}"


def aligned(*tensors: Tensor) -> bool:
    """Return True if all tensors begin at multiples of 16 bytes."""
    for x in tensors:  # noqa: SIM110  (a generator takes three times as long)
        if x.data_ptr() & 15:
            return False
    return True


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of x by decreasing stride; the last dimension always comes last."""
    return (*sorted(range(x.dim() - 1), key=x.stride, reverse=True), x.dim() - 1)


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense tensor whose dimensions lie in memory in `order`."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def empty_in_order(like: Tensor, shape: Sequence[int], order: tuple[int, ...]) -> Tensor:
    """Return an uninitialised dense tensor of `shape` whose dimensions lie in memory in `order`."""
    if order == tuple(range(len(order))):
        return like.new_empty(shape)
    inverse = sorted(range(len(order)), key=lambda place: order[place])
    return like.new_empty([shape[dim] for dim in order]).permute(inverse)


def gradients_like(*tensors: Tensor) -> list[Tensor]:
    """Return uninitialised dense tensors with the dimension order of their inputs, but the last dimension innermost."""
    return [empty_in_order(x, x.shape, memory_order(x)) for x in tensors]


def lies_in_order(x: Tensor, order: tuple[int, ...]) -> bool:
    """Return True if x is dense with its dimensions in memory in `order` (dimensions of size 1 may lie anywhere)."""
    expected = 1
    for dim in reversed(order):
        if x.shape[dim] != 1:
            if x.stride(dim) != expected:
                return False
            expected *= x.shape[dim]
    return True


def _dotted(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else ".".join(map(str, capability))
