"""attn-n: attention with softmax_n, `exp(x_i) / (n + sum_j exp(x_j))`, exact and fast, forward and backward."""

from attn_n.backends.base import Backend, Family
from attn_n.backends.registry import register_backend
from attn_n.call import FEATURES, AttentionCall, Gradients, Grads, Options, Saved
from attn_n.call.errors import UnsupportedError
from attn_n.dispatch.explanation import Explanation, Verdict
from attn_n.dispatch.forced import use_backend
from attn_n.functional import backends, explain, flash_attention_n, flash_attention_n_varlen
from attn_n.inference import flash_attention_n_with_kvcache
from attn_n.merge import merge_attention
from attn_n.softmax import softmax_n
from attn_n.version import __version__

__all__ = [
    "FEATURES",
    "AttentionCall",
    "Backend",
    "Explanation",
    "Family",
    "Gradients",
    "Grads",
    "Options",
    "Saved",
    "UnsupportedError",
    "Verdict",
    "__version__",
    "backends",
    "explain",
    "flash_attention_n",
    "flash_attention_n_varlen",
    "flash_attention_n_with_kvcache",
    "merge_attention",
    "register_backend",
    "softmax_n",
    "use_backend",
]
