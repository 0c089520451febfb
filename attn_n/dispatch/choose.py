"""The choice of the backend that serves a call."""

from __future__ import annotations

from attn_n.autograd import passes
from attn_n.backends.base import Backend
from attn_n.call import AttentionCall
from attn_n.call.errors import UnsupportedError
from attn_n.dispatch.explanation import refusal
from attn_n.dispatch.forced import forced
from attn_n.dispatch.serving import automatic, first


def choose(call: AttentionCall, backend: str | None) -> tuple[str, Backend]:
    """Return the backend that serves `call`: the forced one, else the first of the automatic order.

    Raises:
        ValueError: an unknown name.
        UnsupportedError: the forced backend does not serve the call, or no backend does.
    """
    served = chosen(call, backend)
    if served is None:
        raise UnsupportedError(refusal(call, *forced(backend)))
    return served


def chosen(call: AttentionCall, backend: str | None) -> tuple[str, Backend] | None:
    """Do as `choose`, but return None where no backend serves the call."""
    name, asked_by = forced(backend)
    try:
        return first(call, automatic(call) if name is None else (name,))
    except ValueError as error:
        raise ValueError(f"{asked_by}: {str(error).removeprefix('backend: ')}") from None


passes.choose_by(lambda call: choose(call, None)[1])
