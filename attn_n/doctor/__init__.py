"""`python -m attn_n`: what is installed, what serves here, whether it is right, and how fast it is."""
