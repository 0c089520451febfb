"""Tables of the backends: what each takes, by what it declares, and the order in which they are tried."""

from __future__ import annotations

from dataclasses import replace

import torch

from attn_n import AttentionCall, Backend, Family
from attn_n.backends import registry
from attn_n.dispatch import order
from docs_build.blocks import table

# The columns of the features, by the names in `attn_n.FEATURES` that a backend honours.
FEATURES = {
    "window": ("window",),
    "softcap": ("softcap",),
    "mask": ("mask",),
    "ALiBi": ("alibi",),
    "gradient of mask and ALiBi": ("mask gradient", "alibi gradient"),
    "dropout": ("dropout",),
    "varlen": ("varlen",),
    "padding": ("seqused", "leftpad"),
    "cache": ("cache", "block table"),
}
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0))
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def members() -> list[Backend]:
    """Return every kernel that can be named, in the order of the registry."""
    found: list[Backend] = []
    for name in registry.BUILT_IN:
        backend, why_absent = registry.find(name)
        if backend is None:
            raise SystemExit(f"the tables need every built-in backend, and {name} {why_absent}")
        found += backend.members.values() if isinstance(backend, Family) else [backend]
    return found


def takes() -> str:
    """A row for each kernel: device, dtypes, and the arguments beyond plain and causal attention."""
    rows = []
    for backend in members():
        honoured = [all(name in backend.honours for name in names) for names in FEATURES.values()]
        cells = ["yes" if one else "-" for one in honoured]
        rows.append([f"`{backend.name}`", devices(backend), dtypes(backend), *cells])
    return table(["backend", "device", "dtype", *FEATURES], rows)


def dtypes(backend: Backend) -> str:
    return "all" if backend.dtypes is None else ", ".join(DTYPES[dtype] for dtype in backend.dtypes)


def devices(backend: Backend) -> str:
    if backend.devices is None:
        return "any"
    if backend.devices == ("cpu",):
        return "CPU"
    served = [capability for capability in CAPABILITIES if takes_capability(backend, capability)]
    first, last = (f"sm_{major}{minor}" for major, minor in (served[0], served[-1]))
    spread = first if first == last else f"{first} to {last}"
    found = "CUDA" if served == list(CAPABILITIES) else f"{first} on" if served[-1] == CAPABILITIES[-1] else spread
    return f"{found}, ROCm" if backend.rocm else found


def takes_capability(backend: Backend, capability: tuple[int, int]) -> bool:
    """Return True unless the backend refuses a plain call on such a GPU because of its compute capability."""
    reason = backend.refusal(replace(_PLAIN, capability=capability))
    return reason is None or "compute capability" not in reason


_SHAPE, _STRIDE = (2, 8, 256, 64), (8 * 256 * 64, 256 * 64, 64, 1)
_PLAIN = AttentionCall(
    device="cuda", capability=None, dtype=torch.float16, q_shape=_SHAPE, k_shape=_SHAPE, v_shape=_SHAPE,
    q_stride=_STRIDE, k_stride=_STRIDE, v_stride=_STRIDE,
)  # fmt: skip


def orders() -> str:
    """The order of backends for each device."""
    rows = [["CPU", _names(order.DEFAULT["cpu"])], ["CUDA and ROCm", _names(order.DEFAULT["cuda"])]]
    for major, names in order.UNMEASURED.items():
        rows.append([f"compute capability {major}.x, not measured", _names(names)])
    rows.append(["any other device", _names(order.ELSEWHERE)])
    in_place = "without gradients over a KV cache, or with `seqused_k` or `leftpad_k`"
    rows.append([in_place, _names(order.IN_PLACE)])
    many = f"as before, from {order.MANY_ROWS} queries of a KV head on, over {order.OPERATIONS}"
    rows.append([many, _names(order.IN_PLACE_MANY_ROWS)])
    return table(["device or call", "tried in this order"], rows)


def rows_of_hopper() -> str:
    """The measured rows for sm_90, of which the first that matches a call counts."""
    rows = []
    for row in order.SM_90:
        rows.append([
            {None: "any", True: "training", False: "inference"}[row.training],
            {None: "any", True: "n > 0", False: "n = 0"}[row.with_n],
            ", ".join(row.kinds) or "any", f"{row.widest}", f"{row.keys:,}", _names(row.first),
        ])  # fmt: skip
    return table(["pass", "n", "kind of call", "heads up to", "keys from", "tried first"], rows)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
