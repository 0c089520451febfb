"""The question whether a backend serves a call, answered by a reason or None."""

from __future__ import annotations

from attn_n.backends import registry
from attn_n.backends.base import Backend, Family
from attn_n.call import AttentionCall
from attn_n.dispatch import order


def automatic(call: AttentionCall) -> tuple[str, ...]:
    """Return the backends to try, in order, for a call that forces none."""
    return tuple([name for name in order.automatic(call) if not _only_by_name(name, call)])


def _only_by_name(name: str, call: AttentionCall) -> bool:
    base, colon, member = name.partition(":")
    family, _ = registry.find(base) if colon else (None, None)
    return isinstance(family, Family) and member in family.by_name(call)


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
