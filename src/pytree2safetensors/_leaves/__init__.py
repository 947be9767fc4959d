"""Leaves and their bytes: from values to bytes, and from bytes to arrays of JAX."""
