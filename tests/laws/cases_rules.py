"""Layers whose backward rule is not the derivative, for the laws that they keep."""

import torch

import funcnet as fn


def draw(seed, *shape):
    return fn.random.normal(fn.key(seed), shape, torch.float64)


ROWS = draw(1, 5, 6)
IMAGES = draw(2, 2, 4, 6, 6)


def doubled_rule(residuals, dy, *, params, x):
    """The layer's dparams, and twice its dx."""
    dparams, dx = fn.pull(residuals, "pullback", dy, params=params, x=x)
    return dparams, 2 * dx if x else None


def masked_rule(residuals, dy, bound, *, params, x):
    """A rule that reads all there is."""
    mask = residuals["mask"] * (residuals["x"] < bound) * residuals["params"]["weight"][0, 0]
    noise = 0.0 if residuals["key"] is None else fn.random.normal(residuals["key"])
    dx = mask + noise.to(mask.dtype) if residuals["key"] is not None else mask
    dweight = residuals["y"].sum() + dy.sum() * residuals["params"]["weight"]
    return {"weight": dweight, "bias": dy.sum(0)}, dx


def mask(key, params, x):
    return {"mask": fn.random.uniform(key, x.shape[-1:], x.dtype, device=x.device)}


def gaussian(x):
    return torch.exp(-x * x)


def halved(dy, *, x):
    return fn.tree.map(lambda cotangent, value: 0.5 * cotangent * (value > 0), dy, x)


LAYERS = {
    "with_rule": (fn.with_rule(fn.serial(fn.linear(3), fn.dropout(0.2)), doubled_rule), ROWS),
    "with_rule that reads all": (
        fn.with_rule(
            fn.linear(3),
            masked_rule,
            0.5,
            reads=("params", "x", "y", "state", "key"),
            init=mask,
            breaks=("derivative", "linear"),
        ),
        ROWS,
    ),
    "cotangent": (fn.cotangent(halved, reads=("x",)), ROWS),
    "reverse_gradient": (fn.reverse_gradient(0.3), ROWS),
    "reverse_gradient of a tuple": (fn.reverse_gradient(), (ROWS, torch.tensor([1, 2]))),
    "stop_gradient": (fn.serial(fn.linear(3), fn.stop_gradient(), fn.linear(2)), ROWS),
    "clip_cotangent": (fn.clip_cotangent(0.5), ROWS),
    "noise_cotangent": (fn.noise_cotangent(0.5), ROWS),
    "straight_through": (fn.straight_through(torch.round), ROWS),
    "straight_through of a surrogate": (fn.straight_through(torch.sign, gaussian), ROWS),
    "feedback_alignment": (
        fn.feedback_alignment(
            fn.serial(fn.linear(4), fn.batch_norm(), fn.tanh(), fn.dropout(0.2), fn.linear(2))
        ),
        ROWS,
    ),
    "feedback_alignment of images": (
        fn.feedback_alignment(fn.serial(fn.conv2d(3, 3), fn.relu(), fn.flatten(), fn.linear(2))),
        IMAGES,
    ),
    "feedback_alignment in time": (fn.feedback_alignment(fn.lstm(3)), IMAGES[0]),
    "sign_symmetric": (
        fn.sign_symmetric(fn.residual(fn.serial(fn.linear(4), fn.tanh(), fn.linear(6)))),
        ROWS,
    ),
    "guided_backprop": (
        fn.guided_backprop(fn.serial(fn.linear(4), fn.relu(), fn.linear(2))),
        ROWS,
    ),
    "deconvnet": (fn.deconvnet(fn.serial(fn.conv2d(3, 3), fn.relu())), IMAGES),
}
