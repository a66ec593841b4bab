"""Each layer and loss whose params are parted over ranks, alone; and what is refused."""

import pytest
import torch

import funcnet as fn
from distributed.test_tensor_parallel import FLOAT, close, gpt, mesh, mlp, normal, tokens
from funcnet import tree
from funcnet.parted_params import whole_params


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


def masks_of_all_tokens():
    """With ``sequence`` a rank has a part of the query, and masks are whole."""
    axis, dy = fn.distributed.axis_of(mesh(), "model"), normal(3, 2, 6, 8)
    query, masks = normal(0, 2, 6, 8), (normal(1, 2, 6), normal(2, 6, 6))
    single = fn.multihead_attention(4, batch_first=True)
    layer = fn.distributed.parallel_attention(4, mesh(), batch_first=True, sequence=True)

    def given(query):
        return {"query": query, "key_padding_mask": masks[0], "attn_mask": masks[1]}

    params, _ = single.init(fn.random.key(1), query)
    own, _ = layer.init(fn.random.key(1), axis.part(query, 1))
    y, pullback, _ = single.vjp(params, given(query))
    own_y, own_pullback, _ = layer.vjp(own, given(axis.part(query, 1)))
    close(axis.gather(own_y, 1), y)
    own_dx = own_pullback(axis.part(dy, 1))[1]
    close({**own_dx, "query": axis.gather(own_dx["query"], 1)}, pullback(dy)[1])


def test_masks_stay_whole_where_tokens_are_in_parts(two_ranks):
    two_ranks(masks_of_all_tokens)


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
    fn.testing.check_layer(fn.distributed.parted_dropout(0.3, one), normal(0, 5, 4))
    table = fn.distributed.vocabulary_embedding(7, 2, one, dtype=FLOAT)
    fn.testing.check_layer(table, tokens(0, 5, vocabulary=7))
    loss = fn.distributed.vocabulary_cross_entropy(one, label_smoothing=0.1)
    fn.testing.check_loss(loss, normal(0, 4, 5), tokens(0, 4, vocabulary=5))


D = fn.distributed


def attended(sequence=False, **inputs):
    """The y of 3 examples of 8 tokens, which with ``sequence`` are a rank's tokens."""
    layer = D.parallel_attention(8, MESH, batch_first=True, sequence=sequence)
    x = {"query": torch.ones(3, 8, 16, device="meta"), **inputs}
    return layer.init(fn.random.key(0), x)


HIDDEN = torch.zeros(3, 8, dtype=torch.bool, device="meta")
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
        (
            lambda: D.parallel_attention(8, MESH, dropout=2),
            ValueError,
            "^parallel_attention: dropout",
        ),
        (
            lambda: attended(key_padding_mask=HIDDEN[:, :5]),
            ValueError,
            r"^parallel_attention: expects key_padding_mask of shape \(3, 8\), got \(3, 5\)",
        ),
        (
            lambda: attended(True, key_padding_mask=HIDDEN),
            ValueError,
            r"^parallel_attention: expects key_padding_mask of shape \(3, 32\), got \(3, 8\)",
        ),
        (
            lambda: attended(attn_mask=HIDDEN[None, None]),
            ValueError,
            "^parallel_attention: expects one attn_mask",
        ),
        (
            lambda: attended(key=torch.ones(3, 8, device="meta")),
            ValueError,
            "^parallel_attention: expects inputs of shape",
        ),
        (lambda: D.parallel_encoder_layer(4, MESH, activation="no"), ValueError, "parallel_encod"),
        (
            lambda: D.parallel_encoder_layer(4, MESH, activation=fn.prelu()),
            ValueError,
            r"_layer: expects an activation without params and state, got prelu\(\)",
        ),
        (
            lambda: D.parallel_encoder_layer(
                4, MESH, activation=fn.serial(fn.relu(), fn.dropout(0.5))
            ),
            ValueError,
            r"an activation that draws no numbers, got serial\(relu\(\), dropout.*dropout=p",
        ),
        (lambda: D.vocabulary_embedding(7, 2, MESH, 9), ValueError, "padding_idx must be within 7"),
        (
            lambda: D.vocabulary_embedding(7, 2, MESH).init(fn.random.key(0), X),
            TypeError,
            "vocabulary_embedding: expects int32 or int64 indices",
        ),
        (
            lambda: D.own_tokens(fn.dropout(), MESH),
            ValueError,
            r"that draws no numbers, got dropout; .* use parted_dropout\(p, mesh, dim=",
        ),
        (
            lambda: D.own_tokens(fn.sinusoidal_positions(), MESH),
            ValueError,
            "own_tokens: expects a layer of each token alone, got sinusoidal_positions, which",
        ),
        (
            lambda: D.own_tokens(fn.serial(fn.linear(3), fn.learned_positions(8)), MESH),
            ValueError,
            r"got learned_positions at '1', .* or vocabulary_embedding\(sequence=\)",
        ),
        (
            lambda: D.own_tokens(fn.transformer_encoder_layer(2, dropout=0.0), MESH),
            ValueError,
            r"got scaled_dot_product_attention at 'self_attn.attention', .* use parallel_attention",
        ),
        (lambda: D.parted_dropout(2, MESH), ValueError, r"parted_dropout: p must be in \[0, 1\]"),
        (lambda: D.parted_dropout(0.5, MESH, size=-1), ValueError, "parted_dropout: size must be"),
        (
            lambda: D.parted_dropout(0.5, MESH, dim=0.5),
            TypeError,
            "dim must be an integer, got 0",
        ),
        (
            lambda: D.parted_dropout(0.5, MESH, dim=2).init(fn.random.key(0), X),
            ValueError,
            r"parted_dropout: expects a dimension 2, got \(3, 4\)",
        ),
        (
            lambda: D.parted_dropout(0.5, MESH, size=25).init(fn.random.key(0), X),
            ValueError,
            r"parted_dropout: expects 7 of 25 in dimension -1, got \(3, 4\)",
        ),
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
