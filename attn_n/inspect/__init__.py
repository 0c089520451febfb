"""Looking inside: what the attention heads and the activations of a model do in its forward passes."""

from attn_n.inspect.attention import Heads
from attn_n.inspect.moments import Distribution, parameters
from attn_n.inspect.recorder import Record, record

__all__ = ["Distribution", "Heads", "Record", "parameters", "record"]
