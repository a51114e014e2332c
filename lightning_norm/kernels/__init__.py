"""Triton kernels. Knows pointers, strides and blocks, and no normalizer. Only this folder imports Triton."""
