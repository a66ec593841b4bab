"""The transforms, and the optimizers around others."""

import torch
from optimizers.case import Case

import funcnet as fn
from funcnet import optimizers as opt


def stepped(*transforms):
    """A whole optimizer of transforms, by a rate."""
    return lambda rate: fn.chain(*transforms, opt.scale_by_learning_rate(rate))


CASES = {
    "trace": Case(stepped(opt.trace(0.9)), lambda p: torch.optim.SGD(p, 0.01, 0.9), converges=5e-4),
    "scale": Case(opt.scale),
    "negate": Case(lambda rate: opt.negate()),
    "scale_by_learning_rate": Case(opt.scale_by_learning_rate, lambda p: torch.optim.SGD(p, 0.01)),
    "scale_by_learning_rate of a schedule": Case(
        lambda rate: opt.scale_by_learning_rate(lambda step: rate / (step.double() + 1))
    ),
    "add_decayed_weights": Case(
        stepped(opt.add_decayed_weights(0.1)),
        lambda p: torch.optim.SGD(p, 0.01, weight_decay=0.1),
    ),
    "add_decayed_weights of a tensor": Case(opt.add_decayed_weights),
    "masked": Case(lambda rate: opt.masked(fn.adam(rate), lambda path: path)),
}
