"""Data parallelism: each rank has a part of the batch."""
