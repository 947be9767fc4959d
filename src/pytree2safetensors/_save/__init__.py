"""Trees to files."""
