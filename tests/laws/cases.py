"""Every layer, combinator, loss and optimizer of the library, with arguments to check them on."""

import cases_activations
import cases_attention
import cases_heads
import cases_implicit
import cases_noise
import cases_norms
import cases_pooling
import cases_positions
import cases_recurrent
import cases_rules
import cases_spatial
import torch
from cases_losses import LOSSES as LOSSES, WEIGHT as WEIGHT, losses as losses

import funcnet as fn

DOUBLE = torch.float64


def draw(seed, *shape):
    return fn.random.normal(fn.key(seed), shape, DOUBLE)


ROWS = draw(1, 5, 6)
IMAGES = draw(2, 2, 4, 6, 6)
PAIR = (ROWS, draw(3, 5, 6))
TOKENS = torch.tensor([[0, 3], [4, 4], [1, 2]])


def in_another(path, pullback):
    """A pullback that another one calls."""
    return fn.Pullback(called_rule, {"": pullback})


@fn.defers
def called_rule(residuals, dy, *, params, x):
    """The pullback in it."""
    return fn.pull(residuals, "", dy, params=params, x=x)


ELEMENTWISE = {
    "relu": fn.relu(),
    "leaky_relu": fn.leaky_relu(0.1),
    "prelu": fn.prelu(),
    "prelu by channel": fn.prelu(6),
    "tanh": fn.tanh(),
    "sigmoid": fn.sigmoid(),
    "gelu": fn.gelu(),
    "gelu tanh": fn.gelu("tanh"),
    "silu": fn.silu(),
    "elu": fn.elu(0.7),
    "celu": fn.celu(0.5),
    "selu": fn.selu(),
    "softplus": fn.softplus(2.0, 3.0),
    "softsign": fn.softsign(),
    "mish": fn.mish(),
    "hardtanh": fn.hardtanh(-0.5, 0.7),
    "hardsigmoid": fn.hardsigmoid(),
    "hardswish": fn.hardswish(),
    "relu6": fn.relu6(),
    "logsigmoid": fn.logsigmoid(),
    "softmax": fn.softmax(0),
    "log_softmax": fn.log_softmax(-1),
    "glu": fn.glu(1),
}

LAYERS = {
    **{name: (layer, ROWS) for name, layer in ELEMENTWISE.items()},
    "prelu of images": (fn.prelu(4), IMAGES),
    "softmax over channels": (fn.softmax(1), IMAGES),
    "linear": (fn.linear(3), ROWS),
    "linear without bias": (fn.linear(3, bias=False), ROWS),
    "linear of a vector": (fn.linear(3), ROWS[0]),
    "linear of a stack": (fn.linear(3), IMAGES),
    "identity": (fn.identity(), ROWS),
    "flatten": (fn.flatten(), IMAGES),
    "unflatten": (fn.unflatten(1, (2, -1)), ROWS),
    "reshape": (fn.reshape(-1, 2, 3), ROWS),
    "permute": (fn.permute(0, 2, 3, 1), IMAGES),
    "select": (fn.select(-2), ROWS),
    "select a slice": (fn.select(slice(1, -1), dim=0), ROWS),
    "split": (fn.split([1, 2, 3]), ROWS),
    "split evenly": (fn.split(4), ROWS),
    "concat": (fn.concat(), PAIR),
    "concat of rows": (fn.concat(0), (ROWS, ROWS[:2])),
    "fan_out": (fn.fan_out(3), ROWS),
    "add": (fn.add(), (*PAIR, ROWS)),
    "multiply": (fn.multiply(), (*PAIR, ROWS)),
    "layer_norm": (fn.layer_norm(), ROWS),
    "layer_norm of images": (fn.layer_norm((6, 6), bias=False), IMAGES),
    "layer_norm without params": (fn.layer_norm(6, elementwise_affine=False), ROWS),
    "batch_norm": (fn.batch_norm(), ROWS),
    "batch_norm of images": (fn.batch_norm(momentum=None), IMAGES),
    "batch_norm without params": (fn.batch_norm(affine=False), ROWS),
    "batch_norm without state": (fn.batch_norm(track_running_stats=False), ROWS),
    "conv2d": (fn.conv2d(2, 3, stride=(2, 1), padding=1), IMAGES),
    "conv2d of groups": (fn.conv2d(8, 2, dilation=2, groups=4, bias=False), IMAGES),
    "conv2d same": (fn.conv2d(2, 4, padding="same"), IMAGES),
    "conv2d reflect": (fn.conv2d(2, 3, padding=2, padding_mode="reflect"), IMAGES),
    "conv2d replicate": (fn.conv2d(2, 3, padding=2, padding_mode="replicate"), IMAGES),
    "conv2d circular": (fn.conv2d(2, 3, padding=(2, 1), padding_mode="circular"), IMAGES),
    "conv2d of an image": (fn.conv2d(2, 3), IMAGES[0]),
    "max_pool2d": (fn.max_pool2d(2), IMAGES),
    "max_pool2d overlapping": (fn.max_pool2d(3, 1, 1, ceil_mode=True), IMAGES),
    "max_pool2d with indices": (fn.max_pool2d(2, return_indices=True), IMAGES[0]),
    "embedding": (fn.embedding(5, 3), TOKENS),
    **cases_heads.LAYERS,
    **cases_positions.LAYERS,
    **cases_spatial.LAYERS,
    **cases_noise.LAYERS,
    **cases_norms.LAYERS,
    **cases_activations.LAYERS,
    **cases_pooling.LAYERS,
    **cases_attention.LAYERS,
    **cases_recurrent.LAYERS,
    **cases_rules.LAYERS,
}

