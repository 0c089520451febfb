"""What is asked: the description of a call, its checks, and its canonical form."""

from attn_n.call.description import AttentionCall, Options, Request, describe

__all__ = ["AttentionCall", "Options", "Request", "describe"]
