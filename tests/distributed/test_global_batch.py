"""Layers that draw or mix examples, on parts of a batch: the numbers of a single process."""

import pytest
import torch

import funcnet as fn
from funcnet.distributed import axis_of, data_parallel, mesh
from funcnet.lift import accept_any

SIZE = 8
F64 = torch.float64


def values(*shape):
    return fn.random.normal(fn.key(1), (SIZE, *shape), F64)


def indices():
    return fn.random.randint(fn.key(1), (SIZE, 3), 0, 5)


def first_of(x):
    return x[0], {"rest": x[1]}, ()


def first_backward(dy, rest):
    return dy, fn.tree.map(torch.zeros_like, rest)


def output():
    """The output of a recurrent layer, without its last states."""
    return fn.parameterless(first_of, first_backward, declaration=accept_any)


def with_balance(x):
    return x[0] + x[1]["balance"], {}, ()


def balance_backward(dy):
    return dy, {"balance": dy.sum()}


def balanced():
    """The output of experts plus their balance."""
    return fn.parameterless(with_balance, balance_backward, declaration=accept_any)


def classes(*shape):
    return fn.random.randint(fn.key(2), (SIZE, *shape), 0, 5)


def probabilities(*shape):
    return fn.random.uniform(fn.key(2), (SIZE, 5, *shape), F64, 0.1, 1.0)


def input_of(x):
    return x[0], {}, ()


def input_backward(dy):
    return dy, None


def with_loss(x):
    return x[0] + x[1], {}, ()


def loss_backward(dy):
    return dy, dy.sum()


def plus(head):
    """An output of each example plus the loss that a head gives of all of them."""
    given = fn.parameterless(input_of, input_backward, declaration=accept_any)
    added = fn.parameterless(with_loss, loss_backward, declaration=accept_any)
    return fn.serial(fn.branch(fn.serial(given, fn.linear(1)), head), added)


CHUNKS = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=3)
IGNORING = {"ignore_index": 2, "weight": torch.tensor([1.0, 2.0, 1.0, 3.0, 0.5], dtype=F64)}


def encoder(**options):
    """Without biases, as that of the keys has a gradient of 0, which adam's steps are large for."""
    return fn.transformer_encoder_layer(2, 6, 0.3, bias=False, **options)


def steps_first(layer):
    """A layer of (steps, batch, features), in a net of (batch, steps, features)."""
    return fn.serial(fn.permute(1, 0, 2), layer, fn.permute(1, 0, 2))


def solved():
    f = fn.serial(fn.parallel(fn.identity(), fn.linear(3, bias=False)), fn.add(), fn.tanh())
    return fn.fixed_point(f, tol=1e-13, max_iter=100, history=2)


def doubled(residuals, dy, *, params, x):
    return fn.pull({"": residuals["pullback"]}, "", 2 * dy, params=params, x=x)


def in_a_loop():
    block = fn.serial(fn.dropout(0.3), fn.linear(4, bias=False), fn.batch_norm(), fn.tanh())
    return fn.serial(fn.linear(4), fn.repeat(fn.residual(block), 3), fn.rrelu())


def wrapped():
    """Dropout and batch norm, deep inside of what is made of layers."""
    layer = fn.serial(fn.linear(4, bias=False), fn.batch_norm(), fn.dropout(0.3))
    return fn.serial(
        fn.remat(layer),
        fn.residual(fn.lora(fn.serial(fn.linear(4), fn.dropout(0.3)), rank=2)),
        fn.repeat(fn.serial(fn.linear(4), fn.dropout(0.3)), 2),
        fn.branch(fn.weight_norm(fn.linear(3)), fn.serial(fn.dropout(0.2), fn.linear(3))),
        fn.add(),
        fn.compressed(fn.serial(fn.linear(3), fn.relu(), fn.dropout(0.3)), "bit"),
        fn.with_rule(fn.serial(fn.linear(3), fn.dropout(0.3)), doubled, reads="pullback"),
        fn.freeze(fn.serial(fn.linear(2), fn.dropout(0.3)), "0"),
        fn.cast(fn.serial(fn.linear(2), fn.rrelu()), F64),
    )


