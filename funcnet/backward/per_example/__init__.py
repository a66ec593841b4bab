"""Gradients of single examples, their norms and weighted sums."""
