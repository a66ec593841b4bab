"""Layers whose params are parted over ranks equal those of a single process."""

import pytest
import torch

import funcnet as fn
from funcnet import tree
from funcnet.parted_params import whole_params

FLOAT = torch.float64


def mesh():
    return fn.distributed.mesh(data=1, model=torch.distributed.get_world_size())


def normal(seed, *shape):
    return fn.random.normal(fn.random.key(seed), shape, FLOAT)


def tokens(seed, *shape, vocabulary=65):
    return fn.random.randint(fn.random.key(seed), shape, 0, vocabulary)


def mlp(mesh=None):
    """A hidden layer that no number of ranks divides; sigmoid makes padding something."""
    if mesh is None:
        return fn.serial(fn.linear(25), fn.sigmoid(), fn.linear(3)), fn.mse()
    first = fn.distributed.column_linear(25, mesh)
    last = fn.distributed.row_linear(3, mesh, in_features=25)
    return fn.serial(first, fn.sigmoid(), last), fn.mse()


def gathered(mesh=None):
    if mesh is None:
        return fn.serial(fn.linear(25), fn.softmax(), fn.linear(3)), fn.mse()
    first = fn.distributed.column_linear(25, mesh, gather=True)
    return fn.serial(first, fn.softmax(), fn.linear(3)), fn.mse()


def one_slope(mesh=None):
    """A param that is for the features of all ranks."""
    if mesh is None:
        return fn.serial(fn.linear(25), fn.prelu(), fn.linear(3)), fn.mse()
    d = fn.distributed
    first, last = d.column_linear(25, mesh), d.row_linear(3, mesh, in_features=25)
    return fn.serial(first, d.own_tokens(fn.prelu(), mesh), last), fn.mse()


def dropped(mesh=None, sequence=None):
    """A hidden layer of which each rank drops its part."""
    if mesh is None:
        return fn.serial(fn.linear(25), fn.sigmoid(), fn.dropout(0.3), fn.linear(3)), fn.mse()
    d = fn.distributed
    first = d.column_linear(25, mesh, sequence=sequence)
    last = d.row_linear(3, mesh, in_features=25, sequence=sequence)
    return fn.serial(first, fn.sigmoid(), d.parted_dropout(0.3, mesh, size=25), last), fn.mse()


def dropped_tokens(mesh=None):
    """The same between layers that drop values of each rank's tokens, in dimension 1."""
    hidden, loss = dropped(mesh, 1)
    norm, drop = fn.layer_norm(None), fn.dropout(0.3)
    if mesh is None:
        embed, head = fn.embedding(7, 6, dtype=FLOAT), fn.linear(5)
    else:
        d = fn.distributed
        norm, drop = d.own_tokens(norm, mesh), d.parted_dropout(0.3, mesh, dim=1)
        embed = d.vocabulary_embedding(7, 6, mesh, dtype=FLOAT, sequence=1)
        head = d.column_linear(5, mesh, gather=True, sequence=1)
    return fn.serial(embed, drop, norm, hidden, drop, head), loss


def with_positions(mesh=None):
    """Learned positions of tokens in parts: an embedding of the position numbers."""
    if mesh is None:
        tables, head = [fn.embedding(size, 6, dtype=FLOAT) for size in (7, 9)], fn.linear(5)
    else:
        d, along = fn.distributed, {"sequence": 1}
        tables = [d.vocabulary_embedding(size, 6, mesh, dtype=FLOAT, **along) for size in (7, 9)]
        head = d.column_linear(5, mesh, gather=True, **along)
    return fn.serial(fn.parallel(*tables), fn.add(), head), fn.mse()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13, equal_nan=True)


def same_training(make, x, target, transform="eager", steps=5, **options):
    """Loss, gradients and steps of adam are those of a single process, and padding is zero."""
    wrap = {"eager": lambda f: f, "jit": fn.jit}[transform]
    (net, loss), (own_net, own_loss) = make(**options), make(mesh(), **options)
    optimizer = fn.adam(0.01, weight_decay=0.1)
    state = fn.init_train_state(net, optimizer, fn.key(1), x)
    own = fn.init_train_state(own_net, optimizer, fn.key(1), x)
    placed = fn.distributed.placements(own_net, x)
    assert list(placed) == list(tree.to_dotted(own.params))
    close(whole_params(own.params, placed), state.params)
    step = fn.train_step(net, loss, optimizer)
    own_step = wrap(fn.train_step(own_net, own_loss, optimizer))
    for _ in range(steps):
        _, own_grads = gradients(own_net, own_loss, own, x, target)
        _, grads = gradients(net, loss, state, x, target)
        close(whole_params(own_grads, placed), grads)
        state, metrics = step(state, (x, target))
        own, own_metrics = own_step(own, (x, target))
        close(own_metrics["loss"], metrics["loss"])
        close(whole_params(own.params, placed), state.params)
    for path, leaf in tree.to_dotted(own.params).items():
        if placed[path]:
            (split,) = placed[path]
            padded = split.axis.gather(leaf, split.dim)
            assert torch.equal(split.padded(split.trimmed(padded)), padded), path


def gradients(net, loss, state, x, target):
    key = fn.random.fold_in(state.key, state.step)
    y, pullback, _ = net.vjp(state.params, x, state.state, key=key)
    value, of_loss = loss.vjp(y, target)
    return value, pullback(of_loss(), x=False)[0]


