"""The question whether a backend serves a call, answered by a reason or None."""

from __future__ import annotations

from attn_n.backends import registry
from attn_n.backends.base import Backend, Family
from attn_n.call import AttentionCall


def first(call: AttentionCall, candidates: tuple[str, ...]) -> tuple[str, Backend] | None:
    """Return the first of the candidates that serves `call`; of a family, the member that does."""
    for candidate in candidates:
        found, _ = registry.find(candidate)
        if found is None or _why_not_transform(found, call) is not None:
            continue
        if isinstance(found, Family):
            member = found.serving(call)
            if member is not None:
                return f"{candidate}:{member}", found.members[member]
        elif found.refusal(call) is None:
            return candidate, found
    return None


def why_not(name: str, call: AttentionCall) -> str | None:
    """Return the reason why the backend called `name` does not serve `call`; None if it does."""
    backend, import_error = registry.find(name)
    return import_error if backend is None else _why_not_transform(backend, call) or backend.refusal(call)


def _why_not_transform(backend: Backend, call: AttentionCall) -> str | None:
    """Return the reason why a backend with an explicit backward cannot serve the call's transform; None if it can."""
    if call.transform is None or backend.differentiates:
        return None
    return f"{call.transform} is served by differentiable operations alone, as those of reference"
