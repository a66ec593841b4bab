"""Layers whose output solves an equation."""

import torch

import funcnet as fn

ROWS = fn.random.normal(fn.key(1), (5, 6), torch.float64)


def cell(*inside):
    """``tanh(x + W z)``, with layers before W."""
    inner = fn.serial(*inside, fn.linear(ROWS.shape[-1], bias=False))
    return fn.serial(fn.parallel(fn.identity(), inner), fn.add(), fn.tanh())


def wide(x):
    return x.new_zeros(*x.shape[:-1], 4)


# As exact as float64 allows, so that the derivative is that of the fixed point.
EXACT = {"tol": 1e-14, "max_iter": 300}

COMBINATORS = {
    "fixed_point": (fn.fixed_point(cell(), **EXACT), ROWS),
    "fixed_point plain": (
        fn.fixed_point(cell(fn.dropout(0.3)), history=0, damping=0.9, **EXACT),
        ROWS,
    ),
    "fixed_point of other features": (
        fn.serial(
            fn.linear(3),
            fn.fixed_point(
                fn.serial(
                    fn.parallel(fn.serial(fn.linear(4), fn.batch_norm()), fn.linear(4)),
                    fn.add(),
                    fn.tanh(),
                ),
                wide,
                **EXACT,
            ),
        ),
        ROWS,
    ),
}
