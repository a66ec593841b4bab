"""The optimizers that torch.optim has too, leaf by leaf."""

import torch
from optimizers.case import Case

import funcnet as fn
from funcnet import optimizers as opt

F64 = torch.float64


def exactly(theirs, *args, **options):
    """PyTorch's with its eta, mu and mu_product in float64: it makes them in the default dtype."""

    def make(params):
        optimizer = theirs(params, *args, foreach=False, **options)
        step = optimizer.step

        def float64_step():
            torch.set_default_dtype(F64)
            try:
                step()
            finally:
                torch.set_default_dtype(torch.float32)

        optimizer.step = float64_step
        return optimizer

    return make


def stepped(*transforms):
    """A whole optimizer of transforms, by a rate."""
    return lambda rate: fn.chain(*transforms, opt.scale_by_learning_rate(rate))


CASES = {
    "adam": Case(fn.adam, lambda p: torch.optim.Adam(p, 0.01), converges=0.05),
    "adam amsgrad": Case(
        lambda lr: fn.adam(lr, (0.8, 0.9), 1e-3, 0.1, True, maximize=True),
        lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.9), 1e-3, 0.1, True, maximize=True),
    ),
    "adam decoupled": Case(
        lambda lr: fn.adam(lr, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    ),
    "adam of a schedule": Case(
        lambda lr: fn.adam(lambda step: lr / (1.0 + step.double())),
    ),
    "adamw": Case(
        lambda lr: fn.adamw(lr, weight_decay=1e-4),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=1e-4),
        converges=0.05,
    ),
    "scale_by_adam": Case(stepped(opt.scale_by_adam()), lambda p: torch.optim.Adam(p, 0.01)),
    "sgd": Case(fn.sgd, lambda p: torch.optim.SGD(p, 0.01), converges=2e-3),
    "sgd nesterov": Case(
        lambda lr: fn.sgd(lr, 0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.01, 0.9, nesterov=True),
        converges=1e-3,
    ),
    "sgd options": Case(
        lambda lr: fn.sgd(lr, 0.9, 0.3, 0.1, maximize=True),
        lambda p: torch.optim.SGD(p, 0.01, 0.9, 0.3, 0.1, maximize=True),
    ),
    "adamax": Case(fn.adamax, lambda p: torch.optim.Adamax(p, 0.01), converges=0.05),
    "adamax options": Case(
        lambda lr: fn.adamax(lr, (0.8, 0.9), 1e-3, 0.1, maximize=True),
        lambda p: torch.optim.Adamax(p, 0.01, (0.8, 0.9), 1e-3, 0.1, maximize=True),
    ),
    "nadam": Case(fn.nadam, exactly(torch.optim.NAdam, 0.01), converges=0.01),
    "nadam options": Case(
        lambda lr: fn.nadam(lr, (0.8, 0.9), 1e-3, 0.1, 0.01, True, maximize=True),
        exactly(torch.optim.NAdam, 0.01, (0.8, 0.9), 1e-3, 0.1, 0.01, True, maximize=True),
    ),
    "radam": Case(fn.radam, lambda p: torch.optim.RAdam(p, 0.01), converges=0.025),
    "radam options": Case(
        lambda lr: fn.radam(lr, (0.8, 0.5), 1e-3, 0.1, True, maximize=True),
        lambda p: torch.optim.RAdam(p, 0.01, (0.8, 0.5), 1e-3, 0.1, True, maximize=True),
    ),
    "rmsprop": Case(fn.rmsprop, lambda p: torch.optim.RMSprop(p, 0.01), converges=2e-3),
    "rmsprop options": Case(
        lambda lr: fn.rmsprop(lr, 0.9, 1e-3, 0.1, 0.5, True, maximize=True),
        lambda p: torch.optim.RMSprop(p, 0.01, 0.9, 1e-3, 0.1, 0.5, centered=True, maximize=True),
    ),
    "scale_by_rms unbiased": Case(
        stepped(opt.scale_by_rms(0.999, bias_correction=True)),
        lambda p: torch.optim.Adam(p, 0.01, (0.0, 0.999)),
    ),
    "adagrad": Case(fn.adagrad, lambda p: torch.optim.Adagrad(p, 0.01), converges=0.5),
    "adagrad options": Case(
        lambda lr: fn.adagrad(lr, 0.1, 0.1, 0.5, 1e-3, maximize=True),
        lambda p: torch.optim.Adagrad(p, 0.01, 0.1, 0.1, 0.5, 1e-3, maximize=True),
    ),
    "adadelta": Case(fn.adadelta, lambda p: torch.optim.Adadelta(p, 0.01), converges=0.1),
    "adadelta options": Case(
        lambda lr: fn.adadelta(lr, 0.8, 1e-3, 0.1, maximize=True),
        lambda p: torch.optim.Adadelta(p, 0.01, 0.8, 1e-3, 0.1, maximize=True),
    ),
    "rprop": Case(fn.rprop, lambda p: torch.optim.Rprop(p, 0.01), converges=0.01),
    "rprop options": Case(
        lambda lr: fn.rprop(lr, (0.3, 1.7), (1e-3, 0.02), maximize=True),
        lambda p: torch.optim.Rprop(p, 0.01, (0.3, 1.7), (1e-3, 0.02), maximize=True),
    ),
    "asgd": Case(fn.asgd, exactly(torch.optim.ASGD, 0.01), converges=2e-3),
    "asgd options": Case(
        lambda lr: fn.asgd(lr, 0.1, 0.5, 3, 0.1, maximize=True),
        exactly(torch.optim.ASGD, 0.01, 0.1, 0.5, 3, 0.1, maximize=True),
    ),
}
