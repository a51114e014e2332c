"""What ``lightning-norm bench`` runs: contenders side by side, checked, then timed in turn."""
