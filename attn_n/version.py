"""The version of the distribution attn-n."""

__version__ = "0.1.0"
