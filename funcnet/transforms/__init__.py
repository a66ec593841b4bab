"""Transformations of pure functions: jit, vmap and remat."""
