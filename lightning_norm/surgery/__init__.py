"""Find modules and replace them; plain PyTorch, no Lightning."""
