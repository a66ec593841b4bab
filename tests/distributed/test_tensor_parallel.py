"""Layers whose params are parted over ranks equal those of a single process."""

import pytest
import torch

import funcnet as fn
from funcnet import tree
from funcnet.distributed.splits import whole_params

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


@pytest.mark.parametrize("make", [mlp, gathered])
def test_a_small_net(ranks, make):
    ranks(same_training, make, normal(0, 4, 5), normal(1, 4, 3))


def test_a_small_net_under_jit(ranks):
    ranks(same_training, mlp, normal(0, 4, 5), normal(1, 4, 3), "jit")


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


@pytest.mark.parametrize("options", [{"tied": True}, {"sequence": True, "dropout": 0.3}], ids=str)
def test_a_small_gpt_under_jit(two_ranks, options):
    two_ranks(same_training, gpt, *batch(), "jit", steps=5, **options)


def compared(net, own_net, x, dy, **options):
    """y, the gradients and dx of a layer, its halves too, are those of a single process."""
    params, state = net.init(fn.random.key(1), x)
    own, _ = own_net.init(fn.random.key(1), x)
    placed = fn.distributed.placements(own_net, x)
    y, pullback, _ = net.vjp(params, x, state, **options)
    own_y, own_pullback, _ = own_net.vjp(own, x, state, **options)
    close(own_y, y)
    close(own_net.apply(own, x, state, **options)[0], own_net.vjp(own, x, state, **options)[0])
    dparams, dx = pullback(dy)
    own_dparams, own_dx = own_pullback(dy)
    close(whole_params(own_dparams, placed), dparams)
    close(own_dx, dx)
    close(own_pullback(dy, x=False), (own_dparams, None))
    close(own_pullback(dy, params=False), (None, own_dx))
    deferred, first = fn.defer(own_pullback)(dy)
    close((fn.gradients(deferred), first), (own_dparams, own_dx))


def attentions(x, **options):
    compared(
        fn.multihead_attention(4, batch_first=True, **options),
        fn.distributed.parallel_attention(4, mesh(), batch_first=True, **options),
        x,
        normal(9, 2, 5, 8),
        **({"key": fn.random.key(7), "train": True} if options.get("dropout") else {}),
    )


def all_attentions():
    query, key, value = normal(0, 2, 5, 8), normal(1, 2, 3, 8), normal(2, 2, 3, 6)
    hidden = torch.tensor([[True, False, False], [False, False, True]])
    attentions(query, is_causal=True, dropout=0.4)
    attentions((query, key), alibi=True, num_kv_heads=2, bias=False)
    attentions((query, key, value, hidden))
    attentions({"query": query, "key": key, "attn_mask": normal(3, 5, 3)}, window=4)
    attentions((query, key, key, normal(4, 2, 3), normal(3, 5, 3)))


def test_attention_of_several_inputs_with_masks(two_ranks):
    two_ranks(all_attentions)


