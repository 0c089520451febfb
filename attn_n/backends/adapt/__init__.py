"""How the kernels of other libraries differ from ours: layouts, blocks, dense biases, signatures."""
