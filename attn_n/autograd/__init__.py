"""The torch operators attn_n::forward and attn_n::backward, and how they are differentiated."""
