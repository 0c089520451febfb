"""A KV cache: new keys and values are turned and written into it, and it is read in the order of its sequences."""
