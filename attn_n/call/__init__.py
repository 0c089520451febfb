"""The call: its description, its checks, and its canonical form."""

from attn_n.call.description import FEATURES, AttentionCall, describe
from attn_n.call.passes import Gradients, Grads, Options, Saved
from attn_n.call.request import CacheRequest, Request

__all__ = [
    "FEATURES", "AttentionCall", "CacheRequest", "Gradients", "Grads", "Options", "Request", "Saved", "describe",
]  # fmt: skip
