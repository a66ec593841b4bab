"""Losses against torch.nn.functional: value, gradient, dtype, transformations, bad input."""

import itertools
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

import funcnet as fn

F64 = torch.float64


def numbers(*shape, seed=0, dtype=F64):
    # Drawn on the CPU, so that the numbers are the same on any device.
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def probabilities(*shape, seed=0):
    return numbers(*shape, seed=seed).sigmoid()


def log_probabilities(*shape, seed=0):
    return numbers(*shape, seed=seed).log_softmax(-1)


def classes(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, shape, generator=generator, device="cpu")
    return drawn.to(torch.get_default_device())


def of_elements(element):
    """A reference made of a torch function of elements; torch's own "mean" is this mean."""

    def reference(y, t, reduction):
        elements = element(y, t)
        batch = elements.shape[0] if elements.dim() else 1
        total = elements.sum()
        return {
            "none": lambda: elements,
            "mean": lambda: elements.mean(),
            "sum": lambda: total,
            "batchmean": lambda: total / batch,
            "half_mean": lambda: total / (2 * batch),
        }[reduction]()

    return reference


def of_function(function, **options):
    return lambda y, t, reduction: function(y, t, reduction=reduction, **options)


def squared(y, t):
    return F.mse_loss(y, t, reduction="none")


def hinge_elements(margin):
    return lambda y, t: (margin - y * t).clamp(min=0)


REGRESSION = (numbers(5, 3), numbers(5, 3, seed=1))
SIGNS = (numbers(5, 3), numbers(5, 3, seed=1).sign())
BINARY = (probabilities(5, 3), probabilities(5, 3, seed=1).round())
SOFT_BINARY = (probabilities(5, 3), probabilities(5, 3, seed=1))
LOGITS = (numbers(5, 3) * 3, probabilities(5, 3, seed=1))
DISTRIBUTIONS = (log_probabilities(5, 3), log_probabilities(5, 3, seed=1).exp())
LOG_DISTRIBUTIONS = (log_probabilities(5, 3), log_probabilities(5, 3, seed=1))
HALF_ZERO = (log_probabilities(2, 3), torch.tensor([[0, 1, 0], [0.5, 0.5, 0]], dtype=F64))

# name: constructor, options, reference, (prediction, target)
POINTWISE = {
    "mse": (fn.mse, {}, of_elements(squared), REGRESSION),
    "mae": (fn.mae, {}, of_function(F.l1_loss), REGRESSION),
    "hinge": (fn.hinge, {}, of_elements(hinge_elements(1.0)), SIGNS),
    "bce": (fn.bce, {}, of_function(F.binary_cross_entropy), BINARY),
    "bce of soft targets": (fn.bce, {}, of_function(F.binary_cross_entropy), SOFT_BINARY),
    "bce_with_logits": (
        fn.bce_with_logits,
        {},
        of_function(F.binary_cross_entropy_with_logits),
        LOGITS,
    ),
}
for margin in (0.0, 0.3, 2.0):
    POINTWISE[f"hinge {margin}"] = (
        fn.hinge,
        {"margin": margin},
        of_elements(hinge_elements(margin)),
        SIGNS,
    )
for delta in (0.1, 1.0, 2.5):
    POINTWISE[f"huber {delta}"] = (
        fn.huber,
        {"delta": delta},
        of_function(F.huber_loss, delta=delta),
        REGRESSION,
    )
for beta in (0.0, 1e-3, 0.5, 1.0, 3.0):
    POINTWISE[f"smooth_l1 {beta}"] = (
        fn.smooth_l1,
        {"beta": beta},
        of_function(F.smooth_l1_loss, beta=beta),
        REGRESSION,
    )
for shape in ((5, 3), (3,), (1, 3), (5, 1), (), (1, 1)):
    weight = numbers(*shape, seed=2).abs()
    POINTWISE[f"bce weight {shape}"] = (
        fn.bce,
        {"weight": weight},
        of_elements(
            lambda y, t, weight=weight: F.binary_cross_entropy(y, t, reduction="none") * weight
        ),
        SOFT_BINARY,
    )
    POINTWISE[f"bce_with_logits weight {shape}"] = (
        fn.bce_with_logits,
        {"weight": weight},
        of_function(F.binary_cross_entropy_with_logits, weight=weight),
        LOGITS,
    )
    POINTWISE[f"bce_with_logits pos_weight {shape}"] = (
        fn.bce_with_logits,
        {"pos_weight": weight},
        of_function(F.binary_cross_entropy_with_logits, pos_weight=weight),
        LOGITS,
    )
    POINTWISE[f"bce_with_logits weight and pos_weight {shape}"] = (
        fn.bce_with_logits,
        {"pos_weight": weight, "weight": weight.sqrt() + 1},
        of_function(
            F.binary_cross_entropy_with_logits, pos_weight=weight, weight=weight.sqrt() + 1
        ),
        LOGITS,
    )
