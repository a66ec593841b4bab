"""The activations that came after the first, for the tables of `cases`."""

import torch

import funcnet as fn

ROWS = fn.random.normal(fn.key(31), (5, 6), torch.float64)

LAYERS = {
    "threshold": (fn.threshold(0.3, -2.0), ROWS),
    "hardshrink": (fn.hardshrink(0.4), ROWS),
    "softshrink": (fn.softshrink(0.4), ROWS),
    "tanhshrink": (fn.tanhshrink(), ROWS),
    "rrelu": (fn.rrelu(), ROWS),
    "rrelu of bounds": (fn.rrelu(-0.2, 0.7), ROWS),
    "softmin": (fn.softmin(0), ROWS),
    "softmax2d": (fn.softmax2d(), ROWS.reshape(5, 3, 2)),
}
