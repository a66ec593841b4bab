"""Layers that end in a loss, with inputs to check them on."""

import torch

import funcnet as fn

DOUBLE = torch.float64
ROWS = fn.random.normal(fn.key(60), (5, 8), DOUBLE)
CLASSES = torch.tensor([0, 9, 4, 5, 2])

LAYERS = {
    "adaptive_log_softmax": (
        fn.adaptive_log_softmax(10, [3, 5], 2.0, head_bias=True),
        (ROWS, CLASSES),
    ),
    "adaptive_log_softmax of one": (
        fn.adaptive_log_softmax(10, [3, 5]),
        {"input": ROWS[0], "target": CLASSES[1]},
    ),
    "adaptive_log_softmax of all classes": (fn.adaptive_log_softmax(10, [3, 5]), ROWS),
}
