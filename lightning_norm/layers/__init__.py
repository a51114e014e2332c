"""What every normalizer is made of."""
