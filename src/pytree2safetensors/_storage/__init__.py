"""Reading and writing bytes, atomically."""
