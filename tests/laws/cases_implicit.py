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

FIELD = fn.serial(fn.linear(4), fn.tanh(), fn.linear(6))
NOISY = fn.serial(fn.linear(6), fn.batch_norm(), fn.dropout(0.2), fn.tanh())
# Its derivative takes the sizes of the steps for constants, which is right to the tolerance.
FINE = {"method": "dopri5", "rtol": 1e-7, "atol": 1e-8}

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
    "neural_ode": (fn.neural_ode(FIELD, (0.0, 1.0), 3), ROWS),
    "neural_ode euler": (fn.neural_ode(NOISY, (0.0, 1.0), 3, "euler"), ROWS),
    "neural_ode at times": (
        fn.neural_ode(NOISY, torch.tensor([0.0, 0.5, 2.0]), 4, "midpoint", keep=2),
        ROWS,
    ),
    "neural_ode dopri5": (fn.neural_ode(FIELD, (0.0, 1.0), 50, **FINE), ROWS),
    "neural_ode dopri5 at times": (
        fn.neural_ode(fn.serial(FIELD, fn.dropout(0.2)), torch.tensor([0.0, 0.5, 1.0]), 50, **FINE),
        ROWS,
    ),
}