for log_target, data in ((False, DISTRIBUTIONS), (False, HALF_ZERO), (True, LOG_DISTRIBUTIONS)):
    POINTWISE[f"kl_div log_target={log_target} {tuple(data[0].shape)}"] = (
        fn.kl_div,
        {"log_target": log_target},
        of_elements(
            lambda y, t, log_target=log_target: F.kl_div(
                y, t, reduction="none", log_target=log_target
            )
        ),
        data,
    )

REDUCTIONS = {
    fn.mse: ("none", "mean", "sum", "half_mean"),
    fn.kl_div: ("none", "mean", "sum", "batchmean"),
}


def builder(constructor, options):
    """``build(*to)`` makes the loss with the tensors among its options moved by ``tensor.to``."""

    def build(*to):
        return constructor(
            **{
                name: value.to(*to) if isinstance(value, torch.Tensor) and to else value
                for name, value in options.items()
            }
        )

    return build


def per_reduction(table):
    """``(build, reference of (prediction, target), data)`` for each row and reduction."""
    return {
        f"{name} {reduction}": (
            builder(constructor, {"reduction": reduction, **options}),
            lambda y, t, reference=reference, reduction=reduction: reference(y, t, reduction),
            data,
        )
        for name, (constructor, options, reference, data) in table.items()
        for reduction in REDUCTIONS.get(constructor, ("none", "mean", "sum"))
    }


CLASS_SHAPES = {"(N,C)": (6, 4), "(C,)": (4,), "(N,C,d1)": (2, 4, 3), "(N,C,d1,d2)": (2, 4, 3, 2)}


def class_targets(shape, kind):
    dim = 1 if len(shape) > 1 else 0
    if kind == "probabilities":
        return numbers(*shape, seed=1).softmax(dim)
    return classes(4, *shape[:dim], *shape[dim + 1 :], seed=3)


CLASSIFICATION = {}
for (where, shape), smoothing, weighted, ignore_index, kind in itertools.product(
    CLASS_SHAPES.items(), (0.0, 0.1, 1.0), (False, True), (-100, 2), ("indices", "probabilities")
):
    if kind == "probabilities" and ignore_index == 2:
        continue
    if where == "(C,)" and ignore_index == 2:
        ignore_index = 1  # else the one example is ignored, which is tested apart
    options = {
        "weight": torch.tensor([0.5, 0.0, 0.25, 3.0], dtype=F64) if weighted else None,
        "ignore_index": ignore_index,
        "label_smoothing": smoothing,
    }
    CLASSIFICATION[f"cross_entropy {where} {smoothing} {weighted} {ignore_index} {kind}"] = (
        fn.cross_entropy,
        options,
        of_function(F.cross_entropy, **options),
        (numbers(*shape), class_targets(shape, kind)),
    )
for (where, shape), weighted, ignore_index in itertools.product(
    CLASS_SHAPES.items(), (False, True), (-100, 1)
):
    options = {
        "weight": torch.tensor([0.5, 1.0, 0.25, 3.0], dtype=F64) if weighted else None,
        "ignore_index": ignore_index,
    }
    dim = 1 if len(shape) > 1 else 0
    CLASSIFICATION[f"nll {where} {weighted} {ignore_index}"] = (
        fn.nll,
        options,
        of_function(F.nll_loss, **options),
        (numbers(*shape).log_softmax(dim), class_targets(shape, "indices")),
    )

BIG = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, -1e4]], dtype=F64)
ENDS = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 1e-300, 1 - 1e-16], dtype=F64)
ENDS_TARGET = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0], dtype=F64)
HARD = torch.tensor([[0, 0, 1], [1, 0, 0], [0.5, 0.5, 0]], dtype=F64)
MASKED = torch.tensor([[0.0, -math.inf, 1.0], [2.0, 3.0, -math.inf]], dtype=F64)
EQUAL = torch.tensor([1.0, -2.0, 0.0], dtype=F64)
AT_DELTA = torch.tensor([1.0, -1.0, 0.5], dtype=F64)
ignored = torch.tensor([-100, 1, -100])

