"""The backends, one file or folder each; `attn_n.registry` imports them when a call first asks for them."""
