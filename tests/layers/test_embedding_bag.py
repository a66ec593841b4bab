import itertools

import pytest
import torch
from layers.oracle import assert_near, check_module, randn, strided, transposed
from torch import nn
from torch.nn import functional as F

import funcnet as fn

ROWS, COLUMNS = 7, 3
INDICES = torch.tensor([2, 0, 6, 6, 1, 2, 5, 3, 2, 4])
MATRIX = INDICES.reshape(2, 5)
INPUTS = {
    "matrix": MATRIX,
    "matrix in a tuple": (MATRIX,),
    "matrix without offsets": (MATRIX, None),
    "one bag": INDICES[None],
    "bags of one": INDICES[:, None],
    "no bag": MATRIX[:0],
    "offsets": (INDICES, torch.tensor([0, 3, 4])),
    "empty bags": (INDICES, torch.tensor([0, 0, 3, 3, 8, 10, 10])),
    "offsets of one bag": (INDICES, torch.tensor([0])),
    "all bags empty": (INDICES[:0], torch.tensor([0, 0])),
    "int32": (INDICES.int(), torch.tensor([0, 3, 4], dtype=torch.int32)),
    "two integers": (INDICES, torch.tensor([0, 3, 4], dtype=torch.int32)),
}
WEIGHTED = {
    "matrix": (MATRIX, None, randn(2, 5)),
    "offsets": (INDICES, torch.tensor([0, 0, 3, 4]), randn(10)),
    "no weights": (INDICES, torch.tensor([0, 0, 3, 4]), None),
}
OPTIONS = {
    "defaults": {},
    "padding_idx": {"padding_idx": 2},
    "last padding_idx": {"padding_idx": -1},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "max_norm": {"max_norm": 1.0},
    "max_norm of p 1": {"max_norm": 2.0, "norm_type": 1.0},
    "all": {"padding_idx": 2, "max_norm": 1.5, "scale_grad_by_freq": True},
}


CASES = [
    pytest.param({"mode": mode, **options}, id=f"{mode} {name}")
    for mode, (name, options) in itertools.product(("sum", "mean", "max"), OPTIONS.items())
    if mode != "max" or "scale_grad_by_freq" not in options
]


def make(**options):
    return fn.embedding_bag(ROWS, COLUMNS, **options)


class ByFrequency(nn.EmbeddingBag):
    """What ``scale_grad_by_freq`` is documented to do.

    On the CPU torch divides by the frequency of another row, where a row occurs several times.
    """

    def forward(self, x, offsets=None, per_sample_weights=None):
        counts = torch.bincount(x.flatten(), minlength=ROWS).clamp(min=1)[:, None]
        constant = self.weight.detach()
        if self.max_norm is not None:
            constant = torch.renorm(constant, self.norm_type, 0, self.max_norm)
        weight = constant + (self.weight - self.weight.detach()) / counts
        rest = {"mode": self.mode, "padding_idx": self.padding_idx}
        rest |= {"include_last_offset": self.include_last_offset}
        return F.embedding_bag(x, weight, offsets, per_sample_weights=per_sample_weights, **rest)


def module(**options):
    kind = ByFrequency if options.get("scale_grad_by_freq") else nn.EmbeddingBag
    return kind(ROWS, COLUMNS, **options)


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("name", INPUTS)
def test_embedding_bag_is_torchs(name, options):
    check_module(make(**options), module(**options), INPUTS[name])


