"""Pooling of all kinds, in one, two and three dimensions, held to torch.nn."""

import math

import pytest
import torch
from layers.oracle import assert_near, check_against, check_module, randn, strided, transposed
from torch import nn
from torch.testing._internal.common_modules import module_db

import funcnet as fn

BATCHES = {1: (2, 3, 11), 2: (2, 3, 9, 8), 3: (2, 3, 6, 7, 5)}
NAMES = {
    "MaxPool": "max_pool", "AvgPool": "avg_pool", "LPPool": "lp_pool",
    "AdaptiveMaxPool": "adaptive_max_pool", "AdaptiveAvgPool": "adaptive_avg_pool",
    "MaxUnpool": "max_unpool", "FractionalMaxPool": "fractional_max_pool",
}  # fmt: skip
LAST = {1: 2, 2: (3, 2), 3: (2, 3, 2)}

# By class: arguments, of which LAST stands for a different number for each dimension.
CASES = {
    "MaxPool": [
        (2,), (3, 1), (3, 2, 1), (2, 1, 0, 2), (LAST, LAST, 1), (3, None, 1, 1, False, True),
        (2, 3, 1, 1, False, True), (3, 2, 1, 2, True, True), (1,),
    ],
    "AvgPool": [
        (2,), (3, 1), (3, 2, 1), (LAST, LAST), (LAST, None, 1), (3, 2, 1, True),
        (2, 3, 1, True, False), (3, 2, 1, True, False), (3, 1, 1, False, False), (1,),
    ],
    "LPPool": [
        (2, 2), (1.5, 3, 2), (3, LAST), (2, 3, 2, True), (1, 2), (0.5, 2), (-1, 2), (-3.5, 2),
        (math.inf, 3, 2, True), (-math.inf, 2), (-math.inf, 3, 2, True),
    ],
    "AdaptiveMaxPool": [(3,), (1,), (LAST,), (5, True), (7,)],
    "AdaptiveAvgPool": [(3,), (1,), (LAST,), (5,), (7,)],
}  # fmt: skip
ROWS = [(kind, args, dims) for kind, cases in CASES.items() for args in cases for dims in (1, 2, 3)]


def pair(kind, args, dims, **options):
    """The layer and the module."""
    args = [LAST[dims] if each is LAST else each for each in args]
    layer = getattr(fn, f"{NAMES[kind]}{dims}d")(*args, **options)
    return layer, getattr(nn, f"{kind}{dims}d")(*args, **options)


def example(kind, args, *shape, dtype=torch.float64):
    x = randn(*shape, dtype=dtype)
    # Other powers have no derivative, or no value, at zero and below it.
    return x.abs() + 0.1 if kind == "LPPool" and math.isfinite(args[0]) else x


@pytest.mark.parametrize(("kind", "args", "dims"), ROWS)
@pytest.mark.parametrize("single", [False, True])
def test_pooling_is_torchs(kind, args, dims, single):
    layer, module = pair(kind, args, dims)
    shape = BATCHES[dims][1:] if single else BATCHES[dims]
    for train in (True, False):
        check_module(layer, module, example(kind, args, *shape), train=train)


@pytest.mark.parametrize(("kind", "args", "dims"), ROWS)
def test_pooling_computes_in_float32(kind, args, dims):
    layer, module = pair(kind, args, dims)
    check_module(layer, module, example(kind, args, *BATCHES[dims], dtype=torch.float32))


# On the CPU torch has no average of volumes in half precision, which p-norms are made of, too.
# Other powers than 2 lose more digits than bfloat16 has.
HALF = [
    (kind, args, dims)
    for kind, args, dims in ROWS
    if not (kind == "LPPool" and args[0] not in (2, math.inf, -math.inf))
    and not (dims == 3 and (kind == "AvgPool" or (kind == "LPPool" and args[0] == 2)))
]


