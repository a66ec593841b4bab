"""Optimizers, and the transforms they are chained from; all are in `funcnet`'s top level."""
