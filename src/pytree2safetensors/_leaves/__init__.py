"""Leaves and tensor bytes. No other folder creates or reads a jax.Array."""