EXTREMES = {
    "bce_with_logits of large logits": (
        fn.bce_with_logits,
        {},
        of_function(F.binary_cross_entropy_with_logits),
        (BIG, HARD),
    ),
    "bce_with_logits of large logits and weights": (
        fn.bce_with_logits,
        {"pos_weight": torch.tensor(5.0, dtype=F64), "weight": torch.tensor(2.0, dtype=F64)},
        of_function(
            F.binary_cross_entropy_with_logits,
            pos_weight=torch.tensor(5.0, dtype=F64),
            weight=torch.tensor(2.0, dtype=F64),
        ),
        (BIG, HARD),
    ),
    "cross_entropy of large logits": (
        fn.cross_entropy,
        {},
        of_function(F.cross_entropy),
        (BIG, torch.tensor([1, 0, 2])),
    ),
    "cross_entropy of large logits, smoothed": (
        fn.cross_entropy,
        {"label_smoothing": 0.2},
        of_function(F.cross_entropy, label_smoothing=0.2),
        (BIG, torch.tensor([1, 0, 2])),
    ),
    "cross_entropy of large logits and probabilities": (
        fn.cross_entropy,
        {},
        of_function(F.cross_entropy),
        (BIG, HARD),
    ),
    "cross_entropy of masked classes": (
        fn.cross_entropy,
        {},
        of_function(F.cross_entropy),
        (MASKED, torch.tensor([2, 0])),
    ),
    "cross_entropy with some ignored": (
        fn.cross_entropy,
        {},
        of_function(F.cross_entropy),
        (BIG, ignored),
    ),
    "cross_entropy with some ignored, smoothed, weighted": (
        fn.cross_entropy,
        {"label_smoothing": 0.3, "weight": EQUAL.abs() + 1},
        of_function(F.cross_entropy, label_smoothing=0.3, weight=EQUAL.abs() + 1),
        (BIG, ignored),
    ),
    "nll with some ignored": (fn.nll, {}, of_function(F.nll_loss), (BIG, ignored)),
    "mae of equals": (fn.mae, {}, of_function(F.l1_loss), (EQUAL, EQUAL)),
    "smooth_l1 of equals": (fn.smooth_l1, {}, of_function(F.smooth_l1_loss), (EQUAL, EQUAL)),
    "smooth_l1 0 of equals": (
        fn.smooth_l1,
        {"beta": 0.0},
        of_function(F.smooth_l1_loss, beta=0.0),
        (EQUAL, EQUAL),
    ),
    "smooth_l1 at beta": (fn.smooth_l1, {}, of_function(F.smooth_l1_loss), (AT_DELTA, 0 * EQUAL)),
    "huber at delta": (fn.huber, {}, of_function(F.huber_loss), (AT_DELTA, 0 * EQUAL)),
    "huber of large errors": (fn.huber, {}, of_function(F.huber_loss), (BIG, -BIG)),
    "mse of scalars": (fn.mse, {}, of_elements(squared), (EQUAL[0], EQUAL[1])),
    "kl_div of one dimension": (
        fn.kl_div,
        {},
        of_elements(lambda y, t: F.kl_div(y, t, reduction="none")),
        (log_probabilities(4), probabilities(4)),
    ),
    "bce of one class in a batch of one": (
        fn.bce,
        {},
        of_function(F.binary_cross_entropy),
        (ENDS[4:5], ENDS_TARGET[:1]),
    ),
    "cross_entropy of one class": (
        fn.cross_entropy,
        {},
        of_function(F.cross_entropy),
        (BIG[:, :1], torch.zeros(3, dtype=torch.int64)),
    ),
}

CASES = per_reduction(POINTWISE) | per_reduction(CLASSIFICATION) | per_reduction(EXTREMES)
cases = pytest.mark.parametrize(("build", "reference", "data"), CASES.values(), ids=CASES)
# One of each loss, for laws that no option changes.
FEW = {
    name: CASES[name]
    for name in (
        "mse mean",
        "mse none",
        "mse half_mean",
        "mae mean",
        "huber 1.0 mean",
        "smooth_l1 0.0 sum",
        "smooth_l1 1.0 mean",
        "hinge mean",
        "bce of soft targets mean",
        "bce weight (3,) sum",
        "bce weight (3,) none",
        "bce_with_logits mean",
        "bce_with_logits weight and pos_weight (3,) mean",
        "kl_div log_target=False (5, 3) batchmean",
        "kl_div log_target=True (5, 3) mean",
        "cross_entropy (N,C) 0.0 False -100 indices mean",
        "cross_entropy (N,C) 0.1 True 2 indices mean",
        "cross_entropy (N,C) 0.1 True 2 indices none",
        "cross_entropy (N,C,d1,d2) 0.1 True 2 indices sum",
        "cross_entropy (N,C) 0.1 True -100 probabilities mean",
        "cross_entropy (N,C,d1,d2) 0.1 True -100 probabilities none",
        "cross_entropy (C,) 0.0 False -100 indices mean",
        "nll (N,C) True 1 mean",
        "nll (N,C,d1,d2) False -100 sum",
        "nll (N,C,d1,d2) True 1 none",
    )
}
few = pytest.mark.parametrize(("build", "reference", "data"), FEW.values(), ids=FEW)


