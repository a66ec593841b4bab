import pytest
import torch
from layers.oracle import assert_near, check_module, randn, strided, transposed
from torch import nn

import funcnet as fn

SHAPES = {
    "rows": ((5, 4), (5, 4)),
    "vectors": ((4,), (4,)),
    "images": ((2, 4, 3), (2, 4, 3)),
    "one to many": ((5, 4), (1, 4)),
    "each to each": ((5, 1, 4), (1, 3, 4)),
    "fewer dimensions": ((2, 5, 4), (5, 4)),
    "nothing": ((0, 4), (0, 4)),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
DEGREES = [2.0, 1.0, 3.0, 0.5, 1.5, 0.0, torch.inf, -torch.inf, -1.0]


def pair(name, dtype=torch.float64):
    first, second = SHAPES[name]
    return randn(*first, dtype=dtype), randn(*second, seed=1, dtype=dtype)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "dim"),
    [
        *[("rows", 0), ("rows", 1), ("vectors", 0), ("images", 0), ("images", 1), ("images", -1)],
        *[("one to many", 1), ("each to each", 2), ("fewer dimensions", 1), ("nothing", 1)],
        *[("fewer dimensions", -1), ("nothing", 0)],
    ],
)
def test_cosine_similarity_is_torchs(name, dim, dtype):
    for train in (True, False):
        layer, module = fn.cosine_similarity(dim), nn.CosineSimilarity(dim)
        check_module(layer, module, pair(name, dtype), train=train)


@pytest.mark.parametrize("eps", [1e-8, 0.5, 2.0, 100.0])
def test_cosine_similarity_of_short_vectors_is_torchs(eps):
    check_module(fn.cosine_similarity(1, eps), nn.CosineSimilarity(1, eps), pair("rows"))


@pytest.mark.parametrize(
    "x",
    [
        (zeros(3, 4), randn(3, 4)),
        (randn(3, 4), zeros(3, 4)),
        (zeros(3, 4), zeros(3, 4)),
        (1e-9 * randn(3, 4), randn(3, 4, seed=1)),
    ],
    ids=["zero and other", "other and zero", "zeros", "shorter than eps"],
)
def test_cosine_similarity_of_special_vectors_is_torchs(x):
    check_module(fn.cosine_similarity(), nn.CosineSimilarity(), x)


@pytest.mark.parametrize(
    ("x", "dim"),
    [
        ((randn(3, 4), randn(3, 4)), 1),
        ((randn(3, 4), -2 * randn(3, 4)), 1),
        ((randn(5, 4), randn(1, 4, seed=1)), 0),
    ],
    ids=["equal", "opposite", "broadcast along dim"],
)
def test_cosine_similarity_whose_derivative_is_zero_is_torchs_up_to_rounding(x, dim):
    leaves = [part.clone().requires_grad_() for part in x]
    expected = nn.CosineSimilarity(dim)(*leaves)
    dy = randn(*expected.shape, seed=3)
    grads = torch.autograd.grad(expected, leaves, dy)
    y, pullback, _ = fn.cosine_similarity(dim).vjp({}, x)
    assert_near(y, expected.detach())
    for ours, theirs in zip(pullback(dy)[1], grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("p", DEGREES)
@pytest.mark.parametrize("name", SHAPES)
def test_pairwise_distance_is_torchs(name, p, keepdim, dtype):
    options = (p, 1e-6, keepdim)
    x = pair(name, dtype)
    for train in (True, False):
        check_module(fn.pairwise_distance(*options), nn.PairwiseDistance(*options), x, train=train)


@pytest.mark.parametrize("eps", [1e-6, 0.0, 0.5])
@pytest.mark.parametrize("p", DEGREES)
def test_pairwise_distance_of_equal_vectors_is_torchs(p, eps):
    x = randn(3, 4)
    check_module(fn.pairwise_distance(p, eps), nn.PairwiseDistance(p, eps), (x, x.clone()))


@pytest.mark.parametrize("p", DEGREES)
def test_pairwise_distance_of_vectors_that_agree_in_part_is_torchs(p):
    x = torch.tensor([[1.0, 2.0, 3.0, -1.0], [0.0, 0.0, 5.0, 5.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 0.0, 5.0, -1.0], [0.0, 0.0, 4.0, 6.0]], dtype=torch.float64)
    check_module(fn.pairwise_distance(p, 0.0), nn.PairwiseDistance(p, 0.0), (x, other))


@pytest.mark.parametrize("rearrange", [transposed, strided])
def test_similarity_and_distance_take_what_is_not_contiguous(rearrange):
    x = (rearrange(randn(5, 2, 6)), rearrange(randn(5, 2, 6, seed=1)))
    dy = rearrange(randn(5, 6, seed=2))
    check_module(fn.cosine_similarity(), nn.CosineSimilarity(), x, dy=dy)
    dy = rearrange(randn(5, 2, seed=2))
    check_module(fn.pairwise_distance(), nn.PairwiseDistance(), x, dy=dy)


@pytest.mark.cpu_only
def test_similarity_and_distance_under_jit_are_the_eager_ones():
    layers = [
        fn.cosine_similarity(),
        *[fn.pairwise_distance(p) for p in (2.0, 1.0, torch.inf, 0.5)],
    ]

    def run(x):
        results = []
        for layer in layers:
            y, pullback, _ = layer.vjp({}, x)
            results.append((y, pullback(y)[1]))
        return results

    x = pair("one to many")
    assert_near(fn.jit(run)(x), run(x))


@pytest.mark.parametrize("name", ["cosine_similarity", "pairwise_distance"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (randn(3, 4), ValueError, r"expects a tuple \(x1, x2\) of tensors, got float64 \(3, 4\)"),
        ((randn(3, 4),) * 3, ValueError, r"expects a tuple \(x1, x2\) of tensors, got \(float64 "),
        (
            (randn(3, 4), randn(3, 4).float()),
            TypeError,
            r"expects floating-point tensors of one dtype, got \(float64 \(3, 4\), float32 \(3,",
        ),
        (
            (randn(3, 4), randn(3, 5)),
            ValueError,
            r"expects shapes that broadcast, got \(3, 4\) and \(3, 5\)",
        ),
        ((randn(), randn()), ValueError, r"expects vectors, got \(\) and \(\)"),
    ],
)
def test_similarity_and_distance_refuse_what_is_no_pair(name, x, error, message):
    layer = getattr(fn, name)()
    for call in (lambda: layer.init(fn.key(0), x), lambda: layer.vjp({}, x)):
        with pytest.raises(error, match=f"^{name}: {message}"):
            call()
    with pytest.raises(error, match=f"^serial\\['pair'\\] {name}: {message}"):
        fn.serial(pair=layer).apply({}, x)


@pytest.mark.parametrize("dim", [2, -3])
def test_cosine_similarity_refuses_a_dimension_that_is_not_there(dim):
    message = rf"^cosine_similarity: expects a dimension {dim}, got \(5, 4\) and \(5, 4\)$"
    with pytest.raises(ValueError, match=message):
        fn.cosine_similarity(dim).apply({}, pair("rows"))
