"""Speed and memory of attn-n beside its peers: `pytest bench`."""
