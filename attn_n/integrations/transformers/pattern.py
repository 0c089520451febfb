"""Which keys each query sees, as lengths and windows: a mask that takes no memory until someone reads it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

logger = logging.getLogger(__name__)

Window = tuple[int | None, int | None]


class Rule(NamedTuple):
    """The keys that a mask function of transformers lets a query see, but for padding."""

    causal: bool = False
    window: Window = (None, None)
    chunk: int | None = None  # keys of the same chunk of this many tokens are seen
    chunks_begin: Tensor | None = None  # (N,): the token at which a row's chunks begin
    sequences: Tensor | None = None  # (N, L): tokens with the same number are one packed sequence


class Visible(NamedTuple):
    """The arguments of `flash_attention_n`, or of `flash_attention_n_varlen` if there is `cu_seqlens`."""

    causal: bool = False
    window: Window = (None, None)
    keys: int | None = None  # no key from this one on is seen
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    key_mask: Tensor | None = None  # (N, 1, 1, S) bool: keys with holes between them
    cu_seqlens: Tensor | None = None  # of the rows behind each other: N L tokens
    max_seqlen: int = 0


class MaskPattern(Tensor):
    """A mask `(N, 1, L, S)` of bools that is one byte in memory, or one for each key.

    Models pass it on, and our attention function reads `visible`. Whoever computes with it gets the dense mask.
    """

    rule: Rule | None
    visible: Visible | None
    packed: tuple[Tensor, Visible | None] | None  # position_ids, and what they say
    build: Callable[[], Tensor]

    @staticmethod
    def of(
        shape: Sequence[int],
        device: torch.device | str,
        rule: Rule | None,
        visible: Visible | None,
        build: Callable[[], Tensor],
    ) -> MaskPattern:
        # For one query it has its memory: torch.compile's guards do not take an input that is expanded.
        size = shape if shape[2] == 1 else ()
        pattern = torch.zeros(size, dtype=torch.bool, device=device).expand(*shape).as_subclass(MaskPattern)
        pattern.rule, pattern.visible, pattern.packed, pattern.build = rule, visible, None, build
        return pattern

    def dense(self) -> Tensor:
        """Return the mask `(N, 1, L, S)`, in which True is a key that is seen."""
        return self.build()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _KEPT:
            return args[0]
        if func is Tensor.to and isinstance(args[0], MaskPattern):
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if dtype in (None, torch.bool):
                return args[0] if device is None else _moved(args[0], device)
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, MaskPattern) else x, (args, kwargs))
        return func(*args, **kwargs)


def _moved(pattern: MaskPattern, device: torch.device) -> MaskPattern:
    def move(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    rule, visible, build = pattern.rule, pattern.visible, pattern.build
    return MaskPattern.of(
        pattern.shape,
        device,
        None if rule is None else Rule(*map(move, rule)),
        None if visible is None else Visible(*map(move, visible)),
        lambda: build().to(device),
    )


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


# What says nothing about which key is seen. The names are those of torch's own attributes and methods.
_METADATA = {
    *_getters("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf", "is_nested"),
    *_getters("is_meta", "is_sparse", "is_quantized", "grad_fn"),
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__),
}
_KEPT = {Tensor.detach, Tensor.contiguous}  # torch.utils.checkpoint detaches what it keeps
