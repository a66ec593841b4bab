"""Optimizers that keep averages of the params."""

from optimizers.case import Case

import funcnet as fn
from funcnet import optimizers as opt

CASES = {
    "params_ema": Case(lambda rate: opt.params_ema(fn.sgd(rate, momentum=0.9)), converges=5e-4),
    "params_ema debiased": Case(lambda rate: opt.params_ema(fn.adam(rate), 0.9, debias=True)),
    "params_average": Case(lambda rate: opt.params_average(fn.adam(rate), start=1, every=2)),
}
