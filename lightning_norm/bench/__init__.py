"""What `lightning-norm bench` runs."""
