"""Our own cases of recurrent layers: their options, forms of input, and first states."""

from tests.parity.draws import Case, Draw, case, each, normal

STEPS = (4, 3, 2)


def pair(first: tuple[int, ...], second: tuple[int, ...]) -> Draw:
    """A tuple of two tensors, which is one input: ``(h_0, c_0)``."""
    shapes = first, second
    return Draw(lambda rng, dtype: (tuple(normal(*each).make(rng, dtype) for each in shapes),))


def layers(states: int, **choices: list[object]) -> list[Case]:
    """A layer with each pair of its options, without first states and with them."""

    def hx(*shape: int) -> object:
        return shape if states == 1 else pair(shape, shape)

    return [
        *each(
            2,
            3,
            x=STEPS,
            together=2,
            num_layers=[2],
            bias=[False],
            batch_first=[True],
            bidirectional=[True],
            **choices,
        ),
        case(2, 3, x=[STEPS, hx(1, 3, 3)]),
        case(2, 3, 2, batch_first=True, bidirectional=True, x=[STEPS, hx(4, 4, 3)]),
        case(2, 3, 2, x=[(4, 2), hx(2, 3)]),
        case(2, 3, x=(1, 3, 2)),
        case(2, 3, x=(4, 0, 2)),
        case(2, 3, 2, dropout=0.0, x=STEPS),
        case(2, 3, 2, dropout=1.0, x=STEPS),
    ]


def cells(states: int, *args: object) -> list[Case]:
    def hx(*shape: int) -> object:
        return shape if states == 1 else pair(shape, shape)

    return [
        case(2, 3, x=(4, 2)),
        case(2, 3, x=(2,)),
        case(2, 3, x=(0, 2)),
        case(2, 3, False, *args, x=[(4, 2), hx(4, 3)]),
        case(2, 3, x=[(2,), hx(3)]),
    ]


RECURRENT = {
    "RNN": [
        *layers(1, nonlinearity=["relu"]),
        case(2, 3, 2, "relu", False, True, 0.0, True, x=STEPS),
    ],
    "GRU": [*layers(1), case(2, 3, 2, False, True, 0.0, True, x=STEPS)],
    "LSTM": [
        *layers(2, proj_size=[2]),
        case(2, 3, 2, False, True, 0.0, True, 1, x=STEPS),
        case(2, 3, proj_size=2, x=[STEPS, pair((1, 3, 2), (1, 3, 3))]),
    ],
    "RNNCell": cells(1, "relu"),
    "GRUCell": cells(1),
    "LSTMCell": cells(2),
}