def gradient_of(reference, prediction, target):
    with torch.enable_grad():
        leaf = prediction.clone().requires_grad_()
        value = reference(leaf, target)
        (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return value.detach(), gradient


def cast(data, dtype):
    return [part.to(dtype) if part.is_floating_point() else part for part in data]


@cases
def test_value_and_gradient_are_those_of_torch(build, reference, data):
    loss = build()
    prediction, target = data
    expected, gradient = gradient_of(reference, prediction, target)
    value, pullback = loss.vjp(prediction, target)
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pullback(), gradient, rtol=1e-12, atol=1e-14)
    assert torch.equal(loss.apply(prediction, target), value)


@cases
def test_pullback_is_linear_in_dvalue_and_can_be_called_twice(build, reference, data):
    loss = build()
    value, pullback = loss.vjp(*data)
    once = pullback()
    residuals = [(leaf, leaf._version, leaf.clone()) for leaf in fn.tree.leaves(pullback)]
    torch.testing.assert_close(pullback(-2.5), -2.5 * once, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        pullback(torch.full_like(value, -2.5)), -2.5 * once, rtol=1e-12, atol=1e-14
    )
    assert torch.equal(pullback(0.0), torch.zeros_like(once))
    assert torch.equal(pullback(), once)
    assert all(
        leaf._version == version and torch.equal(leaf, copy) for leaf, version, copy in residuals
    )


@few
def test_no_argument_is_changed_and_no_tape_is_recorded(build, reference, data):
    loss = build()
    copies, versions = [part.clone() for part in data], [part._version for part in data]
    state = torch.random.get_rng_state()
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            value, pullback = loss.vjp(*data)
            gradient = pullback()
            assert not value.requires_grad
            assert not gradient.requires_grad
    assert all(torch.equal(part, copy) for part, copy in zip(data, copies, strict=True))
    assert [part._version for part in data] == versions
    assert torch.equal(torch.random.get_rng_state(), state)


@few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_have_the_dtype_of_the_prediction(build, reference, data, dtype):
    value, pullback = build(dtype).vjp(*cast(data, dtype))
    for dvalue in (1.0, 2, torch.ones(value.shape), torch.ones(value.shape, dtype=F64)):
        gradient = pullback(dvalue)
        assert (value.dtype, gradient.dtype) == (dtype, dtype)
        assert gradient.shape == data[0].shape
    expected, gradient = gradient_of(reference, *cast(cast(data, dtype), F64))
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pullback().double(), gradient, rtol=tolerance, atol=tolerance)


@few
def test_vmap_over_predictions_and_targets_equals_the_loop(build, reference, data):
    loss = build()
    pairs = [
        (prediction, target)
        for prediction, target in ((data[0], data[1]), (data[0].flip(0), data[1].flip(0)))
    ]
    predictions, targets = (torch.stack(parts) for parts in zip(*pairs, strict=True))

    def run(prediction, target):
        value, pullback = loss.vjp(prediction, target)
        return value, pullback(), pullback(torch.full(value.shape, 3.0, dtype=F64))

    together = torch.vmap(run)(predictions, targets)
    against_one = torch.vmap(run, (0, None))(predictions, data[1])
    for i, pair in enumerate(pairs):
        for row, alone in zip(together, run(*pair), strict=True):
            torch.testing.assert_close(row[i], alone, rtol=1e-13, atol=1e-15)
        for row, alone in zip(against_one, run(pair[0], data[1]), strict=True):
            torch.testing.assert_close(row[i], alone, rtol=1e-13, atol=1e-15)
    value, pullback = loss.vjp(*data)
    ones = torch.ones_like(value)
    scaled = torch.vmap(pullback)(torch.stack([ones, -2.0 * ones]))
    torch.testing.assert_close(scaled[1], -2.0 * scaled[0], rtol=1e-13, atol=1e-15)


