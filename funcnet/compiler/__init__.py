"""How `jit` makes a program: each stage is a module, and README.md walks a small step through all.

`record` runs a function on fake tensors and gives a graph; `blocks` cuts it into segments, loops
and primitives; `inductor` makes C++ kernels of a segment; `memory` plans where each buffer lies;
`program` writes the C++ text; `build` and `cache` compile and keep it; `compiled` calls it;
`dispatch` finds the program for a call. `staged` runs what cannot be one program.
"""
