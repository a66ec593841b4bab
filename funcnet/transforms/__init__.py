"""Transformations of pure functions: jit, vmap, scan and remat."""
