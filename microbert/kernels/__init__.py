"""C kernels for operations that PyTorch computes slowly on a CPU."""