@few
def test_loss_of_meta_tensors_has_shape_and_dtype_without_data(build, reference, data):
    prediction, target = (part.to("meta") for part in data)
    value, pullback = build("meta").vjp(prediction, target)
    gradient = pullback()
    expected = reference(*data).shape
    assert (value.shape, value.dtype, value.device.type) == (expected, F64, "meta")
    assert (gradient.shape, gradient.dtype) == (prediction.shape, F64)
    assert gradient.device.type == "meta"


@few
def test_gradient_is_that_of_torch_func_through_apply(build, reference, data):
    loss = build()
    gradient = torch.func.grad(lambda prediction: loss.apply(prediction, data[1]).sum())(data[0])
    torch.testing.assert_close(loss.vjp(*data)[1](), gradient, rtol=1e-12, atol=1e-14)


@few
def test_pullback_is_a_pytree_of_its_residuals(build, reference, data):
    loss = build()
    _, pullback = loss.vjp(*data)
    doubled = fn.tree.map(torch.clone, pullback)
    assert torch.equal(doubled(), pullback())
    assert fn.tree.leaves(pullback)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_bce_at_probabilities_of_0_and_1_is_that_of_torch(reduction):
    expected, gradient = gradient_of(
        lambda y, t: F.binary_cross_entropy(y, t, reduction=reduction), ENDS, ENDS_TARGET
    )
    value, pullback = fn.bce(reduction=reduction).vjp(ENDS, ENDS_TARGET)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    # PyTorch keeps the denominator from 0 by 1e-12 rounded to float32.
    torch.testing.assert_close(pullback(), gradient, rtol=1e-8, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("loss", "reference", "target"),
    [
        (fn.cross_entropy, of_function(F.cross_entropy), torch.full((3,), -100)),
        (
            lambda reduction: fn.cross_entropy(reduction=reduction, label_smoothing=0.1),
            of_function(F.cross_entropy, label_smoothing=0.1),
            torch.full((3,), -100),
        ),
        (fn.nll, of_function(F.nll_loss), torch.full((3,), -100)),
    ],
    ids=["cross_entropy", "cross_entropy smoothed", "nll"],
)
def test_all_ignored_is_as_in_torch(loss, reference, target, reduction):
    prediction = numbers(3, 4)
    expected, gradient = gradient_of(lambda y, t: reference(y, t, reduction), prediction, target)
    value, pullback = loss(reduction=reduction).vjp(prediction, target)
    torch.testing.assert_close(value, expected, equal_nan=True)
    torch.testing.assert_close(pullback(), gradient, equal_nan=True)


@pytest.mark.parametrize("constructor", [fn.mse, fn.mae, fn.huber, fn.bce, fn.bce_with_logits])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_sum_over_an_empty_batch_is_0_with_an_empty_gradient(constructor, shape):
    empty = torch.zeros(shape, dtype=F64)
    value, pullback = constructor(reduction="sum").vjp(empty, empty)
    assert value == 0
    assert pullback().shape == shape
    value, pullback = constructor().vjp(empty, empty)
    assert value.isnan()
    assert pullback().shape == shape


def test_gradient_of_an_ignored_or_masked_example_is_0_whatever_its_logits():
    logits = torch.tensor([[math.nan, 1.0], [math.inf, 0.0], [1.0, 2.0]], dtype=F64)
    target = torch.tensor([-100, -100, 0])
    value, _ = fn.cross_entropy().vjp(logits, target)
    expected = F.cross_entropy(logits[2:], target[2:])
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("indices", torch.bfloat16),
        ("probabilities", torch.bfloat16),
        ("probabilities", torch.float16),
    ],
)
def test_mean_cross_entropy_of_a_large_batch_fits_in_half_precision(kind, dtype):
    rows = 70_000
    logits = torch.zeros(rows, 2, dtype=dtype)
    target = classes(2, rows) if kind == "indices" else torch.full((rows, 2), 0.5, dtype=dtype)
    value, pullback = fn.cross_entropy().vjp(logits, target)
    assert value.item() == pytest.approx(math.log(2), rel=0.01)
    expected = 0.5 / rows if kind == "indices" else 0.0
    assert pullback(1000.0).abs().max().item() == pytest.approx(1000 * expected, rel=0.02)


