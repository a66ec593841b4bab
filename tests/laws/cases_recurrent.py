"""Recurrent layers and their cells, with inputs to check them on."""

import torch

import funcnet as fn

DOUBLE = torch.float64


def draw(seed, *shape):
    return fn.random.normal(fn.key(seed), shape, DOUBLE)


STEPS = draw(30, 4, 3, 2)
LENGTHS = torch.tensor([2, 4, 1])


def states(directions, *sizes):
    found = tuple(draw(31 + i, directions, 3, size) for i, size in enumerate(sizes))
    return found if len(found) > 1 else found[0]


LAYERS = {
    "rnn": (fn.rnn(3), STEPS),
    "rnn of all options": (
        fn.rnn(3, 2, "relu", bidirectional=True, dropout=0.3),
        {"input": STEPS, "hx": states(4, 3), "lengths": LENGTHS},
    ),
    "rnn of one sequence": (fn.rnn(3, bias=False), STEPS[:, 0]),
    "gru": (fn.gru(3), STEPS),
    "gru of states": (
        fn.gru(3, 2, bias=False, batch_first=True),
        (STEPS[:2].contiguous(), states(2, 3)[:, :2]),
    ),
    "gru of all options": (
        fn.gru(3, 2, dropout=0.3, bidirectional=True),
        {"input": STEPS, "hx": states(4, 3), "lengths": LENGTHS},
    ),
    "lstm": (fn.lstm(3), STEPS),
    "lstm of states": (fn.lstm(3), (STEPS, states(1, 3, 3))),
    "lstm of lengths": (fn.lstm(3, bidirectional=True), {"input": STEPS, "lengths": LENGTHS}),
    "lstm with a projection": (fn.lstm(3, proj_size=2), STEPS[:, 0]),
    "lstm of all options": (
        fn.lstm(3, 2, True, True, 0.3, True, 2),
        {"input": STEPS.transpose(0, 1), "hx": states(4, 2, 3), "lengths": LENGTHS},
    ),
    "rnn_cell": (fn.rnn_cell(3), (STEPS[0], states(1, 3)[0])),
    "rnn_cell relu": (fn.rnn_cell(3, False, "relu"), STEPS[0, 0]),
    "gru_cell": (fn.gru_cell(3), (STEPS[0], states(1, 3)[0])),
    "gru_cell without bias": (fn.gru_cell(3, bias=False), {"input": STEPS[0, 0]}),
    "lstm_cell": (fn.lstm_cell(3), (STEPS[0], (draw(33, 3, 3), draw(34, 3, 3)))),
    "lstm_cell of one": (fn.lstm_cell(3), {"hx": (draw(33, 3), draw(34, 3)), "input": STEPS[0, 0]}),
    "item": (fn.item(1), (STEPS, (STEPS, LENGTHS), LENGTHS)),
    "item of a dict": (fn.item("b"), {"a": STEPS, "b": STEPS[0]}),
}
