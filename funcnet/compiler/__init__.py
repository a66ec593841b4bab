"""How `jit` makes a program of a function."""