@pytest.mark.parametrize("options", [case for case in CASES if case.values[0]["mode"] == "sum"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_embedding_bag_of_weighted_samples_is_torchs(name, options):
    check_module(make(**options), module(**options), WEIGHTED[name])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_with_the_last_offset_is_torchs(mode):
    options = {"mode": mode, "include_last_offset": True}
    check_module(make(**options), module(**options), (INDICES, torch.tensor([0, 3, 3, 10])))
    check_module(make(**options), module(**options), MATRIX)  # for which it is ignored


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_what_is_behind_the_last_offset_counts_nothing(mode):
    # torch's own kernel reads and writes beyond its tensors there.
    layer, weight = make(mode=mode, include_last_offset=True), {"weight": randn(ROWS, COLUMNS)}
    dy = randn(2, COLUMNS, seed=3)
    y, pullback, _ = layer.vjp(weight, (INDICES, torch.tensor([0, 3, 7])))
    expected, again, _ = layer.vjp(weight, (INDICES[:7], torch.tensor([0, 3, 7])))
    assert_near((y, pullback(dy)), (expected, again(dy)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", CASES)
def test_embedding_bag_computes_in_the_dtype_of_its_weight(options, dtype):
    layer, theirs = make(**options, dtype=dtype), module(**options, dtype=dtype)
    params, _ = layer.init(fn.key(0), MATRIX)
    assert params["weight"].dtype == dtype
    with torch.no_grad():
        theirs.weight.copy_(params["weight"])
    expected = theirs(MATRIX)
    y, pullback, _ = layer.vjp(params, MATRIX)
    dy = randn(*y.shape, dtype=dtype)
    expected.backward(dy)
    found = (y, pullback(dy)[0]["weight"])
    tolerance = {torch.float16: 3e-3}.get(dtype)
    assert_near(found, (expected.detach(), theirs.weight.grad), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_bag_has_the_dtype_of_its_weights(dtype):
    x = (MATRIX, None, randn(2, 5, dtype=dtype))
    check_module(make(mode="sum"), module(mode="sum"), x)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_takes_what_is_not_contiguous(mode):
    x = transposed(MATRIX)
    check_module(make(mode=mode), module(mode=mode), x, dy=transposed(randn(2, COLUMNS)))
    expanded = torch.ones((), dtype=torch.float64).expand(2, COLUMNS)
    check_module(make(mode=mode), module(mode=mode), x, dy=expanded)
    if mode == "sum":
        check_module(make(mode=mode), module(mode=mode), (x, None, strided(randn(2, 5))))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag_is_the_embedding_reduced(mode):
    weight = {"weight": randn(ROWS, COLUMNS)}
    y, _ = make(mode=mode).apply(weight, MATRIX)
    rows, _ = fn.embedding(ROWS, COLUMNS).apply(weight, MATRIX)
    assert_near(y, getattr(rows, mode)(1))


def test_the_greatest_of_a_bag_that_has_it_twice_is_the_first():
    weight = torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64)
    layer = fn.embedding_bag(3, 1, mode="max")
    y, pullback, _ = layer.vjp({"weight": weight}, torch.tensor([[2, 1, 0]]))
    assert float(y) == 1.0
    dweight = pullback(torch.ones_like(y))[0]["weight"]
    assert dweight.flatten().tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_padding_alone_and_of_no_columns_are_zeros(mode):
    layer, params = make(mode=mode, padding_idx=2), {"weight": randn(ROWS, COLUMNS)}
    for x in (torch.full((2, 3), 2), torch.zeros(2, 0, dtype=torch.int64)):
        y, pullback, _ = layer.vjp(params, x)
        zeros = torch.zeros(2, COLUMNS, dtype=torch.float64)
        assert_near(y, zeros)
        expected = {"weight": torch.zeros(ROWS, COLUMNS, dtype=torch.float64)}
        assert_near(pullback(zeros + 1)[0], expected)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}])
def test_embedding_bag_leaves_its_weight_as_it_is(options):
    weight = randn(ROWS, COLUMNS)
    before = weight.clone()
    make(**options).apply({"weight": weight}, MATRIX)
    assert torch.equal(weight, before)


def test_embedding_bag_takes_its_options_in_torchs_order():
    layer = fn.embedding_bag(ROWS, COLUMNS, 1.0, 1.0, True, "sum", False, True, 2)
    theirs = ByFrequency(ROWS, COLUMNS, 1.0, 1.0, True, "sum", False, None, True, 2)
    check_module(layer, theirs, (INDICES, torch.tensor([0, 3, 3, 10])))


def test_embedding_bag_starts_as_torchs():
    layer = fn.embedding_bag(500, 40, padding_idx=-2)
    params, state = layer.init(fn.key(0), MATRIX)
    weight = params["weight"]
    assert weight.dtype == torch.float32
    assert state == {}
    assert torch.equal(weight[498], torch.zeros(40))
    rest = weight[torch.arange(500) != 498]
    assert abs(float(rest.mean())) < 4 / 20_000**0.5
    assert abs(float(rest.std()) - 1) < 4 / 40_000**0.5
    other = fn.embedding_bag(3, 2, weight_init=fn.initializers.ones(), dtype=torch.float64)
    assert_near(other.init(fn.key(0), MATRIX)[0]["weight"], torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_population_of_embedding_bags_each_with_its_own_bags(mode):
    layer = make(mode=mode, dtype=torch.float64)
    offsets = torch.tensor([[0, 3, 4], [0, 0, 10], [0, 9, 9]])
    weights = randn(3, ROWS, COLUMNS)
    dy = randn(3, 3, COLUMNS, seed=4)

    def run(weight, offsets, dy):
        y, pullback, _ = layer.vjp({"weight": weight}, (INDICES, offsets))
        return y, pullback(dy)[0]["weight"]

    together = fn.vmap(run)(weights, offsets, dy)
    alone = [run(*member) for member in zip(weights, offsets, dy, strict=True)]
    assert_near(together, tuple(torch.stack(each) for each in zip(*alone, strict=True)))


@pytest.mark.cpu_only
def test_embedding_bag_under_jit_is_the_eager_one():
    weight, dy = randn(ROWS, COLUMNS), randn(4, COLUMNS, seed=5)
    x = (INDICES, torch.tensor([0, 3, 3, 6]), randn(10))

    def run(weight, x, dy):
        results = []
        for options in ({"mode": "sum"}, {"mode": "mean", "max_norm": 1.0}, {"mode": "max"}):
            given = x if options["mode"] == "sum" else x[:2]
            layer = make(padding_idx=2, dtype=torch.float64, **options)
            y, pullback, _ = layer.vjp({"weight": weight}, given)
            results.append((y, pullback(dy)))
        return results

    assert_near(fn.jit(run)(weight, x, dy), run(weight, x, dy))


def test_the_formula_can_be_differentiated():
    weight = randn(ROWS, COLUMNS)
    layer = make(mode="sum")
    x = (MATRIX, None, randn(2, 5))

    def ours(weight, samples):
        return layer.apply({"weight": weight}, (MATRIX, None, samples))[0].square().sum()

    def theirs(weight, samples):
        y = F.embedding_bag(MATRIX, weight, mode="sum", per_sample_weights=samples)
        return y.square().sum()

    arguments = (weight, x[2])
    found = torch.func.grad(ours, (0, 1))(*arguments)
    leaves = [leaf.clone().requires_grad_() for leaf in arguments]
    assert_near(found, torch.autograd.grad(theirs(*leaves), leaves))


REFUSED = {
    "one dimension without offsets": (
        INDICES,
        {},
        ValueError,
        r"expects indices of shape \(batch, length\), or \(n,\) with offsets, got int64 \(10,\)",
    ),
    "three dimensions": (
        INDICES.reshape(1, 2, 5),
        {},
        ValueError,
        r"expects indices of shape \(batch, length\), or \(n,\) with offsets, got int64 \(1, 2,",
    ),
    "a matrix with offsets": (
        (MATRIX, torch.tensor([0])),
        {},
        ValueError,
        r"expects indices of shape \(batch, length\), or \(n,\) with offsets, got \(int64 \(2, 5\)",
    ),
    "floating indices": (
        MATRIX.double(),
        {},
        TypeError,
        r"expects int32 or int64 indices, got float64 \(2, 5\)",
    ),
    "floating offsets": (
        (INDICES, torch.zeros(1)),
        {},
        TypeError,
        r"expects int32 or int64 offsets, got float32 \(1,\)",
    ),
    "offsets of two dimensions": (
        (INDICES, torch.zeros(1, 1, dtype=torch.int64)),
        {},
        ValueError,
        r"expects offsets of shape \(bags,\), got \(1, 1\)",
    ),
    "four inputs": (
        (MATRIX, None, None, None),
        {},
        ValueError,
        r"expects indices or a tuple \(indices, offsets or None, per_sample_weights or None\), got",
    ),
    "no offsets": (
        (INDICES, INDICES[:0]),
        {},
        ValueError,
        "expects at least one offset, got none",
    ),
    "no last offset": (
        (INDICES[:0], INDICES[:0]),
        {"include_last_offset": True},
        ValueError,
        "expects at least one offset, got none",
    ),
    "weights with the mean": (
        (MATRIX, None, randn(2, 5)),
        {"mode": "mean"},
        ValueError,
        "expects per_sample_weights with mode 'sum' only, got 'mean'",
    ),
    "weights that are integers": (
        (MATRIX, None, MATRIX),
        {"mode": "sum"},
        TypeError,
        r"expects floating-point per_sample_weights, got int64 \(2, 5\)",
    ),
    "weights of another shape": (
        (MATRIX, None, randn(5)),
        {"mode": "sum"},
        ValueError,
        r"expects per_sample_weights of the indices' shape \(2, 5\), got \(5,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_embedding_bag_refuses_what_are_no_bags(name):
    x, options, error, message = REFUSED[name]
    layer = make(**options)
    params = {"weight": randn(ROWS, COLUMNS)}
    for call in (lambda: layer.init(fn.key(0), x), lambda: layer.apply(params, x)):
        with pytest.raises(error, match=f"^embedding_bag: {message}"):
            call()
    with pytest.raises(error, match=f"^serial\\['bags'\\] embedding_bag: {message}"):
        fn.serial(bags=layer).vjp({"bags": params}, x)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[0, 7]]), r"expects indices in \[0, 7\), got indices from 0 to 7"),
        (torch.tensor([[-1, 3]]), r"expects indices in \[0, 7\), got indices from -1 to 3"),
        ((INDICES, torch.tensor([0, 4, 3])), "expects sorted offsets, got some that fall"),
        ((INDICES, torch.tensor([1, 4])), "expects offsets that start at 0, got 1"),
        (
            (INDICES, torch.tensor([0, 4, 11])),
            "expects offsets up to the number of indices 10, got 11",
        ),
    ],
)
def test_embedding_bag_refuses_indices_and_offsets_out_of_range(x, message):
    layer, params = make(), {"weight": randn(ROWS, COLUMNS)}
    for call in (layer.apply, layer.vjp):
        with pytest.raises(ValueError, match=f"^embedding_bag: {message}$"):
            call(params, x)


