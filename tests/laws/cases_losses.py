"""Every loss of the library, with a prediction and a target to check it on."""

import torch

import funcnet as fn

DOUBLE = torch.float64


def draw(seed, *shape):
    return fn.random.normal(fn.key(seed), shape, DOUBLE)


ROWS, OTHERS, THIRD = (draw(seed, 5, 6) for seed in (1, 3, 4))
IMAGES = draw(2, 2, 4, 3, 3)
PROBABILITIES = torch.sigmoid(draw(5, 5, 6))
POSITIVE = ROWS.exp()
SIGNS = OTHERS.sign()
CLASSES = torch.tensor([0, 5, 2, 2, 1])
LISTED = torch.tensor(
    [[3, 0, -1, 1, 0, 0], [5, -1, 2, 2, 2, 2], [-1] * 6, [0, 1, 2, 3, 4, 5], [2, 2, -1, 0, 0, 0]]
)
COUNTS = torch.tensor([[0, 1, 2, 5, 1, 0]]).expand(5, 6)
WEIGHT = torch.linspace(0.5, 1.5, 6, dtype=DOUBLE)
TRIPLET = (ROWS, OTHERS, THIRD)
FRAMES = draw(6, 6, 3, 5)
LABELS, LONG = torch.tensor([[1, 1, 2], [3, 4, 1], [2, 3, 3]]), torch.tensor([3, 2, 1])
FRAME_NUMBERS = torch.tensor([6, 5, 4])


def manhattan():
    """A distance that a user made of layers."""
    return fn.serial(
        fn.parallel(fn.identity(), fn.elementwise(torch.neg, negative)), fn.add(), total()
    )


def negative(x):
    return -torch.ones_like(x)


def total_backward(dy, features, *, sign):
    return dy.unsqueeze(-1).expand(*dy.shape, features) * sign


def total():
    def forward(x):
        return x.abs().sum(-1), {"sign": x.sign()}, (x.shape[-1],)

    return fn.parameterless(forward, total_backward, name="total")


