"""Adapters for the kernels of other libraries: layouts, blocks, dense biases, signatures."""
