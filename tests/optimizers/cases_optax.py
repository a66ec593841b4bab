"""The optimizers that optax has and torch.optim lacks; test_optax.py compares their numbers."""

import torch
from optimizers.case import Case

import funcnet as fn
from funcnet import optimizers as opt


def schedule(rate):
    return lambda step: rate / (1.0 + 0.01 * step.double())


def curved(rate):
    """Sophia whose estimate of the Hessian is there from the start: it is given as the state."""
    optimizer = fn.sophia(rate, weight_decay=1e-4)

    def init_state(params):
        estimate = fn.tree.map(lambda leaf: torch.full_like(leaf, 1e4), params)
        return opt.refresh_hessian(optimizer.init_state(params), estimate)

    told = optimizer.name, optimizer.update_leaves
    return fn.Optimizer(init_state, optimizer.update, *told, elementwise=True)


CASES = {
    "lion": Case(lambda lr: fn.lion(schedule(lr), weight_decay=0.0), converges=0.01),
    "lion options": Case(lambda lr: fn.lion(lr, (0.7, 0.9), 0.1, maximize=True)),
    "signsgd": Case(lambda lr: fn.signsgd(schedule(lr), 0.9), converges=0.01),
    "signsgd options": Case(lambda lr: fn.signsgd(lr, 0.9, 0.1, maximize=True)),
    "lamb": Case(lambda lr: fn.lamb(schedule(lr)), converges=0.05),
    "lamb options": Case(lambda lr: fn.lamb(lr, (0.8, 0.9), 1e-3, 0.1, maximize=True)),
    "lars": Case(lambda lr: fn.lars(schedule(lr)), converges=5.0),
    "lars options": Case(lambda lr: fn.lars(lr, 0.1, 0.02, 0.01, 0.8, True, maximize=True)),
    "scale_by_trust_ratio": Case(lambda lr: opt.scale_by_trust_ratio(0.5, lr, 0.1)),
    "schedule_free_sgd": Case(fn.schedule_free_sgd, converges=0.01),
    "schedule_free_sgd options": Case(
        lambda lr: fn.schedule_free_sgd(lr, 3, 0.8, 0.1, 1.0, maximize=True)
    ),
    "schedule_free_adamw": Case(fn.schedule_free_adamw, converges=0.1),
    "schedule_free_adamw options": Case(
        lambda lr: fn.schedule_free_adamw(lr, 3, (0.8, 0.9), 1e-3, 0.1, 1.0, maximize=True)
    ),
    "schedule_free": Case(lambda lr: fn.schedule_free(fn.rmsprop(lr), lr), converges=0.02),
    "sophia": Case(lambda lr: fn.sophia(schedule(lr), weight_decay=0.0), converges=0.02),
    "sophia of a Hessian": Case(curved),
    "sophia options": Case(
        lambda lr: fn.sophia(lr, (0.8, 0.9), 1e-3, 0.1, 0.05, None, maximize=True)
    ),
}
