"""funcnet: deep learning in which training is a pure function.

The protocol is in `funcnet.core`; all public names are here, each once. ``import a as a`` tells
type checkers that a name is public.
"""

from funcnet import (
    initializers as initializers,
    losses as losses,
    optimizers as optimizers,
    random as random,
    testing as testing,
    tree as tree,
)
from funcnet.combinators.combine import (
    combine as combine,
)
from funcnet.combinators.parallel import (
    branch as branch,
    parallel as parallel,
)
from funcnet.combinators.residual import (
    residual as residual,
)
from funcnet.combinators.serial import (
    serial as serial,
)
from funcnet.combinators.shared import (
    shared as shared,
)
from funcnet.core import (
    Layer as Layer,
    Loss as Loss,
    LossPullback as LossPullback,
    Optimizer as Optimizer,
    Params as Params,
    Pullback as Pullback,
    TrainState as TrainState,
    Tree as Tree,
    map_layers as map_layers,
    sum_cotangents as sum_cotangents,
    wrap as wrap,
)
from funcnet.data import (
    epoch_batches as epoch_batches,
)
from funcnet.finite import (
    detect_nonfinite as detect_nonfinite,
)
from funcnet.layers.activations import (
    celu as celu,
    elu as elu,
    gelu as gelu,
    logsigmoid as logsigmoid,
    mish as mish,
    selu as selu,
    sigmoid as sigmoid,
    silu as silu,
    softplus as softplus,
    softsign as softsign,
    tanh as tanh,
    tanhshrink as tanhshrink,
)
from funcnet.layers.batch_norm import (
    batch_norm as batch_norm,
)
from funcnet.layers.conv import (
    conv2d as conv2d,
)
from funcnet.layers.dropout import (
    dropout as dropout,
)
from funcnet.layers.embedding import (
    embedding as embedding,
)
from funcnet.layers.gated import (
    glu as glu,
)
from funcnet.layers.group_norm import (
    group_norm as group_norm,
)
from funcnet.layers.instance_norm import (
    instance_norm as instance_norm,
    instance_norm1d as instance_norm1d,
    instance_norm2d as instance_norm2d,
    instance_norm3d as instance_norm3d,
)
from funcnet.layers.layer_norm import (
    layer_norm as layer_norm,
    rms_norm as rms_norm,
)
from funcnet.layers.linear import (
    linear as linear,
)
from funcnet.layers.piecewise import (
    hardshrink as hardshrink,
    hardsigmoid as hardsigmoid,
    hardswish as hardswish,
    hardtanh as hardtanh,
    leaky_relu as leaky_relu,
    relu as relu,
    relu6 as relu6,
    softshrink as softshrink,
    threshold as threshold,
)
from funcnet.layers.pooling import (
    max_pool2d as max_pool2d,
)
from funcnet.layers.prelu import (
    prelu as prelu,
)
from funcnet.layers.response_norm import (
    cross_map_lrn as cross_map_lrn,
    local_response_norm as local_response_norm,
)
from funcnet.layers.rrelu import (
    rrelu as rrelu,
)
from funcnet.layers.shape import (
    concat as concat,
    flatten as flatten,
    identity as identity,
    permute as permute,
    reshape as reshape,
    select as select,
    split as split,
    unflatten as unflatten,
)
from funcnet.layers.softmax import (
    log_softmax as log_softmax,
    softmax as softmax,
    softmax2d as softmax2d,
    softmin as softmin,
)
from funcnet.layers.tuples import (
    add as add,
    fan_out as fan_out,
    multiply as multiply,
)
from funcnet.lift import (
    elementwise as elementwise,
    parameterless as parameterless,
    stateful as stateful,
    stateless as stateless,
)
from funcnet.losses import (
    bce as bce,
    bce_with_logits as bce_with_logits,
    cross_entropy as cross_entropy,
    hinge as hinge,
    huber as huber,
    kl_div as kl_div,
    mae as mae,
    mse as mse,
    nll as nll,
    smooth_l1 as smooth_l1,
)
from funcnet.optimizers import (
    adam as adam,
    adamw as adamw,
    apply_updates as apply_updates,
    chain as chain,
    rmsprop as rmsprop,
    sgd as sgd,
    signsgd as signsgd,
)
from funcnet.params import (
    Param as Param,
    State as State,
    declare as declare,
)
from funcnet.random import (
    fold_in as fold_in,
    key as key,
)
from funcnet.summary import (
    summary as summary,
)
from funcnet.train import (
    init_train_state as init_train_state,
    train_step as train_step,
    value_and_grad as value_and_grad,
)
from funcnet.transforms.jit import (
    jit as jit,
)
from funcnet.transforms.remat import (
    remat as remat,
)
from funcnet.transforms.scan import (
    fori as fori,
    scan as scan,
)
from funcnet.transforms.vmap import (
    vmap as vmap,
)

__version__ = "0.1.0"
