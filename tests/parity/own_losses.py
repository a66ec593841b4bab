"""Our own cases of losses."""

from typing import Any

import torch
from torch import nn

from tests.parity.draws import (
    Case,
    Draw,
    Nested,
    case,
    counts,
    each,
    fixed,
    integers,
    log_probabilities,
    normal,
    signs,
    simplex,
    uniform,
)

ROWS = (5, 6)
IMAGES = (2, 4, 3, 3)
CLASS_WEIGHTS = [uniform(6)]


def reduced(*args: Any, x: Any, **choices: list[Any]) -> list[Case]:
    """Each reduction, alone and with each other option, and with two of those."""
    return each(*args, x=x, together=2, reduction=["sum", "none"], **choices)


PAIR: list[Any] = [ROWS, ROWS]
ONE: list[Any] = [(), ()]
TRIPLET: list[Any] = [ROWS, ROWS, ROWS]
OF_CLASSES: list[Any] = [ROWS, integers(6, 5)]
OF_IMAGES: list[Any] = [IMAGES, integers(4, 2, 3, 3)]
FRAMES: list[Any] = [
    Draw(lambda rng, dtype: normal(7, 2, 6).make(rng, torch.double).log_softmax(2).to(dtype)),
    fixed([7, 5]),
    fixed([3, 2]),
]
DISTANCES = [Nested("PairwiseDistance", (1.0,)), Nested("CosineSimilarity")]
OF_LOGS: list[Any] = [log_probabilities(*ROWS), integers(6, 5)]

CHUNKED = [nn.LinearCrossEntropyOptions(allow_retain_graph=True, batch_chunk_size=2)]
HEADS = {
    "LinearCrossEntropyLoss": [
        *reduced(6, 4, x=[ROWS, integers(4, 5)], bias=[True], ignore_index=[2], options=CHUNKED),
        *reduced(
            *(6, 4),
            x=[ROWS, integers(4, 5)],
            weight=[uniform(4)],
            label_smoothing=[0.2],
            options=CHUNKED,
        ),
        *reduced(6, 4, x=[ROWS, simplex(5, 4)], label_smoothing=[0.2], options=CHUNKED),
        *reduced(6, 4, x=[(6,), integers(4)], bias=[True], options=CHUNKED),
        case(6, 4, out_features=(3, 2), bias=True, x=[ROWS, integers(4, 5, 3, 2)]),
        case(6, 4, out_features=(3,), x=[(6,), integers(4, 3)]),
        case(6, 4, ignore_index=1, x=[ROWS, simplex(5, 4)]),
        case(6, 4, x=[ROWS, integers(5, 6)]),
        case(6, 4, weight=uniform(3), x=[ROWS, integers(4, 5)]),
    ],
    "AdaptiveLogSoftmaxWithLoss": [
        *each(8, 10, [3, 6], x=[(5, 8), integers(10, 5)], div_value=[2.0], head_bias=[True]),
        case(8, 10, [2], 1.5, True, x=[(5, 8), integers(10, 5)]),
        # Of clusters without a target, and of one without features.
        case(8, 10, [3, 6, 8], x=[(5, 8), fixed([1, 6, 1, 2, 7])]),
        case(8, 10, [3, 6], x=[(8,), integers(10)]),
        case(8, 10, [3, 6], x=[(5, 8), fixed([1, 6, 10, 2, 7])]),
        case(8, 10, [3, 6], x=[(5, 8), fixed([1, 6, -1, 2, 7])]),
        case(8, 10, [3, 6], x=[(5, 8), integers(10, 4)]),
        case(8, 10, [6, 3], x=[(5, 8), integers(10, 5)]),
        case(8, 10, [3, 10], x=[(5, 8), integers(10, 5)]),
        case(8, 10, [], x=[(5, 8), integers(10, 5)]),
    ],
}

