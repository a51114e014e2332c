"""The command line: ``lightning-norm``."""
