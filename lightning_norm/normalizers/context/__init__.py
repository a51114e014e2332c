"""Context normalization."""
