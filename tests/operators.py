"""The operators as PyTorch's opcheck wants them called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_n.call import Options


def opcheck(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_n: Tensor,
    backend: str,
    options: Options,
    *,
    douts: tuple[Tensor, Tensor] | None = None,
    rows_may_be_empty: bool = True,
    compiled: bool = False,
) -> None:
    """Check both operators: their schemas are right, and fakes promise the shapes, strides and dtypes of the kernels.

    `douts` are the gradients of out and lse, random ones if None. `compiled` checks the forward under AOTAutograd, too.
    """
    forward, backward = torch.ops.attn_n.forward, torch.ops.attn_n.backward
    checks = ("test_schema", "test_faketensor", *(("test_aot_dispatch_dynamic",) if compiled else ()))
    arguments: tuple[Any, ...] = (q, k, v, log_n, True, None, None, backend, *options)
    torch.library.opcheck(forward.default, arguments, test_utils=checks)
    out, lse, state = forward(*arguments)
    dout, dlse = douts or (torch.randn_like(out), torch.randn_like(lse))
    arguments = (
        dout, dlse, q, k, v, out, lse, state, log_n, True, rows_may_be_empty, True, False, False, None, backend,
        *options,
    )  # fmt: skip
    torch.library.opcheck(backward.default, arguments, test_utils=checks[:2])