COMBINATORS = {
    "serial": (fn.serial(fn.linear(4), fn.tanh(), fn.linear(2)), ROWS),
    "serial of nothing": (fn.serial(), ROWS),
    "serial of all kinds": (
        fn.serial(
            hidden=fn.linear(4),
            norm=fn.batch_norm(),
            act=fn.gelu(),
            noise=fn.dropout(0.3),
            head=fn.serial(fn.linear(3), fn.dropout(0.1), fn.linear(2)),
        ),
        ROWS,
    ),
    "serial of images": (
        fn.serial(fn.conv2d(3, 3), fn.relu(), fn.max_pool2d(2), fn.flatten(), fn.linear(2)),
        IMAGES,
    ),
    "serial of tokens": (fn.serial(fn.embedding(5, 3), fn.flatten(), fn.linear(2)), TOKENS),
    "parallel": (fn.parallel(fn.linear(2), fn.dropout(0.3)), PAIR),
    "parallel by name": (
        fn.parallel(a=fn.linear(2), b=fn.batch_norm()),
        {"a": PAIR[0], "b": PAIR[1]},
    ),
    "parallel of tokens": (
        fn.serial(
            fn.parallel(fn.linear(3), fn.serial(fn.embedding(5, 3, dtype=DOUBLE), fn.select(0, 1))),
            fn.add(),
        ),
        (ROWS[:3], TOKENS),
    ),
    "branch": (fn.serial(fn.branch(fn.linear(2), fn.identity()), fn.concat()), ROWS),
    "branch by name": (fn.branch(value=fn.linear(1), policy=fn.linear(3)), ROWS),
    "fan out and join": (
        fn.serial(fn.fan_out(2), fn.parallel(fn.tanh(), fn.sigmoid()), fn.multiply()),
        ROWS,
    ),
    "residual": (fn.residual(fn.serial(fn.linear(6), fn.dropout(0.2), fn.batch_norm())), ROWS),
    "shared": (fn.shared(fn.serial(fn.linear(2), fn.batch_norm(), fn.dropout(0.2))), PAIR),
    "siamese": (fn.serial(fn.shared(fn.linear(3)), fn.concat(), fn.linear(1)), PAIR),
    "with_pullbacks": (
        fn.with_pullbacks(fn.serial(fn.linear(4), fn.residual(fn.gelu())), in_another),
        ROWS,
    ),
    "remat": (fn.remat(fn.serial(fn.linear(4), fn.batch_norm(), fn.dropout(0.2))), ROWS),
    "remat within": (
        fn.serial(fn.remat(fn.serial(fn.linear(4), fn.tanh())), fn.remat(fn.linear(2))),
        ROWS,
    ),
    "remat but for some": (
        fn.remat(
            fn.serial(
                fn.linear(4),
                fn.tanh(),
                fn.residual(fn.serial(fn.dropout(0.3), fn.linear(4))),
                fn.batch_norm(),
                fn.linear(2),
            ),
            policy=["1", "2.1"],
        ),
        ROWS,
    ),
    "remat of images": (fn.remat(fn.serial(fn.conv2d(3, 3), fn.relu())), IMAGES),
    "checkpointed": (
        fn.checkpointed(fn.serial(fn.linear(4), fn.tanh(), fn.dropout(0.2), fn.linear(2)), 3),
        ROWS,
    ),
    "reversible": (
        fn.reversible(*[(fn.linear(6), fn.serial(fn.tanh(), fn.dropout(0.2)))] * 2),
        PAIR,
    ),
    "reversible halves": (fn.reversible((fn.linear(3), fn.batch_norm()), dim=1), ROWS),
    "compressed by bits": (
        fn.compressed(fn.serial(fn.linear(4), fn.relu(), fn.dropout(0.2), fn.tanh()), "bit"),
        ROWS,
    ),
    "repeat": (
        fn.repeat(fn.serial(fn.linear(6), fn.batch_norm(), fn.tanh(), fn.dropout(0.2)), 3),
        ROWS,
    ),
    "stacked": (fn.stacked(fn.serial(fn.linear(3), fn.batch_norm(), fn.dropout(0.2)), 2), IMAGES),
    "stacked tuples": (fn.stacked(fn.add(), 5), PAIR),
    "experts": (fn.experts(fn.linear(4), fn.linear(3), n=4), ROWS),
    "experts with a capacity": (
        fn.experts(fn.linear(2), {"a": fn.linear(6), "b": fn.tanh()}, top_k=2, capacity=0.5),
        IMAGES,
    ),
    "tie": (
        fn.tie(
            fn.serial(embed=fn.embedding(5, 3, dtype=DOUBLE), act=fn.tanh(), head=fn.linear(5)),
            {"head.weight": "embed.weight"},
        ),
        TOKENS,
    ),
    "tie of halves": (
        fn.tie(fn.serial(fn.linear(6), fn.tanh(), fn.linear(6)), {"2.weight": "0.weight"}),
        ROWS,
    ),
    "freeze": (
        fn.freeze(
            fn.serial(fn.linear(4), fn.batch_norm(), fn.dropout(0.2), fn.linear(2)),
            ["0", "3.weight"],
        ),
        ROWS,
    ),
    "freeze of all": (fn.freeze(fn.linear(4), lambda path: True), ROWS),
    "cast": (fn.cast(fn.serial(fn.linear(4), fn.batch_norm(), fn.tanh()), DOUBLE), ROWS),
    "lora": (
        fn.lora(fn.serial(fn.linear(4), fn.batch_norm(), fn.tanh(), fn.linear(2)), 2, 3.0),
        ROWS,
    ),
    "lora of a convolution": (
        fn.lora(fn.serial(fn.conv2d(3, 2), fn.flatten(), fn.linear(2)), 2, where=["0.weight"]),
        IMAGES,
    ),
    "weight_norm": (fn.weight_norm(fn.linear(3)), ROWS),
    "weight_norm of the whole": (fn.weight_norm(fn.linear(3), dim=None), ROWS),
    "weight_norm within": (
        fn.weight_norm(fn.serial(fn.conv2d(3, 2), fn.relu()), "0.weight", dim=1),
        IMAGES,
    ),
    "spectral_norm": (fn.spectral_norm(fn.linear(3)), ROWS),
    "spectral_norm of a convolution": (
        fn.spectral_norm(fn.conv_transpose2d(3, 2), n_power_iterations=2),
        IMAGES,
    ),
    "spectral_norm within": (
        fn.serial(fn.spectral_norm(fn.serial(fn.linear(3), fn.batch_norm()), "1.weight")),
        ROWS,
    ),
    **cases_implicit.COMBINATORS,
    "detect_nonfinite": (fn.detect_nonfinite(fn.serial(fn.linear(3), fn.tanh())), ROWS),
}
# Its values are read, which vmap cannot.
EAGER_ONLY = {"detect_nonfinite"}

