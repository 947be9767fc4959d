"""Leaves and their bytes. No other folder creates or reads a jax.Array."""
