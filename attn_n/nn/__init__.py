"""PyTorch's attention module with n, and in `functional` its attention function."""

from attn_n.nn.multihead import MultiheadAttentionN

__all__ = ["MultiheadAttentionN"]
