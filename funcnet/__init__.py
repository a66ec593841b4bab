"""funcnet: deep learning in which training is a pure function.

The protocol is in `funcnet.core`; all public names are here.
"""

from funcnet import initializers, random, testing, tree
from funcnet.combinators import branch, parallel, residual, serial, shared
from funcnet.core import (
    Layer,
    Loss,
    LossPullback,
    Optimizer,
    Params,
    Pullback,
    TrainState,
    Tree,
    map_layers,
    stateless,
)
from funcnet.data import epoch_batches
from funcnet.finite import check_finite
from funcnet.layers.activations import (
    celu,
    elu,
    gelu,
    glu,
    hardsigmoid,
    hardswish,
    hardtanh,
    leaky_relu,
    log_softmax,
    logsigmoid,
    mish,
    prelu,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    softmax,
    softplus,
    softsign,
    tanh,
)
from funcnet.layers.conv import conv2d
from funcnet.layers.dropout import dropout
from funcnet.layers.embedding import embedding
from funcnet.layers.linear import linear
from funcnet.layers.norm import batch_norm, layer_norm
from funcnet.layers.pooling import max_pool2d
from funcnet.layers.shape import (
    concat,
    flatten,
    identity,
    permute,
    reshape,
    select,
    split,
    unflatten,
)
from funcnet.layers.tuples import add, fan_out, multiply
from funcnet.losses import (
    bce,
    bce_with_logits,
    cross_entropy,
    hinge,
    huber,
    kl_div,
    mae,
    mse,
    nll,
    smooth_l1,
)
from funcnet.optimizers.optimizers import adam, adamw, rmsprop, sgd, signsgd
from funcnet.optimizers.transforms import (
    add_decayed_weights,
    apply_updates,
    chain,
    negate,
    scale,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_rms,
    scale_by_sign,
    trace,
)
from funcnet.random import fold_in, key
from funcnet.summary import summary
from funcnet.train import init_train_state, train_step, value_and_grad
from funcnet.transforms.jit import jit
from funcnet.transforms.remat import remat
from funcnet.transforms.scan import fori, scan
from funcnet.transforms.vmap import vmap

__version__ = "0.1.0"

__all__ = [
    "Layer",
    "Loss",
    "LossPullback",
    "Optimizer",
    "Params",
    "Pullback",
    "TrainState",
    "Tree",
    "adam",
    "adamw",
    "add",
    "add_decayed_weights",
    "apply_updates",
    "batch_norm",
    "bce",
    "bce_with_logits",
    "branch",
    "celu",
    "chain",
    "check_finite",
    "concat",
    "conv2d",
    "cross_entropy",
    "dropout",
    "elu",
    "embedding",
    "epoch_batches",
    "fan_out",
    "flatten",
    "fold_in",
    "fori",
    "gelu",
    "glu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "hinge",
    "huber",
    "identity",
    "init_train_state",
    "initializers",
    "jit",
    "key",
    "kl_div",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "logsigmoid",
    "mae",
    "map_layers",
    "max_pool2d",
    "mish",
    "mse",
    "multiply",
    "negate",
    "nll",
    "parallel",
    "permute",
    "prelu",
    "random",
    "relu",
    "relu6",
    "remat",
    "reshape",
    "residual",
    "rmsprop",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_rms",
    "scale_by_sign",
    "scan",
    "select",
    "selu",
    "serial",
    "sgd",
    "shared",
    "sigmoid",
    "signsgd",
    "silu",
    "smooth_l1",
    "softmax",
    "softplus",
    "softsign",
    "split",
    "stateless",
    "summary",
    "tanh",
    "testing",
    "trace",
    "train_step",
    "tree",
    "unflatten",
    "value_and_grad",
    "vmap",
]
