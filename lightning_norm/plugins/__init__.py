"""Lightning plugins; none yet."""