def decoded():
    layer = fn.distributed.parallel_attention(
        4, mesh(), batch_first=True, is_causal=True, cache=6, rotary=fn.rotary()
    )
    single = fn.multihead_attention(4, batch_first=True, is_causal=True, rotary=fn.rotary())
    x = normal(0, 2, 6, 8)
    own, state = layer.init(fn.random.key(1), x[:, :1])
    params, _ = single.init(fn.random.key(1), x)
    ys = []
    for token in x.split(1, 1):
        y, state = layer.apply(own, token, state)
        ys.append(y)
    assert state["cache"]["key"].shape == (2, 4 // mesh()["model"].size(), 6, 2)
    close(torch.cat(ys, 1), single.apply(params, x)[0])


def test_a_cache_holds_the_keys_of_own_heads(two_ranks):
    two_ranks(decoded)


def losses(shape, target, **options):
    """The cross entropy of 5 classes, of which ranks have some, padded with numbers that count."""
    single = fn.cross_entropy(**options)
    parallel = fn.distributed.vocabulary_cross_entropy(mesh(), num_classes=5, **options)
    logits = normal(0, *shape) * 3
    dim = min(1, logits.dim() - 1)
    axis = fn.distributed.axis_of(mesh(), "model")
    split = fn.collectives.Split(axis, shape, dim)
    padded = split.padded(logits)
    padded.narrow(dim, 5, padded.shape[dim] - 5).fill_(50.0)
    value, pullback = single.vjp(logits, target)
    own_value, own_pullback = parallel.vjp(axis.part(padded, dim), target)
    close(own_value, value)
    close(parallel.apply(axis.part(padded, dim), target), value)
    dvalue = normal(2, *value.shape) if value.dim() else 2.0
    gradient = axis.gather(own_pullback(dvalue), dim)
    close(split.trimmed(gradient), pullback(dvalue))
    assert not gradient.narrow(dim, 5, padded.shape[dim] - 5).any()


def all_losses():
    weight = normal(5, 5).exp()
    target = torch.tensor([0, 4, 2, 1])
    losses((4, 5), target)
    losses((5,), torch.tensor(3), reduction="none")
    losses((4, 5), target, ignore_index=4, weight=weight)
    losses((4, 5), target, ignore_index=4, weight=weight, label_smoothing=0.2)
    losses((4, 5), target, reduction="sum", label_smoothing=1.0)
    losses((4, 5, 3), tokens(1, 4, 3, vocabulary=5), reduction="none", ignore_index=1)
    losses((2, 5), torch.full((2,), -100))


def test_losses_of_parted_classes(ranks):
    ranks(all_losses)


def halves():
    """In half precision the sum of exponentials is taken in float32, as in one process."""
    axis = fn.distributed.axis_of(mesh(), "model")
    loss, target = fn.distributed.vocabulary_cross_entropy(mesh()), tokens(1, 4, vocabulary=256)
    logits = normal(0, 4, 256).to(torch.bfloat16)
    value, pullback = loss.vjp(axis.part(logits, 1), target)
    expected, of_all = fn.cross_entropy().vjp(logits.float(), target)
    assert value.dtype == pullback().dtype == torch.bfloat16
    torch.testing.assert_close(value, expected.bfloat16())
    torch.testing.assert_close(axis.gather(pullback(), 1), of_all().bfloat16())


def test_losses_in_half_precision(two_ranks):
    two_ranks(halves)


def single_layers():
    d, m, x = fn.distributed, mesh(), normal(0, 4, 6)
    column = d.column_linear(5, m, gather=True)
    compared(fn.linear(5), column, x, normal(1, 4, 5))
    index = tokens(0, 3, 4, vocabulary=7)
    for padding in (None, 6):
        single = fn.embedding(7, 3, padding, dtype=FLOAT)
        own = d.vocabulary_embedding(7, 3, m, padding, dtype=FLOAT)
        compared(single, own, index, normal(1, 3, 4, 3))


def population():
    """Members of a population are what they are alone."""
    net, loss = mlp(mesh())
    x, target = normal(0, 4, 5), normal(1, 4, 3)
    params, _ = fn.vmap(lambda key: net.init(key, x))(fn.random.split(fn.random.key(1), 3))

    def gradients(params):
        y, pullback, _ = net.vjp(params, x)
        value, of_loss = loss.vjp(y, target)
        return value, pullback(of_loss())

    found = fn.vmap(gradients)(params)
    for member in range(3):
        alone = gradients(tree.map(lambda leaf, at=member: leaf[at], params))
        close(tree.map(lambda leaf, at=member: leaf[at], found), alone)


def test_single_layers_and_populations(two_ranks):
    two_ranks(single_layers)
    two_ranks(population)


def summed_over(axis):
    """The mean of the ranks' gradients along an axis, in a chain."""

    def update(grads, state, params):
        return tree.map(axis.mean, grads), state

    return fn.Optimizer(lambda params: {}, update)


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


MESH = {"data": 1, "model": 4}


def test_placements_of_a_mesh_without_processes():
    net, _ = gpt(MESH)
    x = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    placed = fn.distributed.placements(net, x)
    params, _ = net.init(fn.random.key(0), x)
    single, _ = gpt()[0].init(fn.random.key(0), x)
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.to_dotted(single).items()}
    for path, leaf in tree.to_dotted(params).items():
        for split in placed[path]:
            assert (split.shape, split.part_shape) == (shapes[path], tuple(leaf.shape)), path
        assert placed[path] or tuple(leaf.shape) == shapes[path], path
    (split,) = placed["blocks.self_attn.in_proj_weight"]
    assert (split.dim, split.shape, split.sections) == (1, (2, 48, 16), (16, 16, 16))
    assert [path for path, splits in placed.items() if not splits] == [
        "blocks.self_attn.out_proj.bias",
        "blocks.linear2.bias",
        *[f"blocks.norm{n}.{name}" for n in (1, 2) for name in ("weight", "bias")],
        "norm.weight",
        "norm.bias",
    ]


