"""Parity: every class of torch.nn held to the layer or the loss of funcnet of the same name.

`samples` are the cases, from PyTorch's own module database and from the tables of `own_layers` and
`own_losses`; `names` finds the constructor and its arguments; `compare` holds one case to torch;
`exceptions` says what is not there, and why; `report` counts.
"""
