"""The torch operators attn_n::forward and attn_n::backward, with their autograd, vmap and FLOP formulas."""