def losses(weight):
    """The cases of losses; some weigh their elements or classes."""
    table = {
        "mse": (fn.mse, {}, ROWS, OTHERS),
        "mae": (fn.mae, {}, ROWS, OTHERS),
        "huber": (fn.huber, {"delta": 0.7}, ROWS, OTHERS),
        "smooth_l1": (fn.smooth_l1, {"beta": 0.7}, ROWS, OTHERS),
        "smooth_l1 of beta 0": (fn.smooth_l1, {"beta": 0.0}, ROWS, OTHERS),
        "bce": (fn.bce, {}, PROBABILITIES, PROBABILITIES.flip(0)),
        "bce weighted": (fn.bce, {"weight": weight}, PROBABILITIES, PROBABILITIES.flip(0)),
        "bce_with_logits": (fn.bce_with_logits, {}, ROWS, PROBABILITIES),
        "bce_with_logits weighted": (
            fn.bce_with_logits,
            {"weight": weight, "pos_weight": 2 * weight},
            ROWS,
            PROBABILITIES,
        ),
        "focal": (fn.focal, {}, ROWS, PROBABILITIES.round()),
        "focal of soft targets": (fn.focal, {"alpha": -1, "gamma": 0.5}, ROWS, PROBABILITIES),
        "cross_entropy": (fn.cross_entropy, {}, ROWS, CLASSES),
        "cross_entropy weighted": (
            fn.cross_entropy,
            {"weight": weight, "ignore_index": 2, "label_smoothing": 0.1},
            ROWS,
            CLASSES,
        ),
        "cross_entropy of probabilities": (
            fn.cross_entropy,
            {"weight": weight, "label_smoothing": 0.1},
            ROWS,
            PROBABILITIES,
        ),
        "cross_entropy of images": (fn.cross_entropy, {}, IMAGES, IMAGES.argmax(1).flip(0)),
        "cross_entropy of one": (fn.cross_entropy, {}, ROWS[0], CLASSES[0]),
        "nll": (fn.nll, {"weight": weight}, ROWS, CLASSES),
        "nll of images": (fn.nll, {}, IMAGES, IMAGES.argmax(1).flip(0)),
        "kl_div": (fn.kl_div, {}, ROWS, PROBABILITIES),
        "kl_div of logs": (fn.kl_div, {"log_target": True}, ROWS, OTHERS),
        "poisson_nll": (fn.poisson_nll, {}, ROWS, COUNTS),
        "poisson_nll of rates": (
            fn.poisson_nll,
            {"log_input": False, "full": True, "eps": 0.1},
            POSITIVE,
            COUNTS,
        ),
        "gaussian_nll": (fn.gaussian_nll, {}, (OTHERS, POSITIVE), THIRD),
        "gaussian_nll of shared variances": (
            fn.gaussian_nll,
            {"full": True},
            (OTHERS, POSITIVE[:, :1]),
            THIRD[:1],
        ),
        "gaussian_nll of a variance for each row": (
            fn.gaussian_nll,
            {},
            (OTHERS, POSITIVE[:, 0]),
            THIRD,
        ),
        "hinge": (fn.hinge, {}, ROWS, SIGNS),
        "soft_margin": (fn.soft_margin, {}, ROWS, SIGNS),
        "hinge_embedding": (fn.hinge_embedding, {}, ROWS, SIGNS),
        "margin_ranking": (fn.margin_ranking, {"margin": 0.3}, (ROWS, THIRD), SIGNS.long()),
        "cosine_embedding": (
            fn.cosine_embedding,
            {"margin": -0.2},
            (ROWS, THIRD),
            torch.tensor([1, -1, -1, 1, -1]),
        ),
        "cosine_embedding of one": (
            fn.cosine_embedding,
            {},
            (ROWS[0], OTHERS[0]),
            torch.tensor(1.0, dtype=DOUBLE),
        ),
        "multi_margin": (fn.multi_margin, {}, ROWS, CLASSES),
        "multi_margin squared": (
            fn.multi_margin,
            {"p": 2, "margin": 0.7, "weight": weight},
            ROWS,
            CLASSES,
        ),
        "multi_margin of one": (fn.multi_margin, {"weight": weight}, ROWS[0], CLASSES[0]),
        "multilabel_margin": (fn.multilabel_margin, {}, ROWS, LISTED),
        "multilabel_margin of one": (fn.multilabel_margin, {}, ROWS[0], LISTED[0]),
        "multilabel_soft_margin": (
            fn.multilabel_soft_margin,
            {"weight": weight},
            ROWS,
            PROBABILITIES.round().long(),
        ),
        "triplet_margin": (fn.triplet_margin, {}, TRIPLET, None),
        "triplet_margin swapped": (
            fn.triplet_margin,
            {"p": 3.0, "swap": True, "margin": 2.0},
            TRIPLET,
            None,
        ),
        "triplet_margin of one": (
            fn.triplet_margin,
            {"p": 1.5},
            tuple(part[0] for part in TRIPLET),
            None,
        ),
        "triplet_margin_with_distance": (
            fn.triplet_margin_with_distance,
            {"distance_function": manhattan(), "swap": True},
            TRIPLET,
            None,
        ),
    }
    table |= {
        "ctc": (fn.ctc, {}, FRAMES, (LABELS, FRAME_NUMBERS, LONG)),
        "ctc of concatenated targets": (
            fn.ctc,
            {"blank": 4},
            FRAMES,
            (torch.tensor([1, 1, 2, 3, 0, 2]), FRAME_NUMBERS, LONG),
        ),
        "ctc of one": (
            fn.ctc,
            {"zero_infinity": True},
            FRAMES[:, 0],
            {"targets": LABELS[0], "input_lengths": LONG[0] * 2, "target_lengths": LONG[0]},
        ),
    }
    cases = {
        f"{name} {reduction}": (make(**options, reduction=reduction), prediction, target)
        for name, (make, options, prediction, target) in table.items()
        for reduction in ("none", "mean", "sum")
    }
    cases["mse half_mean"] = (fn.mse("half_mean"), ROWS, OTHERS)
    cases["kl_div batchmean"] = (fn.kl_div("batchmean"), ROWS, PROBABILITIES)
    cases["auxiliary"] = (
        fn.losses.auxiliary(fn.mse(), {"balance": 0.3}),
        (ROWS, {"balance": THIRD[0, 0], "other": THIRD[0, 1]}),
        OTHERS,
    )
    return cases


LOSSES = losses(WEIGHT)
