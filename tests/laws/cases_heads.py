"""Layers that end in a loss, with inputs to check them on."""

import torch

import funcnet as fn

DOUBLE = torch.float64
ROWS = fn.random.normal(fn.key(60), (5, 8), DOUBLE)
CLASSES = torch.tensor([0, 9, 4, 5, 2])
CHUNKS = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)

LAYERS = {
    "adaptive_log_softmax": (
        fn.adaptive_log_softmax(10, [3, 5], 2.0, head_bias=True),
        (ROWS, CLASSES),
    ),
    "adaptive_log_softmax of one": (
        fn.adaptive_log_softmax(10, [3, 5]),
        {"input": ROWS[0], "target": CLASSES[1]},
    ),
    "linear_cross_entropy": (fn.linear_cross_entropy(10, bias=True), (ROWS, CLASSES)),
    "linear_cross_entropy of more dimensions": (
        fn.linear_cross_entropy(3, out_features=(2,), reduction="none", label_smoothing=0.1),
        (ROWS, torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0], [1, 2]])),
    ),
    "linear_cross_entropy in chunks": (
        fn.linear_cross_entropy(10, bias=True, ignore_index=4, options=CHUNKS),
        {"input": ROWS, "target": CLASSES},
    ),
    "linear_cross_entropy of each in chunks": (
        fn.linear_cross_entropy(3, out_features=(2,), reduction="none", options=CHUNKS),
        (ROWS, torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0], [1, 2]])),
    ),
    "linear_cross_entropy of probabilities in chunks": (
        fn.linear_cross_entropy(8, options=CHUNKS),
        (ROWS, ROWS.softmax(-1)),
    ),
    "adaptive_log_softmax of all classes": (fn.adaptive_log_softmax(10, [3, 5]), ROWS),
}