# Each with an example of the whole batch.
NETS = {
    "dropout": (lambda: fn.serial(fn.linear(4), fn.dropout(0.4)), values(3)),
    "dropout2d": (lambda: fn.serial(fn.conv2d(4, 1), fn.dropout2d(0.4)), values(2, 3, 3)),
    "alpha_dropout": (lambda: fn.serial(fn.linear(4), fn.alpha_dropout(0.4)), values(5, 3)),
    "feature_alpha_dropout": (
        lambda: fn.serial(fn.conv1d(4, 1), fn.feature_alpha_dropout(0.4)),
        values(2, 3),
    ),
    "drop_path": (lambda: fn.residual(fn.serial(fn.linear(3), fn.drop_path(0.4))), values(3)),
    "drop_path, once": (
        lambda: fn.serial(fn.linear(3), fn.residual(fn.drop_path(0.5, "batch"))),
        values(3),
    ),
    "gaussian_noise": (lambda: fn.serial(fn.linear(4), fn.gaussian_noise(0.4, True)), values(3)),
    "rrelu": (lambda: fn.serial(fn.linear(4), fn.rrelu()), values(3)),
    "fractional_max_pool2d": (
        lambda: fn.serial(fn.conv2d(4, 1), fn.fractional_max_pool2d(2, 3)),
        values(2, 6, 6),
    ),
    "attention": (
        lambda: fn.multihead_attention(2, 0.4, bias=False, batch_first=True),
        values(3, 4),
    ),
    "attention, steps first": (
        lambda: steps_first(fn.multihead_attention(2, 0.4, bias=False)),
        values(3, 4),
    ),
    "transformer": (
        lambda: fn.transformer_encoder(encoder(batch_first=True), 2),
        values(3, 4),
    ),
    "transformer, steps first": (
        lambda: steps_first(encoder(activation=fn.rrelu())),
        values(3, 4),
    ),
    "lstm": (
        lambda: fn.serial(
            fn.lstm(3, num_layers=2, dropout=0.4, bidirectional=True, batch_first=True), output()
        ),
        values(4, 3),
    ),
    "gru, steps first": (
        lambda: steps_first(fn.serial(fn.gru(3, num_layers=3, dropout=0.4), output())),
        values(4, 3),
    ),
    "batch_norm": (
        lambda: fn.serial(fn.linear(4, bias=False), fn.batch_norm(), fn.tanh(), fn.linear(2)),
        values(3),
    ),
    "batch_norm of images": (
        lambda: fn.serial(fn.conv2d(4, 2, bias=False), fn.batch_norm(momentum=None), fn.relu()),
        values(2, 3, 3),
    ),
    "batch_norm, no state": (
        lambda: fn.serial(
            fn.linear(4, bias=False),
            fn.batch_norm(affine=False, track_running_stats=False),
            fn.linear(2),
        ),
        values(3),
    ),
    "instance_norm": (
        lambda: fn.serial(
            fn.conv1d(4, 1, bias=False), fn.instance_norm1d(track_running_stats=True)
        ),
        values(2, 5),
    ),
    "embedding": (lambda: fn.embedding(5, 3, scale_grad_by_freq=True, dtype=F64), indices()),
    "embedding_bag": (
        lambda: fn.embedding_bag(5, 3, scale_grad_by_freq=True, dtype=F64),
        indices(),
    ),
    "experts": (
        lambda: fn.serial(fn.experts(fn.linear(4), fn.linear(3), n=4), balanced()),
        values(3),
    ),
    "experts of a capacity": (
        lambda: fn.serial(
            fn.experts(
                fn.linear(3),
                tuple(fn.serial(fn.linear(3), fn.tanh()) for _ in range(3)),
                capacity=0.7,
            ),
            balanced(),
        ),
        values(2, 3),
    ),
    "linear_cross_entropy": (
        lambda: plus(fn.linear_cross_entropy(5, **IGNORING)),
        (values(3), classes()),
    ),
    "linear_cross_entropy, summed": (
        lambda: plus(fn.linear_cross_entropy(5, reduction="sum")),
        (values(3), classes()),
    ),
    "linear_cross_entropy of probabilities": (
        lambda: plus(fn.linear_cross_entropy(5, label_smoothing=0.1)),
        (values(3), probabilities()),
    ),
    "linear_cross_entropy in chunks": (
        lambda: plus(fn.linear_cross_entropy(5, bias=True, options=CHUNKS, **IGNORING)),
        (values(3), classes()),
    ),
    "linear_cross_entropy of probabilities in chunks": (
        lambda: plus(fn.linear_cross_entropy(5, out_features=(2,), options=CHUNKS)),
        (values(3), probabilities(2)),
    ),
    "adaptive_log_softmax": (
        lambda: fn.serial(
            fn.adaptive_log_softmax(5, [2, 3]),
            fn.parameterless(with_loss, loss_backward, declaration=accept_any),
        ),
        (values(8), classes()),
    ),
    "fixed_point": (solved, values(3)),
    "in a loop": (in_a_loop, values(3)),
    "wrapped": (wrapped, values(3)),
}


