"""The backends, one file or folder each; `attn_n.backends.registry` imports them when a call first asks for them."""
