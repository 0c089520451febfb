"""The sink behind a kernel that has none: (out, lse) at n = 0 becomes (out, lse) at n, and n gets a gradient."""
