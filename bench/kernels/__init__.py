"""Tools for our own Triton kernels: tiles, ahead-of-time compilation, one pass for a profiler, the cost of the sink."""
