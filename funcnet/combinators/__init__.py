"""Combinators: constructors of layers from layers."""
