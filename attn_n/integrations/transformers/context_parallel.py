"""Models within PyTorch's context_parallel, which accelerate uses: ring attention over its ranks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_n.call.errors import UnsupportedError
from attn_n.integrations.transformers.pattern import MaskPattern

# context_parallel puts a function of its own there, which has the ranks in its closure. It has no other trace.
_PLAIN = F.scaled_dot_product_attention
_MODULE = "torch.distributed.tensor.experimental"


def entered() -> bool:
    """Return whether the tokens are those of one rank of a `context_parallel`."""
    current = F.scaled_dot_product_attention
    return current is not _PLAIN and str(getattr(current, "__module__", "")).startswith(_MODULE)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    position_ids: Tensor | None,
    causal: bool,
    window: Any,
    common: dict[str, Any],
) -> Tensor:
    """Return attention `(N, L_r, Hq, Ev)` of this rank's queries `(N, Hq, L_r, E)` to the keys of all ranks.

    The mask, if there is one, is that of our mask function for the L_r tokens. Only what does not depend on their
    number is taken from it.
    """
    from attn_n.distributed import ring_attention_n, shard

    mesh = inspect.getclosurevars(F.scaled_dot_product_attention).nonlocals.get("device_mesh")
    if mesh is None:
        raise _unsupported("this version of PyTorch does not say which ranks it has")
    if mask is not None:
        rule = mask.rule if isinstance(mask, MaskPattern) else None
        lengths = mask.visible[2:-1] if isinstance(mask, MaskPattern) and mask.visible is not None else (mask,)
        if rule is None or rule.chunk is not None or rule.sequences is not None or any(x is not None for x in lengths):
            raise _unsupported("of masks it has causal ones and windows, without padding and packed sequences")
        causal, window = rule.causal, rule.window
    if query.shape[2] != key.shape[2]:
        raise _unsupported(f"{query.shape[2]} queries and {key.shape[2]} keys, as with a cache")
    if query.shape[2] % 2:  # PyTorch orders the tokens otherwise then
        raise _unsupported(f"a length of {query.shape[2] * mesh.size()}, which {2 * mesh.size()} does not divide")
    if position_ids is not None and position_ids.dim() == 2:
        expected = shard(torch.arange(query.shape[2] * mesh.size(), device=query.device), 0, mesh)
        torch._assert_async(
            (position_ids == expected).all(),
            "position_ids: attn_n expected those of one sequence, of the tokens of this rank; put them among the"
            " buffers of context_parallel. Packed sequences have no place in it",
        )
    out: Any = ring_attention_n(query, key, value, causal, window=window, group=mesh, **common)
    attended: Tensor = out.transpose(1, 2)
    return attended


def _unsupported(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"context_parallel: {reason}.\n"
        "To do: pass attention_mask=None and is_causal=True to the layers, as accelerate does, or call"
        " attn_n.distributed.ring_attention_n in a model of your own."
    )
