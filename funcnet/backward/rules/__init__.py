"""Other backward rules for the same forward pass."""
