"""What the kernels are told, and the operators of torch.library that stand before them."""
