"""Kernels in C, for what PyTorch computes slowly on a CPU."""
