"""Layers that solve equations, and their adjoints."""