@pytest.mark.parametrize("loss", [fn.mse(), fn.mae(), fn.huber(), fn.bce_with_logits()])
def test_mean_of_a_large_batch_fits_in_half_precision(loss):
    prediction = torch.full((70_000,), 3.0, dtype=torch.float16)
    value, pullback = loss.vjp(prediction, torch.zeros_like(prediction))
    alone = loss.apply(prediction[:1], torch.zeros_like(prediction[:1]))
    assert value.item() == pytest.approx(alone.item(), rel=0.01)
    assert (pullback(1000.0) > 0).all()


@pytest.mark.parametrize(
    ("constructor", "option", "prediction", "target"),
    [
        (fn.bce, "weight", probabilities(4, 3), probabilities(4, 3, seed=1)),
        (fn.bce_with_logits, "weight", numbers(4, 3), probabilities(4, 3, seed=1)),
        (fn.bce_with_logits, "pos_weight", numbers(4, 3), probabilities(4, 3, seed=1)),
        (fn.cross_entropy, "weight", numbers(4, 3), classes(3, 4)),
        (fn.cross_entropy, "weight", numbers(4, 3), numbers(4, 3).softmax(-1)),
        (fn.nll, "weight", numbers(4, 3), classes(3, 4)),
    ],
)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_weight_of_another_dtype_leaves_value_and_gradient_theirs(
    constructor, option, prediction, target, dtypes
):
    dtype, weight_dtype = dtypes
    loss = constructor(**{option: torch.full((3,), 0.5, dtype=weight_dtype)})
    value, pullback = loss.vjp(*cast((prediction, target), dtype))
    assert (value.dtype, pullback().dtype) == (dtype, dtype)
    same = constructor(**{option: torch.full((3,), 0.5, dtype=dtype)})
    torch.testing.assert_close(value, same.apply(*cast((prediction, target), dtype)))


Y, T = numbers(4, 3), numbers(4, 3, seed=1)
P = probabilities(4, 3)
COMPARING = {
    "mse": fn.mse(),
    "mae": fn.mae(),
    "huber": fn.huber(),
    "smooth_l1": fn.smooth_l1(),
    "bce": fn.bce(),
    "focal": fn.focal(),
    "kl_div": fn.kl_div(),
    "bce_with_logits": fn.bce_with_logits(),
}


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 3), (3,), (), (3, 4), (4, 3, 1), (1, 4, 3)])
def test_target_of_another_shape_is_refused_and_never_broadcast(name, shape):
    target = probabilities(*shape)
    for call in COMPARING[name]:
        with pytest.raises(ValueError, match=f"{name}: expects a target of the prediction's shape"):
            call(P, target)


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        (P, P.float()),
        (P.float(), P),
        (P, P.round().long()),
        (P, P > 0.5),
        (P.round().long(), P),
        (P.round().long(), P.round().long()),
        (P.to(torch.complex128), P.to(torch.complex128)),
        (P, None),
        (P, 0.5),
        (None, P),
        ((P, P), P),
    ],
)
def test_prediction_or_target_of_another_dtype_is_refused(name, prediction, target):
    for call in COMPARING[name]:
        with pytest.raises(TypeError, match=f"{name}: expects a"):
            call(prediction, target)


INDEXED = {"cross_entropy": fn.cross_entropy(), "nll": fn.nll()}


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize(
    ("prediction", "target", "error", "match"),
    [
        (Y, torch.tensor([0, 1, 2]), ValueError, r"shape \(4,\).*got \(3,\)"),
        (Y, torch.tensor([[0], [1], [2], [0]]), ValueError, r"shape \(4,\).*got \(4, 1\)"),
        (Y, torch.tensor(0), ValueError, r"shape \(4,\).*got \(\)"),
        (Y[0], torch.tensor([0]), ValueError, r"shape \(\).*got \(1,\)"),
        (numbers(2, 3, 4), classes(3, 2, 3), ValueError, r"shape \(2, 4\).*got \(2, 3\)"),
        (Y, torch.tensor([0, 1, 2, 0], dtype=torch.int32), TypeError, "int64"),
        (Y, torch.tensor([True, False, True, True]), TypeError, "int64"),
        (Y, None, TypeError, "target"),
        (Y, [0, 1, 2, 0], TypeError, "target"),
        (Y.long(), torch.tensor([0, 1, 2, 0]), TypeError, "floating-point prediction"),
        (None, torch.tensor([0, 1, 2, 0]), TypeError, "floating-point prediction"),
        (Y[0, 0], torch.tensor(0), ValueError, r"got \(\)"),
    ],
)
def test_bad_classes_are_refused(name, prediction, target, error, match):
    for call in INDEXED[name]:
        with pytest.raises(error, match=f"{name}: .*{match}"):
            call(prediction, target)


