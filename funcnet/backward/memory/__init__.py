"""Residuals that are stored in less memory, or computed back."""
