"""BNET's depthwise convolution behind the normalization."""
