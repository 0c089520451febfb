"""Hugging Face transformers (5.17 and later): attn_n as an attention implementation, and softmax_n for its models.

from attn_n.integrations import transformers as attn_n_transformers

attn_n_transformers.register()
model = AutoModelForCausalLM.from_pretrained("openai/gpt-oss-20b", attn_implementation="attn_n")
"""

from attn_n.integrations.transformers.registration import register
from attn_n.integrations.transformers.softmax_n import get_softmax_n, set_softmax_n, strip_softmax_n

__all__ = ["get_softmax_n", "register", "set_softmax_n", "strip_softmax_n"]
