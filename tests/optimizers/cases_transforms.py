"""The transforms, and the optimizers around others."""

import torch
from optimizers.case import Case

import funcnet as fn
from funcnet import optimizers as opt


def stepped(*transforms):
    """A whole optimizer of transforms, by a rate."""
    return lambda rate: fn.chain(*transforms, opt.scale_by_learning_rate(rate))


def momentum(lr, decay=0.9):
    return fn.chain(opt.trace(decay), opt.scale_by_learning_rate(lr))


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
    "add_decayed_weights of some": Case(
        stepped(opt.add_decayed_weights(0.1, mask=lambda path: path))
    ),
    "ema": Case(stepped(opt.ema(0.9)), converges=5e-3),
    "ema with bias": Case(stepped(opt.ema(0.9, debias=False))),
    "ema of a tensor": Case(lambda rate: opt.ema(10 * rate)),
    "clip": Case(stepped(opt.clip(0.3), opt.trace(0.9)), converges=1e-3),
    "clip of a tensor": Case(opt.clip),
    "clip_by_global_norm": Case(stepped(opt.clip_by_global_norm(0.5)), converges=5e-3),
    "clip_by_global_norm of a tensor": Case(opt.clip_by_global_norm),
    "clip_by_global_norm, greatest": Case(stepped(opt.clip_by_global_norm(0.5, torch.inf))),
    "clip_by_block_rms": Case(stepped(opt.clip_by_block_rms(0.5)), converges=5e-3),
    "clip_by_block_rms of a tensor": Case(opt.clip_by_block_rms),
    "adaptive_grad_clip": Case(stepped(opt.adaptive_grad_clip(0.1))),
    "adaptive_grad_clip of tensors": Case(lambda rate: opt.adaptive_grad_clip(rate, rate)),
    "normalize": Case(stepped(opt.normalize()), converges=5e-3),
    "centralize": Case(stepped(opt.centralize())),
    "zero_nans": Case(stepped(opt.zero_nans())),
    "set_to_zero": Case(lambda rate: opt.set_to_zero()),
    "add_noise": Case(stepped(opt.add_noise(0.01, 0.55, fn.key(3)))),
    "add_noise of tensors": Case(lambda rate: opt.add_noise(rate, rate, fn.key(3))),
    "masked": Case(lambda rate: opt.masked(fn.adam(rate), lambda path: path)),
    "partition": Case(
        lambda rate: opt.partition(
            {"first": fn.adam(rate), "rest": fn.sgd(rate, 0.5)},
            {"first": lambda path: path < "b", "rest": lambda path: path >= "b"},
        ),
    ),
    "accumulate": Case(lambda rate: opt.accumulate(fn.adam(rate), 2), converges=0.02),
    "accumulate of one": Case(
        lambda rate: opt.accumulate(fn.adamw(rate), 1), lambda p: torch.optim.AdamW(p, 0.01)
    ),
    "apply_if_finite": Case(
        lambda rate: opt.apply_if_finite(fn.adamw(rate), 3),
        lambda p: torch.optim.AdamW(p, 0.01),
    ),
    "lookahead": Case(lambda rate: opt.lookahead(fn.adam(rate), 2, 0.6), converges=0.02),
    "lookahead of a tensor": Case(lambda rate: opt.lookahead(fn.sgd(0.1), 2, rate)),
    "lookahead of one": Case(
        lambda rate: opt.lookahead(fn.adam(rate), 1, 1.0), lambda p: torch.optim.Adam(p, 0.01)
    ),
    "inject_hyperparams": Case(
        lambda rate: opt.inject_hyperparams(momentum)(rate, 0.9),
        lambda p: torch.optim.SGD(p, 0.01, 0.9),
        converges=5e-4,
    ),
    "inject_hyperparams of schedules": Case(
        lambda rate: opt.inject_hyperparams(momentum)(
            lambda step: rate / (step.double() + 1), decay=lambda step: 1 - 0.5 ** (step + 1.0)
        )
    ),
    "wrappers within wrappers": Case(
        lambda rate: opt.apply_if_finite(
            opt.lookahead(opt.accumulate(fn.chain(opt.clip_by_global_norm(1.0), fn.adam(rate)), 2)),
            3,
        )
    ),
}
