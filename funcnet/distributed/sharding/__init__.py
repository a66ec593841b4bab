"""Sharding: each rank has a part of the params, or of what the optimizer keeps of them."""
