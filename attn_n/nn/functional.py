"""PyTorch's attention function and softmax, with n."""

from attn_n.compat.torch import scaled_dot_product_attention as scaled_dot_product_attention_n
from attn_n.softmax import softmax_n

__all__ = ["scaled_dot_product_attention_n", "softmax_n"]