def gradients_by(reduce):
    """The transform that takes a function of each gradient."""
    return fn.Optimizer(
        lambda params: {}, lambda grads, state, params: (fn.tree.map(reduce, grads), state)
    )


def trained(net, x, reduction, transform, own=None, first=lambda grad: grad):
    """The state after five steps of adam, of the rows of a batch that ``own`` gives."""
    y, _ = net.apply(*net.init(fn.key(3), x)[:1], x, net.init(fn.key(3), x)[1])
    target = fn.random.normal(fn.key(2), y.shape, F64)
    x, target = fn.tree.map(own, (x, target)) if own else (x, target)
    optimizer = fn.chain(gradients_by(first), fn.adam(0.01))
    state = fn.init_train_state(net, optimizer, fn.key(3), x)
    step = fn.train_step(net, fn.mse(reduction=reduction), optimizer)
    step = fn.jit(step) if transform == "jit" else step
    for _ in range(5):
        state, _ = step(state, (x, target))
    return state


def on_rank(name, equal=True, transform="eager"):
    """What the ranks have, and the greatest relative difference from a single process."""
    make, x = NETS[name]
    axis, rank = axis_of(mesh(), "data"), mesh().get_local_rank("data")
    net = data_parallel(make(), mesh(), equal=equal)
    assert name == "wrapped" or repr(net) == repr(make())
    if equal:
        rows = [SIZE // axis.size] * axis.size
    else:
        rows = [SIZE - axis.size + 1] + [1] * (axis.size - 1)
    start = sum(rows[:rank])
    # A sum has no mean of means, so parts may be unequal.
    reduction, first = ("mean", axis.mean) if equal else ("sum", axis.sum)
    found = trained(
        net, x, reduction, transform, lambda leaf: leaf[start : start + rows[rank]], first
    )
    expected = trained(make(), x, reduction, "eager")
    assert fn.tree.paths(found) == fn.tree.paths(expected)
    pairs = zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True)
    return [leaf.numpy() for leaf in fn.tree.leaves(found)], max([error(*pair) for pair in pairs])


def error(ours, theirs):
    """The greatest difference, relative to the greatest number."""
    if not ours.numel():
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)).item()