@pytest.mark.parametrize(("kind", "args", "dims"), HALF)
def test_pooling_computes_in_half_precision(kind, args, dims):
    layer, module = pair(kind, args, dims)
    check_module(layer, module, example(kind, args, *BATCHES[dims], dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("rearrange", [transposed, strided, lambda x: x[..., :1].expand(x.shape)])
def test_pooling_takes_inputs_and_cotangents_that_are_not_contiguous(kind, dims, rearrange):
    args = (2, 2) if kind == "LPPool" else (2,)
    layer, module = pair(kind, args, dims)
    x = rearrange(example(kind, args, *BATCHES[dims]))
    y = module(x)
    check_module(layer, module, x, dy=rearrange(randn(*y.shape)))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pooling_takes_an_empty_batch(kind, dims):
    layer, module = pair(kind, (2, 2) if kind == "LPPool" else (2,), dims)
    check_module(layer, module, randn(0, *BATCHES[dims][1:]))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("value", [0.0, 1.0, -math.inf, math.nan])
def test_pooling_treats_ties_and_what_is_not_finite_as_torch_does(kind, dims, value):
    x = randn(*BATCHES[dims])
    x[..., 1:4] = value
    if kind == "LPPool":
        x = x.abs()
    layer, module = pair(kind, (2, 2) if kind == "LPPool" else (2,), dims)
    check_module(layer, module, x)


@pytest.mark.parametrize(("kind", "dims"), [("AvgPool", 2), ("AvgPool", 3)])
@pytest.mark.parametrize("args", [(3, 2, 1, False, True, 5), (2, 1, 1, True, False, -3)])
def test_a_divisor_takes_the_place_of_the_number_of_points(kind, dims, args):
    check_module(*pair(kind, args, dims), randn(*BATCHES[dims]))


def test_avg_pool1d_has_a_divisor_too():
    x = randn(2, 3, 9)
    y, _ = fn.avg_pool1d(3, divisor_override=6).apply({}, x)
    assert_near(y, fn.avg_pool1d(3).apply({}, x)[0] / 2)


@pytest.mark.parametrize("kind", ["AdaptiveAvgPool", "AdaptiveMaxPool"])
@pytest.mark.parametrize("size", [(None, 3), (2, None), (None, None)])
def test_an_adaptive_size_of_none_is_that_of_the_input(kind, size):
    check_module(*pair(kind, (size,), 2), randn(2, 3, 5, 7))
    check_module(*pair(kind, ((*size, None),), 3), randn(2, 3, 5, 7, 2))


def test_one_none_is_the_size_of_the_input_in_all_dimensions():
    x = randn(2, 3, 5, 7)
    assert torch.equal(fn.adaptive_avg_pool2d(None).apply({}, x)[0], x)


@pytest.mark.parametrize("kind", ["AdaptiveAvgPool", "AdaptiveMaxPool"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_adaptive_size_of_0_gives_nothing_and_has_no_gradient(kind, dims):
    layer, module = pair(kind, (0,), dims)
    x = randn(*BATCHES[dims])
    y, pullback, _ = layer.vjp({}, x)
    assert y.shape == module(x).shape
    assert torch.equal(pullback(y)[1], torch.zeros_like(x))


def test_the_p_norm_of_zeros_has_the_gradient_zero():
    x = torch.zeros(1, 1, 4, dtype=torch.float64)
    for p in (1, 2, 3.5):
        check_module(fn.lp_pool1d(p, 2), nn.LPPool1d(p, 2), x)
    _, pullback, _ = fn.lp_pool1d(2, 2).vjp({}, x)
    assert torch.equal(pullback(torch.ones(1, 1, 2, dtype=torch.float64))[1], x)


INFOS = [info for info in module_db if "Pool" in info.module_cls.__name__]


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_pooling_passes_the_samples_of_pytorchs_module_database(info):
    name = info.module_cls.__name__
    layer = getattr(fn, NAMES[name[:-2]] + name[-2:])
    made = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    )
    assert made
    for sample in made:
        options, (x,) = sample.constructor_input.kwargs, sample.forward_input.args
        args = sample.constructor_input.args
        module = info.module_cls(*args, **options)
        own = {key.removeprefix("_"): value for key, value in options.items()}
        check_against(lambda params, x, module=module: module(x), layer(*args, **own), {}, x)


# Fractional pooling

FRACTIONAL = {
    "output size": (2, {"output_size": 3}),
    "output sizes": (LAST, {"output_size": LAST}),
    "ratio": (2, {"output_ratio": 0.5}),
    "one window": (3, {"output_size": 1}),
    "windows of one": (1, {"output_ratio": 0.7}),
}


@pytest.mark.parametrize("name", FRACTIONAL)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("indices", [False, True])
def test_fractional_pooling_is_torchs_with_its_samples(name, dims, dtype, indices):
    kernel, options = FRACTIONAL[name]
    kernel = LAST[dims] if kernel is LAST else kernel
    options = {key: LAST[dims] if value is LAST else value for key, value in options.items()}
    x = randn(2, 3, *(9, 8, 7)[:dims], dtype=dtype)
    samples = torch.rand(2, 3, dims, dtype=dtype, generator=torch.Generator().manual_seed(1))
    module = getattr(nn, f"FractionalMaxPool{dims}d")(
        kernel, **options, return_indices=indices, _random_samples=samples
    )
    layer = getattr(fn, f"fractional_max_pool{dims}d")(
        kernel, **options, return_indices=indices, random_samples=samples
    )
    check_against(lambda params, x: module(x), layer, {}, x)
    if dtype == torch.float64:
        y, expected = torch.vmap(lambda x: layer.apply({}, x)[0])(x[None]), layer.apply({}, x)[0]
        assert_near(y, fn.tree.map(lambda leaf: leaf[None], expected), 0.0)


def test_fractional_pooling_draws_from_its_key():
    layer, x = fn.fractional_max_pool2d(2, 5), randn(2, 3, 9, 12)
    module = nn.FractionalMaxPool2d(2, 5)
    for seed in (0, 1):
        key = fn.key(seed)
        samples = fn.random.uniform(key, (2, 3, 2), torch.float64)
        module.register_buffer("_random_samples", samples)
        check_against(lambda params, x: module(x), layer, {}, x, key=key)
    some, others = (layer.apply({}, x, key=fn.key(seed), train=True)[0] for seed in (0, 1))
    assert not torch.equal(some, others)


def test_fractional_pooling_lies_evenly_without_training():
    layer, x = fn.fractional_max_pool2d(2, 5), randn(3, 9, 12)
    samples = torch.full((1, 3, 2), 0.5, dtype=torch.float64)
    given = fn.fractional_max_pool2d(2, 5, random_samples=samples)
    assert_near(layer.apply({}, x)[0], given.apply({}, x, train=True)[0], 0.0)


def test_fractional_pooling_needs_a_key_to_train():
    with pytest.raises(ValueError, match=r"^fractional_max_pool3d: needs a key when train=True"):
        fn.fractional_max_pool3d(2, 2).vjp({}, randn(1, 4, 4, 4))


# Unpooling


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    ("args", "size"), [((2,), True), ((3,), True), ((3, 2), True), ((3, 2, 1), True), ((2,), False)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unpooling_is_torchs(dims, single, args, size, dtype):
    x = randn(2, 3, *(8, 6, 4)[:dims], dtype=dtype)
    x = x[0] if single else x
    pool, _ = pair("MaxPool", (*args, *(None, 0)[len(args) - 1 :], 1, True), dims)
    values, indices = pool.apply({}, x)[0]
    options = {"output_size": x.shape[-dims:]} if size else {}
    layer = getattr(fn, f"max_unpool{dims}d")(*args, **({"output_size": x.shape} if size else {}))
    module = getattr(nn, f"MaxUnpool{dims}d")(*args)
    check_against(lambda params, x: module(*x, *options.values()), layer, {}, (values, indices))


def test_unpooling_after_pooling_is_one_net():
    net = fn.serial(fn.max_pool2d(2, return_indices=True), fn.max_unpool2d(2))

    def function(params, x):
        y, indices = nn.functional.max_pool2d(x, 2, return_indices=True)
        return nn.functional.max_unpool2d(y, indices, 2)

    check_against(function, net, {}, randn(2, 3, 6, 4))


def test_unpooling_takes_an_empty_batch():
    values, indices = torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, 2, 2, dtype=torch.int64)
    assert fn.max_unpool2d(2).apply({}, (values, indices))[0].shape == (0, 3, 4, 4)


VALUES, INDICES = fn.max_pool2d(2, return_indices=True).apply({}, randn(2, 3, 6, 6))[0]
X = randn(2, 3, 6, 6)

MISUSES = {
    "window larger than x": (
        fn.max_pool1d(5), randn(1, 1, 4), r"^max_pool1d: does not fit .*: .*small"),
    "window larger than the padded x": (
        fn.avg_pool3d(5, padding=1), randn(1, 1, 2, 2, 2), r"^avg_pool3d: does not fit .*small"),
    "average window larger than x": (
        fn.avg_pool1d(5), randn(1, 1, 4), r"^avg_pool1d: does not fit .*small"),
    "p-norm window larger than x": (fn.lp_pool2d(2, 7), X, r"^lp_pool2d: does not fit .*small"),
    "padding of more than half the window": (
        fn.avg_pool2d(2, padding=2), X, r"^avg_pool2d: does not fit .*half of"),
    "rank": (fn.avg_pool1d(2), X, r"^avg_pool1d: expects \(batch, channels, length\), got "),
    "adaptive rank": (
        fn.adaptive_max_pool3d(2), X[0], r"^adaptive_max_pool3d: expects .*width\)"),
    "fractional window larger than x": (
        fn.fractional_max_pool2d(3, 5), X,
        r"kernel_size \+ output_size - 1 of at most \(6, 6\), got \(3, 3\) and \(5, 5\) for x of"),
    "fractional ratio of nothing": (fn.fractional_max_pool2d(1, output_ratio=0.1), X, "at most"),
    "samples of another shape": (
        fn.fractional_max_pool2d(2, 3, random_samples=torch.rand(2, 3, 3)), X,
        r"^fractional_max_pool2d: expects random_samples of shape at least \(2, 3, 2\), got "),
    "indices of another pooling": (
        fn.max_unpool2d(2), (VALUES, INDICES + 6),
        r"^max_unpool2d: does not fit \(float64 \(2, 3, 3, 3\), int64 .*out of bounds .* size 36"),
    "negative indices": (
        fn.max_unpool2d(2), (VALUES, INDICES - 36), r"^max_unpool2d: does not fit .*out of bounds"),
    "indices of another shape": (
        fn.max_unpool2d(2), (VALUES, INDICES[:1]),
        r"^max_unpool2d: expects indices of the values' shape, got \(float64 "),
    "an output size that no input gives": (
        fn.max_unpool2d(2, output_size=(6, 8)), (VALUES, INDICES),
        r"^max_unpool2d: output_size must be from \(5, 5\) to \(7, 7\), got \(6, 8\) for "),
    "values of another rank": (
        fn.max_unpool1d(2), (VALUES, INDICES), r"^max_unpool1d: expects values of shape "),
    "values of less than nothing": (
        fn.max_unpool1d(1, padding=4), (X[0, 0], torch.zeros(6, 6, dtype=torch.int64)),
        r"^max_unpool1d: expects values of an output that is not empty, got \(-2,\)$"),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES)
def test_pooling_refuses(misuse):
    layer, x, message = MISUSES[misuse]
    for call in (layer.apply, layer.vjp):
        with pytest.raises(ValueError, match=message):
            call({}, x, key=fn.key(0))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            VALUES,
            r"^max_unpool2d: expects a tuple \(values, indices\), got float64 \(2, 3, 3, 3\)$",
        ),
        ((VALUES, VALUES), r"^max_unpool2d: expects int64 indices, got float64"),
        ((INDICES, INDICES), r"^max_unpool2d: expects a floating-point tensor, got int64"),
    ],
)
def test_unpooling_refuses_what_is_not_values_and_indices(x, message):
    with pytest.raises(TypeError, match=message):
        fn.max_unpool2d(2).apply({}, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fn.avg_pool2d(0), "avg_pool2d: kernel_size must be one or two ints >= 1, got 0"),
        (lambda: fn.avg_pool3d((2, 2)), "avg_pool3d: kernel_size must be one or three ints >= 1"),
        (lambda: fn.max_pool1d(2, 0), "max_pool1d: stride must be an int >= 1, got 0"),
        (
            lambda: fn.avg_pool2d(2, divisor_override=0),
            "avg_pool2d: divisor_override must not be 0",
        ),
        (lambda: fn.lp_pool2d(0, 2), "lp_pool2d: norm_type must not be 0"),
        (lambda: fn.adaptive_avg_pool2d(-1), "adaptive_avg_pool2d: output_size must be one or two"),
        (lambda: fn.adaptive_max_pool2d((1, 2, 3)), "adaptive_max_pool2d: output_size must be one"),
        (lambda: fn.fractional_max_pool2d(2), "fractional_max_pool2d: expects either an output_s"),
        (lambda: fn.fractional_max_pool2d(2, 3, 0.5), "fractional_max_pool2d: expects either an"),
        (
            lambda: fn.fractional_max_pool3d(2, output_ratio=1.5),
            "fractional_max_pool3d: output_ratio must be one or 3 numbers in (0, 1), got 1.5",
        ),
        (lambda: fn.max_unpool2d(2, output_size=(6,)), "max_unpool2d: output_size must be"),
    ],
)
def test_pooling_refuses_wrong_options(make, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the start of the message is compared
        make()
    assert str(raised.value).startswith(message)
