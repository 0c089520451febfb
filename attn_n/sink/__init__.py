"""The mathematics of n: (out, lse) at n = 0 becomes (out, lse) at n, and n gets a gradient."""