LOSSES = {
    "L1Loss": [*reduced(x=PAIR), *reduced(x=ONE)],
    "MSELoss": [*reduced(x=PAIR), *reduced(x=ONE)],
    "SmoothL1Loss": reduced(x=PAIR, beta=[0.5, 0.0]),
    "HuberLoss": [*reduced(x=PAIR, delta=[0.5]), case("sum", 0.3, x=PAIR)],
    "BCELoss": reduced(x=[uniform(*ROWS), uniform(*ROWS)], weight=[uniform(6), uniform(5, 6)]),
    "BCEWithLogitsLoss": reduced(
        x=[ROWS, uniform(*ROWS)], weight=[uniform(6)], pos_weight=[uniform(6)]
    ),
    "KLDivLoss": [
        *each(
            x=[log_probabilities(*ROWS), simplex(*ROWS)],
            reduction=["sum", "none", "batchmean"],
        ),
        *[
            case(
                reduction=reduction,
                log_target=True,
                x=[log_probabilities(*ROWS), log_probabilities(*ROWS)],
            )
            for reduction in ("mean", "sum", "none", "batchmean")
        ],
    ],
    "NLLLoss": [
        *reduced(x=OF_LOGS, weight=CLASS_WEIGHTS, ignore_index=[2]),
        *reduced(x=OF_IMAGES, weight=[uniform(4)], ignore_index=[1]),
        *reduced(x=[log_probabilities(6), integers(6)]),
    ],
    "NLLLoss2d": reduced(x=OF_IMAGES, weight=[uniform(4)], ignore_index=[1]),
    "CrossEntropyLoss": [
        *reduced(x=OF_CLASSES, weight=CLASS_WEIGHTS, ignore_index=[2], label_smoothing=[0.2]),
        *reduced(x=OF_IMAGES, weight=[uniform(4)], ignore_index=[1], label_smoothing=[0.2]),
        *reduced(x=[ROWS, simplex(*ROWS)], weight=CLASS_WEIGHTS, label_smoothing=[0.2]),
        *reduced(x=[(6,), integers(6)], weight=CLASS_WEIGHTS, label_smoothing=[0.2]),
        *reduced(x=[(6,), uniform(6)], weight=CLASS_WEIGHTS, label_smoothing=[0.2]),
    ],
    "CTCLoss": [
        *[
            found
            for targets in ([[1, 1, 2], [3, 4, 1]], [2, 2, 1, 4, 3])
            for found in reduced(
                x=[FRAMES[0], fixed(targets), *FRAMES[1:]], blank=[5], zero_infinity=[True]
            )
        ],
        # The second input is too short.
        *reduced(
            zero_infinity=[True],
            x=[FRAMES[0], fixed([[1, 2, 1]] * 2), fixed([7, 2]), fixed([2, 3])],
        ),
        *reduced(x=[log_probabilities(7, 6), fixed([1, 1, 2]), fixed(6), fixed(3)]),
        *reduced(x=[log_probabilities(7, 6), fixed([1, 1, 2]), fixed([0]), fixed([0])]),
    ],
    "GaussianNLLLoss": [
        *reduced(x=[ROWS, ROWS, uniform(*ROWS)], full=[True], eps=[0.5]),
        *reduced(x=[ROWS, ROWS, uniform(5, 1)]),
        *reduced(x=[ROWS, ROWS, uniform(5)]),
    ],
    "PoissonNLLLoss": [
        *reduced(x=[ROWS, counts(*ROWS)], full=[True]),
        *reduced(x=[uniform(*ROWS), counts(*ROWS)], log_input=[False], full=[True], eps=[0.1]),
    ],
    "CosineEmbeddingLoss": [
        *reduced(x=[ROWS, ROWS, signs(5)], margin=[0.4, -0.3]),
        *reduced(x=[(6,), (6,), signs()]),
    ],
    "MarginRankingLoss": [
        *reduced(x=[(5,), (5,), signs(5)], margin=[0.4]),
        *reduced(x=[(), (), signs()]),
    ],
    "HingeEmbeddingLoss": reduced(x=[ROWS, signs(*ROWS)], margin=[0.4]),
    "SoftMarginLoss": reduced(x=[ROWS, signs(*ROWS)]),
    "MultiMarginLoss": [
        *reduced(x=OF_CLASSES, p=[2], margin=[0.4], weight=CLASS_WEIGHTS),
        *reduced(x=[(6,), integers(6)]),
    ],
    "MultiLabelMarginLoss": [
        *reduced(x=[(2, 4), fixed([[3, 0, -1, 1], [-1, 2, 2, 2]])]),
        *reduced(x=[ROWS, integers(6, *ROWS)]),
        *reduced(x=[(4,), fixed([2, -1, 0, 0])]),
    ],
    "MultiLabelSoftMarginLoss": [
        *reduced(x=[ROWS, uniform(*ROWS)], weight=CLASS_WEIGHTS),
        *reduced(x=[(6,), uniform(6)]),
    ],
    "TripletMarginLoss": [
        *reduced(x=TRIPLET, margin=[0.3], p=[1.0, 3.0], eps=[1e-3], swap=[True]),
        *reduced(x=[(6,), (6,), (6,)]),
    ],
    "TripletMarginWithDistanceLoss": [
        *reduced(x=TRIPLET, distance_function=DISTANCES, margin=[0.3], swap=[True]),
    ],
}
