"""The losses that torch.nn has, with options, predictions and targets to hold them to it."""

import math

import optree
import torch
from torch import nn

F64 = torch.float64

MODULES = {
    "bce": nn.BCELoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
    "cosine_embedding": nn.CosineEmbeddingLoss,
    "cross_entropy": nn.CrossEntropyLoss,
    "gaussian_nll": nn.GaussianNLLLoss,
    "hinge_embedding": nn.HingeEmbeddingLoss,
    "huber": nn.HuberLoss,
    "kl_div": nn.KLDivLoss,
    "mae": nn.L1Loss,
    "margin_ranking": nn.MarginRankingLoss,
    "mse": nn.MSELoss,
    "multi_margin": nn.MultiMarginLoss,
    "multilabel_margin": nn.MultiLabelMarginLoss,
    "multilabel_soft_margin": nn.MultiLabelSoftMarginLoss,
    "nll": nn.NLLLoss,
    "poisson_nll": nn.PoissonNLLLoss,
    "smooth_l1": nn.SmoothL1Loss,
    "soft_margin": nn.SoftMarginLoss,
    "triplet_margin": nn.TripletMarginLoss,
    "triplet_margin_with_distance": nn.TripletMarginWithDistanceLoss,
}


def randn(*shape, seed=0):
    # Drawn on the CPU, so that the numbers are the same on any device.
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device())


