"""Attention over several processes: sequences longer than one GPU holds, with n counted once.

Each rank holds the tokens that `shard` gives it. Both ways to attend take these and return the rows of the same tokens:
`ulysses_attention_n` exchanges tokens for heads and attends to whole sequences, `ring_attention_n` attends to the keys
of one rank after the other.
"""

from attn_n.distributed.ring import ring_attention_n, ring_attention_n_varlen
from attn_n.distributed.shards import shard, unshard
from attn_n.distributed.ulysses import ulysses_attention_n, ulysses_attention_n_varlen

__all__ = [
    "ring_attention_n",
    "ring_attention_n_varlen",
    "shard",
    "ulysses_attention_n",
    "ulysses_attention_n_varlen",
    "unshard",
]