def test_embedding_bag_refuses_weights_of_another_dtype_than_its_own():
    x = (MATRIX, None, randn(2, 5))
    with pytest.raises(TypeError, match=r"^embedding_bag: weight is torch.float32, x is torch.fl"):
        make(mode="sum").apply({"weight": torch.ones(ROWS, COLUMNS)}, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "min"}, "mode must be one of sum, mean, max, got 'min'"),
        ({"sparse": True}, "sparse must be False, got True"),
        (
            {"mode": "max", "scale_grad_by_freq": True},
            "scale_grad_by_freq is for mode 'sum' or 'mean', got 'max'",
        ),
        ({"padding_idx": 7}, "padding_idx must be within 7 rows, got 7"),
        ({"padding_idx": -8}, "padding_idx must be within 7 rows, got -8"),
    ],
)
def test_embedding_bag_refuses_options_that_it_has_not(options, message):
    with pytest.raises(ValueError, match=f"^embedding_bag: {message}"):
        make(**options)


def test_a_population_of_embedding_bags_each_with_inputs_of_its_own():
    layer = make(mode="sum", dtype=torch.float64)
    indices = torch.stack([MATRIX, MATRIX.flip(0), MATRIX.flip(1)])
    weights, samples = randn(3, ROWS, COLUMNS), randn(3, 2, 5)

    def run(weight, indices, samples):
        y, pullback, _ = layer.vjp({"weight": weight}, (indices, None, samples))
        (dparams, dx) = pullback(y)
        return y, dparams["weight"], dx[2]

    together = fn.vmap(run)(weights, indices, samples)
    alone = [run(*member) for member in zip(weights, indices, samples, strict=True)]
    assert_near(together, tuple(torch.stack(each) for each in zip(*alone, strict=True)))