def test_over_one_rank_a_layer_is_that_of_a_single_process():
    x, one = normal(0, 2, 5, 8), {"model": 1}
    block = fn.distributed.parallel_encoder_layer(2, one, 9)
    single = fn.transformer_encoder_layer(2, 9)
    params, _ = single.init(fn.random.key(0), x)
    options = {"key": fn.random.key(1), "train": True}
    close(block.apply(params, x, **options)[0], single.apply(params, x, **options)[0])
    fn.testing.check_layer(fn.distributed.column_linear(3, one), normal(0, 4, 2))
    fn.testing.check_layer(fn.distributed.row_linear(3, one), normal(0, 4, 2))
    fn.testing.check_layer(fn.distributed.parallel_attention(2, one), normal(0, 5, 3, 4))
    fn.testing.check_layer(fn.distributed.own_tokens(fn.layer_norm(), one), normal(0, 5, 4))
    table = fn.distributed.vocabulary_embedding(7, 2, one, dtype=FLOAT)
    fn.testing.check_layer(table, tokens(0, 5, vocabulary=7))
    loss = fn.distributed.vocabulary_cross_entropy(one, label_smoothing=0.1)
    fn.testing.check_loss(loss, normal(0, 4, 5), tokens(0, 4, vocabulary=5))


D = fn.distributed
X, INDEX = torch.ones(3, 4, device="meta"), torch.ones(3, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: D.column_linear(-1, MESH), ValueError, "column_linear: out_features must be"),
        (lambda: D.column_linear(3, 4), TypeError, "column_linear: expects a mesh, such as"),
        (lambda: D.column_linear(3, MESH, 5), TypeError, "bias must be True or False, got 5"),
        (lambda: D.row_linear(3, MESH, in_features=2.0), ValueError, "row_linear: in_features"),
        (
            lambda: D.row_linear(3, MESH, in_features=25).init(fn.random.key(0), X),
            ValueError,
            r"row_linear: expects 7 of 25 features in the last dimension, got \(3, 4\)",
        ),
        (
            lambda: D.column_linear(3, MESH, sequence=1).init(fn.random.key(0), X),
            ValueError,
            r"column_linear: expects dimension 1 of tokens, before the features, got \(3, 4\)",
        ),
        (
            lambda: D.row_linear(3, MESH, sequence=0).init(fn.random.key(0), X),
            ValueError,
            r"row_linear: expects tokens that 4 ranks divide in dimension 0, got \(3, 4\)",
        ),
        (
            lambda: D.parallel_attention(6, MESH),
            ValueError,
            "parallel_attention: num_heads must be a multiple of 4 ranks, got 6",
        ),
        (
            lambda: D.parallel_attention(8, MESH, num_kv_heads=2),
            ValueError,
            "num_kv_heads must be a multiple of 4 ranks, got 2",
        ),
        (
            lambda: D.parallel_attention(8, MESH).init(fn.random.key(0), X),
            ValueError,
            "parallel_attention: expects a number of features that 8 heads divide, got 4",
        ),
        (lambda: D.parallel_encoder_layer(4, MESH, activation="no"), ValueError, "parallel_encod"),
        (lambda: D.vocabulary_embedding(7, 2, MESH, 9), ValueError, "padding_idx must be within 7"),
        (
            lambda: D.vocabulary_embedding(7, 2, MESH).init(fn.random.key(0), X),
            TypeError,
            "vocabulary_embedding: expects int32 or int64 indices",
        ),
        (lambda: D.own_tokens(fn.dropout(), MESH), ValueError, "that draws no numbers, got dropou"),
        (lambda: D.vocabulary_cross_entropy(MESH, label_smoothing=2), ValueError, "label_smooth"),
        (lambda: D.vocabulary_cross_entropy(MESH, "sum"), TypeError, "vocabulary_cross_entropy"),
        (
            lambda: D.vocabulary_cross_entropy(MESH, num_classes=65).apply(X, INDEX),
            ValueError,
            r"expects a prediction of 17 of 65 classes in dimension 1, got \(3, 4\)",
        ),
        (
            lambda: D.vocabulary_cross_entropy(MESH).apply(X, X),
            TypeError,
            "expects a target of int64 class indices",
        ),
        (
            lambda: D.vocabulary_cross_entropy(MESH, torch.ones(5)).apply(X, INDEX),
            ValueError,
            r"expects a weight for each of 16 classes, got \(5,\)",
        ),
    ],
)
def test_wrong_inputs(make, error, message):
    with pytest.raises(error, match=message):
        make()


def wrong_values():
    """Each rank raises, and none waits for another."""
    table = fn.distributed.vocabulary_embedding(7, 2, mesh())
    params, _ = table.init(fn.random.key(0), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"vocabulary_embedding: expects indices in \[0, 7\), got"):
        table.apply(params, torch.tensor([0, 7]))
    loss = fn.distributed.vocabulary_cross_entropy(mesh(), num_classes=7)
    with pytest.raises(ValueError, match=r"expects classes in \[0, 7\), got 0 to 7"):
        loss.apply(torch.zeros(2, -(-7 // mesh()["model"].size())), torch.tensor([0, 7]))
    y = torch.vmap(lambda x: table.apply(params, x)[0])(torch.tensor([[0, 7]]))
    assert y.isnan().any(-1).tolist() == [[False, True]]


def test_wrong_values(two_ranks):
    two_ranks(wrong_values)
