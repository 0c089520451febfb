"""Kinds of call that are so small that the host takes longer than the device."""

from __future__ import annotations

import dataclasses

import torch

from bench.workloads.suites import Case
from bench.workloads.workload import Workload

SUITE = "host: "  # and the kind of call, and its pass
# The pass as the tables call it: what runs, and whether gradients are on.
PASSES_OF_CALLS = {
    "forward without gradients": ("forward", False),
    "forward": ("forward", True),
    "both passes": ("both", True),
}


@dataclasses.dataclass(frozen=True)
class Call(Case):
    """A case in which the host's time is measured.

    Attributes:
        n: which of KINDS_OF_N our contenders compute.
    """

    n: str = "0"

    def _name(self) -> str:
        return f"{self.suite}-{self.workload}"


def calls(device: str) -> list[Call]:
    return [
        Call(f"{SUITE}{kind}, {name}", workload, measure, training, n)
        for kind, (workload, n) in _kinds(device).items()
        for name, (measure, training) in PASSES_OF_CALLS.items()
    ]


def _kinds(device: str) -> dict[str, tuple[Workload, str]]:
    if device == "cuda":
        one = Workload(128, heads=1, width=64, dtype=torch.bfloat16, device=device)
        packed = dataclasses.replace(one, sequences=(64, 64))
    else:
        one = Workload(1, heads=1, keys=64)
        packed = Workload(64, heads=1, sequences=(32, 32))
    return {
        "n=0": (one, "0"),
        "n=1": (one, "1"),
        "sinks": (one, "per head"),
        "mask": (dataclasses.replace(one, mask="bool"), "1"),
        "window + sinks": (dataclasses.replace(one, causal=True, window=16), "per head"),
        "varlen": (packed, "1"),
    }