# Elsewhere values are not read: that would wait for the device.
@pytest.mark.cpu_only
@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize(
    ("target", "found"),
    [([0, 1, 2, 3], "0 to 3"), ([0, 1, 2, -1], "-1 to 2"), ([-100, 1, 2, -5], "-5 to 2")],
)
def test_classes_out_of_range_are_refused(name, target, found):
    for call in INDEXED[name]:
        with pytest.raises(ValueError, match=rf"{name}: .*classes in \[0, 3\), got {found}"):
            call(Y, torch.tensor(target))


WEIGHT2 = torch.ones(2, dtype=F64)
TALL = torch.ones(5, 1, 1, dtype=F64)
BAD = {
    "mse reduction": (lambda: fn.mse("avg"), ValueError, "mse: reduction.*'avg'"),
    "mse batchmean": (lambda: fn.mse("batchmean"), ValueError, "mse: reduction"),
    "mae reduction": (lambda: fn.mae("half_mean"), ValueError, "mae: reduction"),
    "huber reduction": (lambda: fn.huber("avg"), ValueError, "huber: reduction"),
    "smooth_l1 reduction": (lambda: fn.smooth_l1(None), ValueError, "smooth_l1: reduction"),
    "bce reduction": (lambda: fn.bce(reduction="avg"), ValueError, "bce: reduction"),
    "bce_with_logits reduction": (
        lambda: fn.bce_with_logits(reduction="batchmean"),
        ValueError,
        "bce_with_logits: reduction",
    ),
    "hinge reduction": (lambda: fn.hinge("avg"), ValueError, "hinge: reduction"),
    "kl_div reduction": (lambda: fn.kl_div("half_mean"), ValueError, "kl_div: reduction"),
    "cross_entropy reduction": (
        lambda: fn.cross_entropy(reduction="avg"),
        ValueError,
        "cross_entropy: reduction",
    ),
    "nll reduction": (lambda: fn.nll(reduction="avg"), ValueError, "nll: reduction"),
    "huber delta 0": (lambda: fn.huber(delta=0.0), ValueError, "delta.*0"),
    "huber delta NaN": (lambda: fn.huber(delta=math.nan), ValueError, "delta.*nan"),
    "smooth_l1 beta": (lambda: fn.smooth_l1(beta=-1.0), ValueError, "beta.*-1"),
    "smooth_l1 beta NaN": (lambda: fn.smooth_l1(beta=math.nan), ValueError, "beta.*nan"),
    "label_smoothing above 1": (
        lambda: fn.cross_entropy(label_smoothing=1.1),
        ValueError,
        "label_smoothing.*1.1",
    ),
    "label_smoothing below 0": (
        lambda: fn.cross_entropy(label_smoothing=-0.1),
        ValueError,
        "label_smoothing.*-0.1",
    ),
    "bce weight that does not broadcast": (
        lambda: fn.bce(weight=WEIGHT2).vjp(P, P),
        ValueError,
        r"bce: .*weight.*\(2,\)",
    ),
    "bce weight larger than the prediction": (
        lambda: fn.bce(weight=TALL).vjp(P, P),
        ValueError,
        r"bce: .*weight.*\(5, 1, 1\)",
    ),
    "bce_with_logits weight that does not broadcast": (
        lambda: fn.bce_with_logits(weight=WEIGHT2).vjp(P, P),
        ValueError,
        r"bce_with_logits: .*weight.*\(2,\)",
    ),
    "bce_with_logits weight larger than the prediction": (
        lambda: fn.bce_with_logits(weight=TALL).vjp(P, P),
        ValueError,
        r"bce_with_logits: .*weight.*\(5, 1, 1\)",
    ),
    "bce_with_logits pos_weight larger than the prediction": (
        lambda: fn.bce_with_logits(pos_weight=TALL).vjp(P, P),
        ValueError,
        r"bce_with_logits: .*pos_weight.*\(5, 1, 1\)",
    ),
    "cross_entropy weight": (
        lambda: fn.cross_entropy(weight=WEIGHT2).vjp(Y, torch.tensor([0, 1, 2, 0])),
        ValueError,
        r"weight for each of 3 classes, got \(2,\)",
    ),
    "nll weight": (
        lambda: fn.nll(weight=WEIGHT2).apply(Y, torch.tensor([0, 1, 2, 0])),
        ValueError,
        r"weight for each of 3 classes, got \(2,\)",
    ),
    "cross_entropy probabilities of another shape": (
        lambda: fn.cross_entropy().apply(Y, P[:, :1]),
        ValueError,
        "cross_entropy: .*shape",
    ),
    "cross_entropy probabilities of another dtype": (
        lambda: fn.cross_entropy().apply(Y, P.float()),
        TypeError,
        "cross_entropy: .*dtype",
    ),
    "nll probabilities": (
        lambda: fn.nll().apply(Y, P),
        TypeError,
        "nll: expects a target of int64",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.cpu_only
@pytest.mark.parametrize("call", fn.bce())
@pytest.mark.parametrize("shift", [1, -1])
def test_bce_refuses_what_is_not_a_probability(call, shift):
    with pytest.raises(ValueError, match="probabilities in"):
        call(P + shift, P)
    with pytest.raises(ValueError, match="targets in"):
        call(P, P + shift)


@pytest.mark.parametrize("name", COMPARING)
def test_nan_passes_so_that_check_finite_can_name_its_origin(name):
    prediction = P.clone()
    prediction[0, 0] = math.nan
    value, pullback = COMPARING[name].vjp(prediction, P)
    assert value.isnan()
    assert pullback()[1:].isfinite().all()


@pytest.mark.parametrize("constructor", [fn.cross_entropy, fn.nll])
def test_ignore_index_need_not_be_a_class(constructor):
    target = torch.tensor([0, 255, 2, 255])
    value = constructor(ignore_index=255).apply(Y, target)
    torch.testing.assert_close(value, constructor().apply(Y[[0, 2]], target[[0, 2]]))


def test_cross_entropy_is_nll_of_log_softmax():
    target = classes(3, 4)
    value, pullback = fn.cross_entropy().vjp(Y, target)
    log_p, softmax_pullback, _ = fn.log_softmax(-1).vjp({}, Y)
    other, nll_pullback = fn.nll().vjp(log_p, target)
    torch.testing.assert_close(value, other)
    torch.testing.assert_close(pullback(), softmax_pullback(nll_pullback())[1])


def quantile(y, t, slope, level):
    return slope * torch.maximum(level * (t - y), (level - 1) * (t - y))


def quantile_derivative(y, t, slope, level):
    return slope * ((y >= t).to(y.dtype) - level)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.0], dtype=F64)])
