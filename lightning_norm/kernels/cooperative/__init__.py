"""Mixtures of statistics in one launch per direction, whose programs wait for each other; off, see ``grid``."""
