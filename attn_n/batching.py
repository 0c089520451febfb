"""torch.vmap of the operators: what to do with one more dimension of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_n.call import Options

Results = tuple[Tensor, ...]


def rule(
    operator: Callable[..., Results], by_batch: int, options_at: int
) -> Callable[..., tuple[Results, tuple[int, ...]]]:
    """The rule for `torch.library.register_vmap` of an operator whose first `by_batch` arguments have a batch.

    The new dimension joins the batch where these alone have it. Otherwise (n or a mask has it, the gradient of n is
    wanted, sequences are packed) the operator runs once for each slice.
    """

    def batched(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Results, tuple[int, ...]]:
        options = Options(*arguments[options_at : options_at + len(Options._fields)])
        if options.dropout_p and info.randomness != "different":
            raise RuntimeError(
                f"dropout_p: under torch.vmap expected randomness='different', got randomness={info.randomness!r}"
            )
        shared = options.alibi_slopes is None and (options.mask is None or options.mask.shape[0] == 1)
        of_n = by_batch == 7 and arguments[11]  # needs_n_grad of the backward
        joins = shared and not (of_n or options.dropout_p or options.cu_seqlens_q is not None)
        if joins and all(dim is None for dim in in_dims[by_batch:]):
            results = _joined(operator, by_batch, info.batch_size, in_dims, arguments)
        else:
            slices = (
                operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
                for i in range(info.batch_size)
            )
            results = tuple(torch.stack(one) for one in zip(*slices, strict=True))
        return results, (0,) * len(results)

    return batched


def _joined(
    operator: Callable[..., Results], by_batch: int, count: int, in_dims: tuple[int | None, ...], arguments: Any
) -> Results:
    tensors, batch = [], 0
    for x, dim in zip(arguments[:by_batch], in_dims, strict=False):
        if x is not None:
            x = x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
            batch, x = x.shape[1], x.flatten(0, 1)
        tensors.append(x)
    results = operator(*tensors, *arguments[by_batch:])
    # The state of dropout and the gradient of n are empty here.
    return tuple(x.unflatten(0, (count, batch)) if x.dim() > 1 else x.expand(count, -1) for x in results)
