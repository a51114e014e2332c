"""The evidence behind "Which normalizer?": one folder per claim, each run by ``lightning-norm compare``."""