PARAMS = {
    "0": {"weight": draw(6, 4, 3), "bias": draw(7, 4)},
    "1": {"scale": draw(8)},
    "2": {"weight": draw(9, 2, 0)},
}
OPTIMIZERS = {
    "sgd": (fn.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd of all options": (
        fn.sgd(0.1, 0.9, 0.2, 0.01, maximize=True),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, 0.2, 0.01, maximize=True),
    ),
    "sgd nesterov": (
        fn.sgd(0.1, 0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True),
    ),
    "sgd of a tensor": (fn.sgd(torch.tensor(0.1)), lambda p: torch.optim.SGD(p, torch.tensor(0.1))),
    "sgd of a schedule": (fn.sgd(lambda step: 0.1 * 0.9**step), None),
    "adam": (fn.adam(0.1), lambda p: torch.optim.Adam(p, 0.1)),
    "adam amsgrad": (
        fn.adam(0.1, (0.8, 0.95), 1e-3, 0.1, amsgrad=True),
        lambda p: torch.optim.Adam(p, 0.1, (0.8, 0.95), 1e-3, 0.1, amsgrad=True),
    ),
    "adamw": (fn.adamw(0.1), lambda p: torch.optim.AdamW(p, 0.1)),
    "rmsprop": (fn.rmsprop(0.1), lambda p: torch.optim.RMSprop(p, 0.1)),
    "rmsprop centered": (
        fn.rmsprop(0.1, 0.9, 1e-3, 0.1, 0.9, centered=True),
        lambda p: torch.optim.RMSprop(p, 0.1, 0.9, 1e-3, 0.1, 0.9, centered=True),
    ),
    "signsgd": (fn.signsgd(0.1), None),
    "signum": (fn.signsgd(0.1, 0.9, 0.1), None),
    "scale": (fn.optimizers.scale(0.5), None),
    "negate": (fn.optimizers.negate(), None),
    "trace": (fn.optimizers.trace(0.9), None),
    "chain of nothing": (fn.chain(), None),
}
