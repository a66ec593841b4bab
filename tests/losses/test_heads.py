"""Layers that end in a loss: all classes of the adaptive softmax, chunks, what they refuse."""

import pytest
import torch
from layers.oracle import assert_near, autograd, params_of, randn, randomize
from torch import nn

import funcnet as fn

ROWS = randn(7, 8)
CLASSES = torch.tensor([0, 9, 4, 5, 2, 1, 1])


def adaptive():
    module = randomize(nn.AdaptiveLogSoftmaxWithLoss(8, 10, [3, 5], 2.0, True).double())
    return module, fn.adaptive_log_softmax(10, [3, 5], 2.0, True)


def test_the_log_probabilities_of_all_classes_are_torchs():
    module, layer = adaptive()
    params, dy = params_of(module), randn(7, 10)
    y, pullback, _ = layer.vjp(params, ROWS)

    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner.log_prob(x)

    def function(params, x):
        flat = fn.tree.to_dotted({"inner": params})
        return torch.func.functional_call(All(), flat, (x,))

    expected, dparams, dx = autograd(function, params, ROWS, dy)
    assert_near(y, expected)
    assert_near(pullback(dy), (dparams, dx))


def test_the_rows_of_a_cluster_give_what_all_rows_give():
    module, layer = adaptive()
    params, dy = params_of(module), (randn(7), randn())

    def run(x):
        y, pullback, _ = layer.vjp(params, (x, CLASSES))
        return y, pullback(dy)

    assert_near(fn.tree.map(lambda leaf: leaf[0], fn.vmap(run)(ROWS[None])), run(ROWS))


def test_a_cluster_is_computed_for_its_rows_alone():
    _, layer = adaptive()
    params, _ = layer.init(fn.key(0), (ROWS, CLASSES))
    _, pullback, _ = layer.vjp(params, (ROWS, CLASSES))
    sizes = [leaf.shape[0] for leaf in fn.tree.leaves(pullback) if leaf.shape[1:] == (8,)]
    # Weights and inputs of the head, of classes 3 and 4, and of classes 5 to 9.
    assert sizes == [5, 7, 4, 1, 2, 2]


def test_adaptive_log_softmax_refuses():
    _, layer = adaptive()
    params, _ = layer.init(fn.key(0), ROWS)
    for target, error, match in (
        (CLASSES + 1, ValueError, r"classes in \[0, 10\), got 1 to 10"),
        (CLASSES.int(), TypeError, "expects an int64 target"),
        (CLASSES[:3], ValueError, r"got \(7, 8\) and \(3,\)"),
    ):
        with pytest.raises(error, match=f"adaptive_log_softmax: .*{match}"):
            layer.apply(params, (ROWS, target))
    with pytest.raises(ValueError, match=r"expects a tuple \(input, target\)"):
        layer.apply(params, (ROWS,))
    with pytest.raises(ValueError, match="div_value must be > 0"):
        fn.adaptive_log_softmax(10, [3], 0.0)
    for cutoffs in ([], [5, 3], [3, 3], [0, 3], [3, 10], [2.5]):
        with pytest.raises(ValueError, match=r"ascending cutoffs, each in \[1, 9\]"):
            fn.adaptive_log_softmax(10, cutoffs)


CHUNKS = [
    nn.LinearCrossEntropyOptions(batch_chunk_size=3),
    nn.LinearCrossEntropyOptions(batch_chunk_size=7),
    nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio:2"),
    nn.LinearCrossEntropyOptions(),
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", CHUNKS)
def test_chunks_give_what_the_whole_gives(options, reduction):
    weight = randn(10).exp()
    results = []
    for chunks in (None, options):
        layer = fn.linear_cross_entropy(
            10, bias=True, weight=weight, reduction=reduction, options=chunks
        )
        params, _ = layer.init(fn.key(0), (ROWS, CLASSES))
        y, pullback, _ = layer.vjp(params, (ROWS, CLASSES))
        results.append((y, pullback(torch.ones_like(y))))
    assert_near(results[1], results[0])


def test_the_residuals_of_chunks_have_no_logits():
    rows, classes = randn(64, 4, dtype=torch.float32), torch.arange(64)
    held = []
    for options in (None, CHUNKS[0]):
        layer = fn.linear_cross_entropy(100, options=options)
        params, _ = layer.init(fn.key(0), (rows, classes))
        _, pullback, _ = layer.vjp(params, (rows, classes))
        held.append(max(leaf.numel() for leaf in fn.tree.leaves(pullback)))
    assert held == [6400, 400]


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (CHUNKS[0], 3),
        (nn.LinearCrossEntropyOptions(chunking_method=None), 1000),
        (nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio"), 128),
        (nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio:4"), 32),
        (nn.LinearCrossEntropyOptions(), 64),
    ],
)
def test_the_size_of_a_chunk_is_torchs(options, size):
    from funcnet.losses.linear_cross_entropy import chunk_size

    assert chunk_size(options, 1000, 16, 160) == size


def test_linear_cross_entropy_refuses():
    layer = fn.linear_cross_entropy(10, out_features=(2,))
    with pytest.raises(ValueError, match=r"linear_cross_entropy: expects an input of \(batch"):
        layer.init(fn.key(0), (ROWS[0], CLASSES[0]))
    layer = fn.linear_cross_entropy(10, ignore_index=3, options=CHUNKS[0])
    params, _ = layer.init(fn.key(0), (ROWS, CLASSES))
    with pytest.raises(ValueError, match="ignores no class of probabilities, got 3"):
        layer.apply(params, (ROWS, randn(7, 10).softmax(-1)))
    with pytest.raises(ValueError, match=r"linear_cross_entropy: .*classes in \[0, 10\)"):
        layer.apply(params, (ROWS, CLASSES + 1))
    with pytest.raises(ValueError, match="a weight for each of 10 classes"):
        fn.linear_cross_entropy(10, weight=torch.ones(3))
    with pytest.raises(TypeError, match="out_features must be a tuple of ints"):
        fn.linear_cross_entropy(10, out_features=2)
    with pytest.raises(ValueError, match="num_classes must be > 0"):
        fn.linear_cross_entropy(0)
    both = nn.LinearCrossEntropyOptions(batch_chunk_size=3, chunking_method="aspect_ratio")
    with pytest.raises(ValueError, match="expects a chunk size or a chunking method"):
        fn.linear_cross_entropy(10, options=both).apply(params, (ROWS, CLASSES))
