"""The torch.vmap rule of the operators, which handles one more dimension of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_n.call import Options

Results = tuple[Tensor, ...]


BY_BATCH = {"q", "k", "v", "dout", "dlse", "out", "lse"}


def rule(operator: Callable[..., Results]) -> Callable[..., tuple[Results, tuple[int, ...]]]:
    """Return the rule for `torch.library.register_vmap` of an operator.

    If only tensors with a batch dimension have the new one, that joins the batch. Otherwise (n or a mask has it, the
    gradient of n is wanted, sequences are varlen) the operator runs once for each slice.
    """
    names = [argument.name for argument in operator.default._schema.arguments]  # type: ignore[attr-defined]

    def batched(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Results, tuple[int, ...]]:
        named = dict(zip(names, arguments, strict=True))
        options = Options(*(named[name] for name in Options._fields))
        if options.dropout_p and info.randomness != "different":
            raise RuntimeError(
                f"dropout_p: under torch.vmap expected randomness='different', got randomness={info.randomness!r}"
            )
        # A mask may be one for all of a batch; of other tensors each batch, or sequence, has its own part.
        shared = all(x is None or (x is options.mask and x.shape[0] == 1) for x in options.tensors)
        n = named["n"]
        shared = shared and (n is None or n.dim() < 2 or n.shape[0] == 1)
        wanted = any(named.get(f"needs_{x}_grad", False) for x in ("n", "mask", "slopes"))
        joins = shared and not (wanted or options.dropout_p)
        if joins and all(dim is None or name in BY_BATCH for name, dim in zip(names, in_dims, strict=True)):
            results = _joined(operator, info.batch_size, names, in_dims, arguments)
        else:
            slices = (
                operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
                for i in range(info.batch_size)
            )
            results = tuple(torch.stack(one) for one in zip(*slices, strict=True))
        return results, (0,) * len(results)

    return batched


def _joined(
    operator: Callable[..., Results], count: int, names: list[str], in_dims: tuple[int | None, ...], arguments: Any
) -> Results:
    joined, batch = list(arguments), 0
    for i, (name, dim, x) in enumerate(zip(names, in_dims, arguments, strict=True)):
        if name in BY_BATCH and x is not None:
            x = x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
            batch, joined[i] = x.shape[1], x.flatten(0, 1)
    # The state of dropout and the gradient of n are empty here.
    return tuple(x.unflatten(0, (count, batch)) if x.dim() > 1 else x.expand(count, -1) for x in operator(*joined))
