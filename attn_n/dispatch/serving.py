"""Whether a backend serves a call."""

from __future__ import annotations

from attn_n.backends import registry
from attn_n.backends.base import Backend, Family
from attn_n.call import AttentionCall


def first(call: AttentionCall, candidates: tuple[str, ...]) -> tuple[str, Backend] | None:
    """The first of the candidates that serves `call`, and of a family its member."""
    for candidate in candidates:
        found, _ = registry.find(candidate)
        if found is None or _beyond(found, call) is not None:
            continue
        if isinstance(found, Family):
            member = found.serving(call)
            if member is not None:
                return f"{candidate}:{member}", found.members[member]
        elif found.refusal(call) is None:
            return candidate, found
    return None


def why_not(name: str, call: AttentionCall) -> str | None:
    """The reason why the backend called `name` does not serve `call`, or None if it does."""
    backend, import_error = registry.find(name)
    return import_error if backend is None else _beyond(backend, call) or backend.refusal(call)


def _beyond(backend: Backend, call: AttentionCall) -> str | None:
    """Why a backend with an explicit backward cannot serve the call under this transform; None if it can."""
    if call.transform is None or backend.differentiates:
        return None
    return f"{call.transform} is served by differentiable operations alone, as those of reference"
