"""The optimizers that see a leaf's shape: Adafactor, Muon, Shampoo, SOAP."""

import math
from functools import partial

import torch
from optimizers.case import Case

import funcnet as fn
from funcnet import optimizers as opt


def as_matrices(optimizer):
    """An optimizer of matrices, for leaves of any shape: of each it sees (first axis, the rest)."""

    def matrix(leaf):
        rows = leaf.shape[0] if leaf.dim() else 1
        return leaf.reshape(rows, math.prod(leaf.shape[1:]))

    def update(grads, opt_state, params):
        updates, opt_state = optimizer.update(
            fn.tree.map(matrix, grads), opt_state, fn.tree.map(matrix, params)
        )
        return fn.tree.map(lambda u, p: u.reshape(p.shape), updates, params), opt_state

    def init_state(params):
        return optimizer.init_state(fn.tree.map(matrix, params))

    return fn.Optimizer(init_state, update, optimizer.name)


def muon(rate, **options):
    return as_matrices(fn.muon(rate, **options))


CASES = {
    "adafactor": Case(
        fn.adafactor, lambda p: torch.optim.Adafactor(p, 0.01, foreach=False), converges=0.1
    ),
    "adafactor with every option": Case(
        partial(
            fn.adafactor, beta2_decay=-0.6, eps=(1e-3, 0.1), d=1.5, weight_decay=0.1, maximize=True
        ),
        lambda p: torch.optim.Adafactor(
            p, 0.01, -0.6, (1e-3, 0.1), 1.5, 0.1, foreach=False, maximize=True
        ),
    ),
    "adafactor of a schedule": Case(
        lambda rate: fn.adafactor(lambda step: rate / (step.double() + 1))
    ),
    "scale_by_factored_rms": Case(lambda rate: opt.scale_by_factored_rms()),
    "muon": Case(partial(muon, ns_dtype=None, weight_decay=0.0), converges=0.01),
    "muon with every option": Case(
        partial(
            muon,
            weight_decay=0.2,
            momentum=0.8,
            nesterov=False,
            ns_coefficients=(3.4, -4.7, 2.0),
            eps=1e-3,
            ns_steps=3,
            adjust_lr_fn="match_rms_adamw",
            ns_dtype=None,
        )
    ),
    "scale_by_muon": Case(lambda rate: as_matrices(opt.scale_by_muon(ns_dtype=None))),
    "shampoo": Case(fn.shampoo, converges=0.1),
    "shampoo with every option": Case(
        partial(
            fn.shampoo,
            momentum=0.5,
            weight_decay=0.1,
            eps=1e-3,
            beta2=0.9,
            precondition_frequency=2,
            max_precond_dim=2,
            maximize=True,
        )
    ),
    "scale_by_shampoo": Case(lambda rate: opt.scale_by_shampoo()),
    "soap": Case(fn.soap, converges=0.03),
    "soap with every option": Case(
        partial(
            fn.soap,
            betas=(0.9, 0.99),
            shampoo_beta=0.8,
            eps=1e-3,
            weight_decay=0.1,
            precondition_frequency=1,
            max_precond_dim=2,
            precondition_1d=True,
            normalize_grads=True,
            correct_bias=False,
            maximize=True,
        )
    ),
    "scale_by_soap": Case(lambda rate: opt.scale_by_soap(precondition_frequency=2)),
}