@pytest.mark.parametrize("make", [mlp, gathered, one_slope, dropped])
def test_a_small_net(ranks, make):
    ranks(same_training, make, normal(0, 4, 5), normal(1, 4, 3))


@pytest.mark.parametrize("make", [mlp, pytest.param(dropped, marks=pytest.mark.whole)])
def test_a_small_net_under_jit(two_ranks, make):
    two_ranks(same_training, make, normal(0, 4, 5), normal(1, 4, 3), "jit")


def test_dropout_of_parts_of_tokens(ranks):
    ranks(same_training, dropped_tokens, tokens(0, 3, 8, vocabulary=7), normal(1, 3, 8, 5))


def test_positions_of_parts_of_tokens(two_ranks):
    x = tokens(0, 3, 8, vocabulary=7), torch.arange(8).expand(3, 8)
    two_ranks(same_training, with_positions, x, normal(1, 3, 8, 5))


def gpt(mesh=None, tied=False, sequence=False, dropout=0.0, **options):
    """An embedding of 65 tokens, two blocks, a head, and the loss."""
    told = {"norm_first": True, "batch_first": True, "activation": "gelu", "is_causal": True}
    told |= {"dropout": dropout, "rotary": fn.rotary()} | options
    norm, head = fn.layer_norm(None), {"weight_init": fn.initializers.normal(0.1)}
    if mesh is None:
        loss = fn.cross_entropy(ignore_index=3)
        embed = fn.embedding(65, 16, dtype=FLOAT)
        block = fn.transformer_encoder_layer(4, 26, **told)
        head = fn.linear(65, bias=False, **head)
    else:
        d, along = fn.distributed, 1 if sequence else None
        loss = d.vocabulary_cross_entropy(mesh, ignore_index=3, num_classes=65)
        embed = d.vocabulary_embedding(65, 16, mesh, dtype=FLOAT, sequence=along)
        block = d.parallel_encoder_layer(4, mesh, 26, sequence=sequence, **told)
        norm = d.own_tokens(norm, mesh) if sequence else norm
        head = d.column_linear(65, mesh, bias=False, sequence=along, **head)
    # The classes are the loss's second dimension.
    layers = {"embed": embed, "blocks": fn.repeat(block, 2), "norm": norm, "head": head}
    net = fn.serial(**layers, rows=fn.flatten(0, 1))
    return fn.tie(net, {"head.weight": "embed.weight"}) if tied else net, loss


def batch():
    return tokens(0, 2, 8), tokens(1, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"tied": True},
        {"sequence": True},
        {"dropout": 0.3, "window": 3},
        {"dropout": 0.3, "sequence": True, "tied": True},
        {"alibi": True, "bias": False, "rotary": None},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_small_gpt(four_ranks, options):
    four_ranks(same_training, gpt, *batch(), steps=2, **options)


def test_a_small_gpt_of_two_ranks(two_ranks):
    two_ranks(same_training, gpt, *batch(), num_kv_heads=2)


@pytest.mark.whole
def test_a_small_gpt_under_jit(two_ranks):
    options = {"tied": True, "sequence": True, "dropout": 0.3}
    two_ranks(same_training, gpt, *batch(), "jit", **options)


def summed_over(axis):
    """The mean of the ranks' gradients along an axis, in a chain."""

    def update(grads, state, params):
        return tree.map(axis.mean, grads), state

    return fn.Optimizer(lambda params: {}, update, elementwise=True)


def by_two_axes(make, x, target, transform):
    """Two parts of the batch, two parts of each layer."""
    wrap = {"eager": lambda f: f, "jit": fn.jit}[transform]
    m = fn.distributed.mesh(data=2, model=2)
    data = fn.distributed.axis_of(m, "data")
    (net, loss), (own_net, own_loss) = make(), make(m)
    optimizer = fn.adam(0.01, weight_decay=0.1)
    own_optimizer = fn.chain(summed_over(data), optimizer)
    state = fn.init_train_state(net, optimizer, fn.random.key(1), x)
    own = fn.init_train_state(own_net, own_optimizer, fn.random.key(1), data.part(x))
    placed = fn.distributed.placements(own_net, data.part(x))
    step = fn.train_step(net, loss, optimizer)
    own_step = wrap(fn.train_step(own_net, own_loss, own_optimizer))
    for _ in range(5):
        state, metrics = step(state, (x, target))
        own, own_metrics = own_step(own, (data.part(x), data.part(target)))
        close(data.mean(own_metrics["loss"]), metrics["loss"])
        close(whole_params(own.params, placed), state.params)


@pytest.mark.parametrize("transform", ["eager", "jit"])
def test_with_parts_of_the_batch_on_another_axis(four_ranks, transform):
    four_ranks(by_two_axes, mlp, normal(0, 4, 5), normal(1, 4, 3), transform)


def test_a_gpt_with_parts_of_the_batch_on_another_axis(four_ranks):
    four_ranks(by_two_axes, whole_gpt, *batch(), "eager")


def whole_gpt(mesh=None):
    """No token is ignored: the parts of the batch have as many."""
    net, _ = gpt(mesh, tied=True)
    if mesh is None:
        return net, fn.cross_entropy()
    return net, fn.distributed.vocabulary_cross_entropy(mesh, num_classes=65)