def test_a_loss_made_of_a_function_and_its_derivative_keeps_the_laws(dtype, reduction, weight):
    level = torch.tensor([0.25, 0.5, 0.875], dtype=dtype)
    loss = fn.losses.pointwise(
        quantile,
        quantile_derivative,
        reduction,
        weight=weight,
        options=(2.0,),
        tensors={"level": level, "absent": None},
    )
    fn.testing.check_loss(loss, Y, T)
    elements = quantile(Y, T, 2.0, level) * (1.0 if weight is None else weight)
    expected = elements if reduction == "none" else getattr(elements, reduction)()
    torch.testing.assert_close(loss.apply(Y, T), expected)


def test_the_pullback_of_a_pointwise_loss_can_be_pickled():
    _, pullback = fn.huber(delta=0.5).vjp(Y, T)
    assert torch.equal(pickle.loads(pickle.dumps(pullback))(), pullback())


def test_a_derivative_that_is_no_module_level_function_is_found():
    loss = fn.losses.pointwise(lambda y, t: y * t, lambda y, t: t)
    with pytest.raises(AssertionError, match=r"structure: .*<lambda> is a module-level function"):
        fn.testing.check_loss(loss, Y, T)


def test_a_wrong_derivative_is_found():
    loss = fn.losses.pointwise(quantile, quantile, options=(1.0, 0.3))
    with pytest.raises(AssertionError, match="derivative: the pullback agrees with autograd"):
        fn.testing.check_loss(loss, Y, T)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"reduction": "batchmean"}, ValueError, "quantile: reduction must be one of"),
        ({"weight": WEIGHT2}, ValueError, r"quantile: expects a weight .*\(2,\)"),
        ({"tensors": {"level": WEIGHT2}}, ValueError, r"quantile: expects a level .*\(2,\)"),
        ({"name": "pinball", "weight": TALL}, ValueError, "pinball: expects a weight"),
    ],
)
def test_errors_of_a_pointwise_loss_name_the_function(options, error, match):
    with pytest.raises(error, match=match):
        fn.losses.pointwise(quantile, quantile_derivative, **{"options": (1.0,), **options}).apply(
            Y, T
        )
