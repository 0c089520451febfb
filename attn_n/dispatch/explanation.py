"""The verdict of each backend on a call, for `explain` and for the text of a refusal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_n.backends import registry
from attn_n.backends.base import Family
from attn_n.call import AttentionCall
from attn_n.dispatch import order
from attn_n.dispatch.forced import forced
from attn_n.dispatch.serving import automatic, first, why_not


@dataclass(frozen=True)
class Verdict:
    """The verdict of one backend on one call.

    Attributes:
        reason: why it does not serve the call; None if it does.
        rank: its place in the automatic order, counted from 1; None if it serves only when it is named.
        by_name: why it serves only when it is named, if there is a reason to give.
    """

    name: str
    reason: str | None
    rank: int | None
    by_name: str | None = None


@dataclass(frozen=True)
class Explanation:
    """The backend that serves a call and the verdicts of all, as `explain` returns and prints them."""

    call: AttentionCall
    chosen: str | None
    asked_by: str
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        width = max(len(verdict.name) for verdict in self.verdicts)
        lines, chosen = [f"call: {self.call}"], self.chosen or ""
        listed = [verdict.name for verdict in self.verdicts]
        serving = chosen if chosen in listed else chosen.partition(":")[0]
        for verdict in self.verdicts:
            mark = "->" if verdict.name == serving else "  "
            if verdict.reason is not None:
                said = f"no: {verdict.reason}"
            elif verdict.rank is None:
                said = "serves it, when asked for by name" + (f": {verdict.by_name}" if verdict.by_name else "")
            else:
                said = f"serves it, number {verdict.rank} in the automatic order"
            lines.append(f"{mark} {verdict.name:{width}}  {said}")
        return "\n".join([*lines, f"chosen: {self.chosen or 'none'} ({self.asked_by})"])


def explain(call: AttentionCall, backend: str | None) -> Explanation:
    """Ask each backend for its verdict on `call`, and choose the one that serves it."""
    name, asked_by = forced(backend)
    candidates = automatic(call)
    listed: dict[str, str | None] = dict.fromkeys([*candidates, *registry.names()])
    for known in tuple(listed):
        backend_known, _ = registry.find(known)
        if isinstance(backend_known, Family):
            listed |= {f"{known}:{member}": why for member, why in backend_known.by_name(call).items()}
    if name is not None and name not in listed:
        registry.find(name)
        listed[name] = None
    verdicts = tuple(
        Verdict(known, why_not(known, call), candidates.index(known) + 1 if known in candidates else None, by_name)
        for known, by_name in listed.items()
    )
    served = first(call, candidates if name is None else (name,))
    chosen = None if served is None else served[0]
    return Explanation(call, chosen, order.reason(call) if name is None else asked_by, verdicts)


def refusal(call: AttentionCall, name: str | None, asked_by: str) -> str:
    """Return the text of the error for a call that is not served: the call, the reasons of each backend, the remedy."""
    explanation = explain(call, name)
    who = "no backend serves this call" if name is None else f"backend {name!r} ({asked_by}) does not serve this call"
    others = [verdict.name for verdict in explanation.verdicts if verdict.reason is None]
    remedy = (
        f"use {' or '.join(others)}, or leave the choice to the library" if others else "change the call as said above"
    )
    reasons = [f"  {verdict.name}: {verdict.reason or 'serves it'}" for verdict in explanation.verdicts]
    described = [f"  {call}"]
    if torch.compiler.is_compiling():  # torch.compile cannot trace the text of symbolic lengths
        described = []
    return "\n".join([f"{who}:", *described, *reasons, f"To do: {remedy}."])
