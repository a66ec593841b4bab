"""Layers, by kind; all are in `funcnet`'s top level."""