def check(results, tolerance=1e-12):
    first, _ = results[0]
    for leaves, error in results:
        assert error < tolerance
        assert all((a == b).all() for a, b in zip(leaves, first, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_two_ranks_train_as_one_process(two_ranks, name):
    check(two_ranks(on_rank, name))


@pytest.mark.parametrize("name", NETS)
def test_four_ranks_of_unequal_parts_train_as_one_process(four_ranks, name):
    check(four_ranks(on_rank, name, equal=False))


def whole(name):
    return pytest.param(name, marks=pytest.mark.whole)


@pytest.mark.parametrize("name", [whole("in a loop"), "batch_norm of images"])
def test_compiled_steps_train_as_one_process(two_ranks, name):
    check(two_ranks(on_rank, name, transform="jit"))


@pytest.mark.parametrize("name", [whole("lstm"), "fixed_point", whole("experts of a capacity")])
def test_compiled_steps_of_unequal_parts_train_as_one_process(two_ranks, name):
    check(two_ranks(on_rank, name, equal=False, transform="jit"))


def test_a_layer_without_a_global_form_is_refused_by_its_path():
    plan = {"data": 2}
    noisy = fn.serial(fn.linear(3), fn.residual(fn.serial(fn.tanh(), fn.noise_cotangent(0.1))))
    with pytest.raises(ValueError, match=r"data_parallel: noise_cotangent at '1.1' draws random"):
        data_parallel(noisy, plan)
    with pytest.raises(ValueError, match=r"^data_parallel: clip_cotangent mixes the examples"):
        data_parallel(fn.clip_cotangent(1.0), plan)
    field = fn.serial(fn.linear(3), fn.batch_norm())
    adaptive = fn.neural_ode(field, (0.0, 1.0), 9, method="dopri5")
    with pytest.raises(ValueError, match=r"data_parallel: neural_ode at '0' mixes the examples"):
        data_parallel(fn.serial(adaptive), plan)
    rounded = fn.compressed(fn.serial(fn.linear(3)), "int8")
    with pytest.raises(ValueError, match="compressed: its int8, rounded at random"):
        data_parallel(rounded, plan)
    replaced = fn.serial(fn.dropout(0.1)._replace(init=fn.identity().init))
    with pytest.raises(ValueError, match=r"dropout at '0' draws random numbers, and has no global"):
        data_parallel(replaced, plan)
    with pytest.raises(TypeError, match="data_parallel: expects a Layer, got int"):
        data_parallel(3, plan)


def test_one_rank_and_layers_of_single_examples_are_left_alone():
    net = fn.serial(fn.linear(3), fn.batch_norm(), fn.clip_cotangent(1.0))
    assert data_parallel(net, {"data": 1, "model": 4}) is net
    net = fn.serial(fn.linear(3), fn.residual(fn.layer_norm()))
    assert data_parallel(net, {"data": 4}) is net


@pytest.mark.parametrize(
    ("layer", "x", "words"),
    [
        (
            fn.dropout1d(0.1),
            torch.ones(2, 3),
            "dropout1d: expects a part of a batch",
        ),
        (fn.fractional_max_pool2d(2, 2), torch.ones(2, 5, 5), "of at least 4 dimensions"),
        (fn.gru(2, num_layers=2, dropout=0.1), torch.ones(4, 3), "gru: expects a part of a batch"),
        (fn.gaussian_noise(), torch.ones(()), "gaussian_noise: expects a part of a batch"),
        (
            fn.scaled_dot_product_attention(0.1),
            (torch.ones(4, 3),) * 3,
            "scaled_dot_product_attention: expects a part of a batch",
        ),
    ],
)
def test_an_example_without_a_batch_is_refused(layer, x, words):
    net = data_parallel(layer, {"data": 2})
    params, state = net.init(fn.key(0), x)
    with pytest.raises(ValueError, match=words):
        net.vjp(params, x, state, key=fn.key(1))


def test_a_batch_in_another_dimension(two_ranks):
    for own, whole in two_ranks(steps_first_on_rank):
        assert (own == whole).all()


def steps_first_on_rank():
    net = fn.serial(fn.dropout(0.5), fn.gaussian_noise(0.5), fn.rrelu())
    x, rank = values(5, 3).transpose(0, 1), mesh().get_local_rank("data")
    rows = slice(0, 3) if rank == 0 else slice(3, SIZE)
    parallel = data_parallel(net, mesh(), equal=False, dim=1)
    y, _ = parallel.apply({}, x[:, rows], key=fn.key(5), train=True)
    whole, _ = net.apply({}, x, key=fn.key(5), train=True)
    return y.numpy(), whole[:, rows].numpy()
