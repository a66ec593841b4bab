"""Deep learning on PyTorch tensors in which training is a pure function.

Layers, losses and optimizers are small tuples of pure functions. Parameters, state, gradients and
residuals are trees of tensors. A training step takes a value and returns one, so that it can be
compiled, looped and mapped over a population.

>>> import funcnet as fn
>>> x = fn.random.uniform(fn.key(1), (100, 2))
>>> target = ((x - 0.5).norm(dim=1) < 0.4).long()
>>> net = fn.serial(fn.linear(25), fn.tanh(), fn.linear(2))
>>> optimizer = fn.adam(1e-2)
>>> step = fn.train_step(net, fn.cross_entropy(), optimizer)
>>> train_state = fn.init_train_state(net, optimizer, fn.key(0), x)
>>> train_state, metrics = step(train_state, (x, target))
"""

# ``import a as a`` tells type checkers that a name is public.
from funcnet import (
    checkpoint as checkpoint,
    core as _core,
    distributed as distributed,
    initializers as initializers,
    interop as interop,
    losses as losses,
    metrics as metrics,
    optimizers as optimizers,
    random as random,
    reference as _reference,
    testing as testing,
    tree as tree,
)
from funcnet.backward.curvature.kfac_training import (
    KfacGradients as KfacGradients,
    KfacState as KfacState,
    adapt_damping as adapt_damping,
    kfac as kfac,
    kfac_train_step as kfac_train_step,
)
from funcnet.backward.curvature.kronecker import (
    KroneckerFactors as KroneckerFactors,
    kronecker_factors as kronecker_factors,
)
from funcnet.backward.equations.figures import (
    solver_figures as solver_figures,
)
from funcnet.backward.equations.implicit import (
    fixed_point as fixed_point,
)
from funcnet.backward.equations.ode import (
    neural_ode as neural_ode,
)
from funcnet.backward.higher import (
    hvp as hvp,
    jvp as jvp,
)
from funcnet.backward.layer_by_layer import (
    clipped_train_step as clipped_train_step,
    clipped_update as clipped_update,
    gradient_norm as gradient_norm,
)
from funcnet.backward.memory.compressed_residuals import (
    compressed as compressed,
)
from funcnet.backward.memory.reversible_pairs import (
    reversible as reversible,
)
from funcnet.backward.per_example.examples_of import (
    example_gradients as example_gradients,
    example_norms as example_norms,
    weighted as weighted,
)
from funcnet.backward.per_example.forward_examples import (
    defer_examples as defer_examples,
)
from funcnet.backward.privacy.accountant import (
    private_epsilon as private_epsilon,
    private_noise as private_noise,
)
from funcnet.backward.privacy.poisson import (
    PoissonBatch as PoissonBatch,
    poisson_batch as poisson_batch,
    poisson_capacity as poisson_capacity,
)
from funcnet.backward.privacy.private_steps import (
    private_value_and_grad as private_value_and_grad,
)
from funcnet.backward.rules.cotangents import (
    clip_cotangent as clip_cotangent,
    noise_cotangent as noise_cotangent,
    reverse_gradient as reverse_gradient,
    stop_gradient as stop_gradient,
    straight_through as straight_through,
)
from funcnet.backward.rules.feedback import (
    feedback_alignment as feedback_alignment,
    sign_symmetric as sign_symmetric,
)
from funcnet.backward.rules.other_rules import (
    cotangent as cotangent,
    with_rule as with_rule,
)
from funcnet.backward.rules.saliency import (
    deconvnet as deconvnet,
    guided_backprop as guided_backprop,
)
from funcnet.backward.walkers import (
    map_pullbacks as map_pullbacks,
    with_pullbacks as with_pullbacks,
)
from funcnet.checkpoint import (
    load as load,
    save as save,
)
from funcnet.combinators.cast import (
    cast as cast,
)
from funcnet.combinators.combine import (
    combine as combine,
)
from funcnet.combinators.experts import (
    experts as experts,
)
from funcnet.combinators.freeze import (
    freeze as freeze,
)
from funcnet.combinators.lora import (
    lora as lora,
)
from funcnet.combinators.parallel import (
    branch as branch,
    parallel as parallel,
)
from funcnet.combinators.reparametrize import (
    reparametrize as reparametrize,
)
from funcnet.combinators.repeat import (
    repeat as repeat,
    stacked as stacked,
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
from funcnet.combinators.tie import (
    tie as tie,
)
from funcnet.combinators.weight_norm import (
    spectral_norm as spectral_norm,
    weight_norm as weight_norm,
)
from funcnet.control_flow import (
    cond as cond,
    fori as fori,
    scan as scan,
    switch as switch,
    while_loop as while_loop,
)
from funcnet.core import (
    Layer as Layer,
    Loss as Loss,
    LossPullback as LossPullback,
    Optimizer as Optimizer,
    Pullback as Pullback,
    TrainState as TrainState,
    barrier as barrier,
    defer as defer,
    map_layers as map_layers,
    pull as pull,
    sum_cotangents as sum_cotangents,
    wrap as wrap,
)
from funcnet.data import (
    batches as batches,
    epoch_batches as epoch_batches,
)
from funcnet.debug import debug_print as debug_print
from funcnet.deferred import (
    Deferred as Deferred,
    defers as defers,
    for_dx as for_dx,
    gradients as gradients,
)
from funcnet.evaluation import (
    evaluate as evaluate,
)
from funcnet.finite import (
    detect_nonfinite as detect_nonfinite,
)
from funcnet.fitting import (
    fit as fit,
)
from funcnet.indexing import (
    dynamic_slice as dynamic_slice,
    dynamic_slice_in_dim as dynamic_slice_in_dim,
    dynamic_update_slice as dynamic_update_slice,
    dynamic_update_slice_in_dim as dynamic_update_slice_in_dim,
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
from funcnet.layers.attention import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)
from funcnet.layers.avg_pool import (
    adaptive_avg_pool1d as adaptive_avg_pool1d,
    adaptive_avg_pool2d as adaptive_avg_pool2d,
    adaptive_avg_pool3d as adaptive_avg_pool3d,
    avg_pool1d as avg_pool1d,
    avg_pool2d as avg_pool2d,
    avg_pool3d as avg_pool3d,
)
from funcnet.layers.batch_norm import (
    batch_norm as batch_norm,
)
from funcnet.layers.bilinear import (
    bilinear as bilinear,
)
from funcnet.layers.conv import (
    conv1d as conv1d,
    conv2d as conv2d,
    conv3d as conv3d,
    conv_transpose1d as conv_transpose1d,
    conv_transpose2d as conv_transpose2d,
    conv_transpose3d as conv_transpose3d,
)
from funcnet.layers.distances import (
    cosine_similarity as cosine_similarity,
    pairwise_distance as pairwise_distance,
)
from funcnet.layers.dropout import (
    alpha_dropout as alpha_dropout,
    drop_path as drop_path,
    dropout as dropout,
    dropout1d as dropout1d,
    dropout2d as dropout2d,
    dropout3d as dropout3d,
    feature_alpha_dropout as feature_alpha_dropout,
)
from funcnet.layers.embedding import (
    embedding as embedding,
)
from funcnet.layers.embedding_bag import (
    embedding_bag as embedding_bag,
)
from funcnet.layers.fold import (
    fold as fold,
    unfold as unfold,
)
from funcnet.layers.fractional_max_pool import (
    fractional_max_pool2d as fractional_max_pool2d,
    fractional_max_pool3d as fractional_max_pool3d,
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
from funcnet.layers.linear_biases import (
    alibi as alibi,
    alibi_bias as alibi_bias,
)
from funcnet.layers.lp_pool import (
    lp_pool1d as lp_pool1d,
    lp_pool2d as lp_pool2d,
    lp_pool3d as lp_pool3d,
)
from funcnet.layers.max_pool import (
    adaptive_max_pool1d as adaptive_max_pool1d,
    adaptive_max_pool2d as adaptive_max_pool2d,
    adaptive_max_pool3d as adaptive_max_pool3d,
    max_pool1d as max_pool1d,
    max_pool2d as max_pool2d,
    max_pool3d as max_pool3d,
    max_unpool1d as max_unpool1d,
    max_unpool2d as max_unpool2d,
    max_unpool3d as max_unpool3d,
)
from funcnet.layers.multihead_attention import (
    multihead_attention as multihead_attention,
)
from funcnet.layers.noise import (
    gaussian_noise as gaussian_noise,
)
from funcnet.layers.padding import (
    circular_pad1d as circular_pad1d,
    circular_pad2d as circular_pad2d,
    circular_pad3d as circular_pad3d,
    constant_pad1d as constant_pad1d,
    constant_pad2d as constant_pad2d,
    constant_pad3d as constant_pad3d,
    reflection_pad1d as reflection_pad1d,
    reflection_pad2d as reflection_pad2d,
    reflection_pad3d as reflection_pad3d,
    replication_pad1d as replication_pad1d,
    replication_pad2d as replication_pad2d,
    replication_pad3d as replication_pad3d,
    zero_pad1d as zero_pad1d,
    zero_pad2d as zero_pad2d,
    zero_pad3d as zero_pad3d,
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
from funcnet.layers.pixels import (
    channel_shuffle as channel_shuffle,
    pixel_shuffle as pixel_shuffle,
    pixel_unshuffle as pixel_unshuffle,
)
from funcnet.layers.positions import (
    learned_positions as learned_positions,
    rotary as rotary,
    rotate as rotate,
    sinusoidal_positions as sinusoidal_positions,
)
from funcnet.layers.prelu import (
    prelu as prelu,
)
from funcnet.layers.recurrent import (
    gru as gru,
    lstm as lstm,
    rnn as rnn,
)
from funcnet.layers.recurrent_cells import (
    gru_cell as gru_cell,
    lstm_cell as lstm_cell,
    rnn_cell as rnn_cell,
)
from funcnet.layers.resample import (
    interpolate as interpolate,
    upsample as upsample,
    upsampling_bilinear2d as upsampling_bilinear2d,
    upsampling_nearest2d as upsampling_nearest2d,
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
from funcnet.layers.transformer import (
    transformer_decoder_layer as transformer_decoder_layer,
    transformer_encoder_layer as transformer_encoder_layer,
)
from funcnet.layers.transformer_stacks import (
    transformer as transformer,
    transformer_decoder as transformer_decoder,
    transformer_encoder as transformer_encoder,
)
from funcnet.layers.tuples import (
    add as add,
    fan_out as fan_out,
    item as item,
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
    cosine_embedding as cosine_embedding,
    cross_entropy as cross_entropy,
    ctc as ctc,
    focal as focal,
    gaussian_nll as gaussian_nll,
    hinge as hinge,
    hinge_embedding as hinge_embedding,
    huber as huber,
    kl_div as kl_div,
    mae as mae,
    margin_ranking as margin_ranking,
    mse as mse,
    multi_margin as multi_margin,
    multilabel_margin as multilabel_margin,
    multilabel_soft_margin as multilabel_soft_margin,
    nll as nll,
    poisson_nll as poisson_nll,
    smooth_l1 as smooth_l1,
    soft_margin as soft_margin,
    triplet_margin as triplet_margin,
    triplet_margin_with_distance as triplet_margin_with_distance,
)
from funcnet.losses.adaptive_log_softmax import (
    adaptive_log_softmax as adaptive_log_softmax,
)
from funcnet.losses.linear_cross_entropy import (
    linear_cross_entropy as linear_cross_entropy,
)
from funcnet.observing import (
    observe as observe,
)
from funcnet.optimizers import (
    adadelta as adadelta,
    adafactor as adafactor,
    adagrad as adagrad,
    adam as adam,
    adamax as adamax,
    adamw as adamw,
    apply_updates as apply_updates,
    asgd as asgd,
    chain as chain,
    lamb as lamb,
    lars as lars,
    lbfgs as lbfgs,
    lion as lion,
    muon as muon,
    nadam as nadam,
    radam as radam,
    rmsprop as rmsprop,
    rprop as rprop,
    schedule_free as schedule_free,
    schedule_free_adamw as schedule_free_adamw,
    schedule_free_sgd as schedule_free_sgd,
    schedules as schedules,
    sgd as sgd,
    shampoo as shampoo,
    signsgd as signsgd,
    soap as soap,
    sophia as sophia,
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
from funcnet.run_start import init_train_state as init_train_state
from funcnet.stopping import (
    best_so_far as best_so_far,
    early_stopping as early_stopping,
)
from funcnet.summaries import (
    summary as summary,
)
from funcnet.train import (
    train_step as train_step,
    value_and_grad as value_and_grad,
)
from funcnet.transforms.jit import (
    jit as jit,
)
from funcnet.transforms.remat import (
    checkpointed as checkpointed,
    remat as remat,
)
from funcnet.transforms.vmap import (
    vmap as vmap,
)

Params = _core.Params
"""A nested dict with string keys and tensor leaves, such as the params or the state of a layer."""

Tree = _core.Tree
"""A tree of tensors: a tensor, or tuples, lists, dicts and NamedTuples of trees."""

__docformat__ = "google"
__doc__ = _reference.described(__name__, f"{__doc__}\n{_core.__doc__}")
__all__ = _reference.names(__name__)
__version__ = "0.1.0"