def integers(high, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(high, shape, generator=generator, device="cpu")
    return drawn.to(torch.get_default_device())


ROWS, OTHERS, THIRD = (randn(6, 4, seed=seed) for seed in range(3))
POSITIVE = ROWS.exp()
SIGNS = OTHERS.sign()
PROBABILITIES = THIRD.sigmoid()
LOGS = ROWS.log_softmax(-1)
CLASSES = integers(4, 6)
LISTED = torch.tensor(
    [[3, 0, -1, 1], [2, -1, -1, -1], [-1, 0, 1, 2], [0, 1, 2, 3], [1, 1, -1, 0], [1, 2, 1, 2]]
)
COUNTS = integers(6, 6, 4).double()
WEIGHT = torch.tensor([0.5, 1.0, 0.25, 3.0], dtype=F64)
TRIPLET = (ROWS, OTHERS, THIRD)


def first(tree):
    return optree.tree_map(lambda leaf: leaf[0], tree)


# (name, options, prediction, target), each of which is checked with all reductions
CASES = [
    *[("mse", {}, *pair) for pair in ((ROWS, OTHERS), (ROWS[0, 0], OTHERS[0, 0]))],
    ("mae", {}, ROWS, OTHERS),
    *[("huber", {"delta": delta}, ROWS, OTHERS) for delta in (0.3, 1.0)],
    *[("smooth_l1", {"beta": beta}, ROWS, OTHERS) for beta in (0.0, 0.3, 1.0)],
    *[("kl_div", {"log_target": False}, LOGS, each) for each in (PROBABILITIES, SIGNS.relu())],
    ("kl_div", {"log_target": True}, LOGS, OTHERS.log_softmax(-1)),
    *[("bce", {"weight": weight}, PROBABILITIES, SIGNS.relu()) for weight in (None, WEIGHT)],
    *[
        ("bce_with_logits", {"weight": weight, "pos_weight": pos_weight}, ROWS, PROBABILITIES)
        for weight in (None, WEIGHT)
        for pos_weight in (None, WEIGHT.flip(0))
    ],
    *[
        ("poisson_nll", {"log_input": log, "full": full, "eps": 1e-3}, POSITIVE, COUNTS)
        for log in (False, True)
        for full in (False, True)
    ],
    *[
        ("gaussian_nll", {"full": full, "eps": eps}, (OTHERS, var), target)
        for full, eps in ((False, 1e-6), (True, 0.5))
        for var, target in (
            (POSITIVE, THIRD),
            (POSITIVE[:, :1], THIRD),
            (POSITIVE[:1], THIRD[:1]),
            (POSITIVE[:, 0], THIRD[:, :1]),
        )
    ],
    ("gaussian_nll", {}, (OTHERS[0], POSITIVE[0, 0]), THIRD[0]),
    ("gaussian_nll", {}, (OTHERS[0, 0], POSITIVE[0, 0]), THIRD[0, 0]),
    (
        "gaussian_nll",
        {},
        (OTHERS.reshape(2, 3, 4), POSITIVE.reshape(2, 3, 4)[:, :1]),
        THIRD.view(2, 3, 4),
    ),
    *[("hinge_embedding", {"margin": margin}, ROWS, SIGNS) for margin in (0.5, 1.0)],
    ("hinge_embedding", {}, ROWS[0, 0], SIGNS[0, 0]),
    ("soft_margin", {}, ROWS, SIGNS),
    *[
        ("margin_ranking", {"margin": margin}, (ROWS[:, 0], ROWS[:, 1]), SIGNS[:, 0].to(dtype))
        for margin in (0.0, 0.4)
        for dtype in (F64, torch.int64)
    ],
    ("margin_ranking", {}, (ROWS[0, 0], ROWS[0, 1]), SIGNS[0, 0]),
    *[
        ("cosine_embedding", {"margin": margin}, (ROWS, OTHERS), SIGNS[:, 0])
        for margin in (-0.5, 0.0, 0.3)
    ],
    ("cosine_embedding", {}, (ROWS[0], OTHERS[0]), SIGNS[0, 0]),
    *[
        ("multi_margin", {"p": p, "margin": margin, "weight": weight}, ROWS, CLASSES)
        for p, margin in ((1, 1.0), (2, 0.4))
        for weight in (None, WEIGHT)
    ],
    ("multi_margin", {"weight": WEIGHT}, ROWS[0], CLASSES[0]),
    ("multilabel_margin", {}, ROWS, LISTED),
    ("multilabel_margin", {}, ROWS[0], LISTED[0]),
    *[
        ("multilabel_soft_margin", {"weight": weight}, ROWS, target)
        for weight in (None, WEIGHT)
        for target in (SIGNS.relu(), SIGNS.relu().long())
    ],
    ("multilabel_soft_margin", {}, ROWS[0], SIGNS[0].relu()),
    *[
        ("triplet_margin", {"p": p, "swap": swap, "margin": margin}, TRIPLET, None)
        for p, margin in (
            (0.5, 1.0),
            (1.0, 1.0),
            (1.5, 0.5),
            (2.0, 1.0),
            (3.0, 2.0),
            (math.inf, 1.0),
        )
        for swap in (False, True)
    ],
    ("triplet_margin", {"eps": 0.1}, first(TRIPLET), None),
    ("triplet_margin", {"swap": True}, tuple(part.view(2, 3, 4) for part in TRIPLET), None),
    *[("triplet_margin_with_distance", {"swap": swap}, TRIPLET, None) for swap in (False, True)],
    *[
        ("cross_entropy", {"weight": weight, "ignore_index": ignored, "label_smoothing": e}, *data)
        for weight in (None, WEIGHT)
        for ignored, e in ((-100, 0.0), (1, 0.0), (-100, 0.2), (1, 0.2))
        for data in ((ROWS, CLASSES), (randn(2, 4, 3, 2), integers(4, 2, 3, 2)))
    ],
    *[
        ("cross_entropy", {"weight": weight, "label_smoothing": e}, *data)
        for weight in (None, WEIGHT)
        for e in (0.0, 0.2)
        for data in (
            (ROWS, OTHERS.softmax(1)),
            (ROWS[0], OTHERS[0].softmax(0)),
            (randn(2, 4, 3), randn(2, 4, 3, seed=1).softmax(1)),
        )
    ],
    ("cross_entropy", {}, ROWS[0], CLASSES[0]),
    *[
        ("nll", {"weight": weight, "ignore_index": ignored}, *data)
        for weight in (None, WEIGHT)
        for ignored in (-100, 1)
        for data in (
            (LOGS, CLASSES),
            (randn(2, 4, 3, 2), integers(4, 2, 3, 2)),
            (LOGS[1], CLASSES[1]),
        )
    ],
]
