"""Checkpoints of several ranks: each writes and reads its parts."""
