"""Trees to files and flat dicts."""
