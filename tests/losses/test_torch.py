"""Each loss against its torch.nn module: options, reductions, dtypes, layouts; their samples."""

import inspect
import math

import optree
import pytest
import torch
from losses.cases import (
    CASES,
    F64,
    MODULES,
    OTHERS,
    POSITIVE,
    PROBABILITIES,
    ROWS,
    SIGNS,
    TRIPLET,
    randn,
)
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.common_modules import module_db

import funcnet as fn

F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F64: 1e-10, F32: 2e-5, BF16: 3e-2}
# Of which torch has no kernel for bfloat16 on the CPU, or one that gives NaN.
WITHOUT_HALF = {"multi_margin", "multilabel_margin", "focal"}
NAMES = {module: name for name, module in MODULES.items()}


def arguments(name, prediction, target):
    """What the torch module's forward takes."""
    if name == "gaussian_nll":
        return prediction[0], target, prediction[1]
    rest = () if target is None else (target,)
    return (*prediction, *rest) if isinstance(prediction, tuple) else (prediction, *rest)


def from_arguments(name, inputs):
    """The prediction and the target among what the torch module's forward takes."""
    if name == "gaussian_nll":
        return (inputs[0], inputs[2]), inputs[1]
    return inputs if len(inputs) == 2 else (tuple(inputs[:2]), inputs[2])


def cast(tree, dtype):
    def to(leaf):
        tensor = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.detach().to(dtype) if tensor else leaf

    return optree.tree_map(to, tree)


def transposed(tree):
    """The same values in column-major order."""

    def turn(leaf):
        order = tuple(reversed(range(leaf.dim())))
        return leaf.permute(order).contiguous().permute(order)

    return optree.tree_map(turn, tree)


def reference(module, prediction, target, dvalue, name=""):
    """The value and the gradient, by autograd through a function of torch."""
    leaves = cast(prediction, F64 if dvalue is None else dvalue.dtype)
    with torch.enable_grad():
        leaves = optree.tree_map(
            lambda leaf: (
                leaf.contiguous().requires_grad_() if isinstance(leaf, torch.Tensor) else leaf
            ),
            leaves,
        )
        value = module(*arguments(name, leaves, target))
        dvalue = torch.ones_like(value) if dvalue is None else dvalue
        wanted = [leaf for leaf in optree.tree_leaves(leaves) if isinstance(leaf, torch.Tensor)]
        grads = torch.autograd.grad(value, wanted, dvalue, materialize_grads=True)
    return value.detach(), grads


def assert_near(got, expected, tolerance):
    got, expected = got.double(), expected.double()
    scale = float(expected.nan_to_num(0, 0, 0).abs().max()) if expected.numel() else 0.0
    if tolerance == TOLERANCE[BF16]:
        scale = max(scale, 1.0)  # a difference of numbers of size 1
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def check(name, loss, module, prediction, target, dtype=F64):
    """Hold a loss to a torch module, in ``dtype``, of numbers that are rounded to it."""
    prediction, target = cast((prediction, target), dtype)
    value, pullback = loss.vjp(prediction, target)
    assert value.dtype == dtype
    assert torch.equal(loss.apply(prediction, target).nan_to_num(7), value.nan_to_num(7))
    dvalue = randn(*value.shape, seed=9).to(dtype)
    exact = F64 if dtype == BF16 and name in WITHOUT_HALF else dtype
    wide = cast((prediction, target), exact)
    expected, grads = reference(module, *wide, dvalue.to(exact), name)
    assert value.shape == expected.shape
    assert_near(value, expected, TOLERANCE[dtype])
    given, got = optree.tree_leaves(prediction), optree.tree_leaves(pullback(dvalue))
    for leaf, ours, theirs in zip(given, got, grads, strict=True):
        assert (ours.dtype, ours.shape) == (leaf.dtype, leaf.shape)
        assert_near(ours, theirs, TOLERANCE[dtype])


def reductions(name):
    return ("none", "mean", "sum", *(["batchmean"] if name == "kl_div" else []))


def pair(name, options):
    """The loss and the torch module of the same options, whose tensors have the given dtype."""

    def build(dtype):
        given = cast(options, dtype)
        return getattr(fn, name)(**given), MODULES[name](
            **cast(options, F64 if dtype == BF16 and name in WITHOUT_HALF else dtype)
        )

    return build


ALL = {
    f"{index} {name} {reduction}": (name, {**options, "reduction": reduction}, prediction, target)
    for index, (name, options, prediction, target) in enumerate(CASES)
    for reduction in reductions(name)
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("case", ALL)
def test_a_loss_is_that_of_torch(case, dtype):
    name, options, prediction, target = ALL[case]
    loss, module = pair(name, options)(dtype)
    check(name, loss, module, prediction, target, dtype)
    if dtype == F64:
        check(name, loss, module, *transposed((prediction, target)))


@pytest.mark.parametrize("half", [BF16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("index", range(len(CASES)))
def test_half_precision_stays_half_precision(index, reduction, half):
    name, options, prediction, target = CASES[index]
    prediction, target = cast((prediction, target), half)
    # The weights may have another dtype.
    value, pullback = getattr(fn, name)(**options, reduction=reduction).vjp(prediction, target)
    scalar = 1000 * torch.ones((), dtype=torch.float32)
    dvalues = [1.0, torch.ones(value.shape, dtype=torch.float32), *([scalar] * (not value.dim()))]
    for dvalue in dvalues:
        gradients = optree.tree_leaves(pullback(dvalue))
        assert {leaf.dtype for leaf in (value, *gradients)} == {half}


def test_the_table_has_every_loss_of_torch():
    assert {name for name, *_ in CASES} == set(MODULES)
    left = {"NLLLoss2d", "CTCLoss", "LinearCrossEntropyLoss", "AdaptiveLogSoftmaxWithLoss"}
    theirs = {name for name in vars(nn) if name.endswith("Loss")} - left
    assert theirs == {module.__name__ for module in MODULES.values()}


@pytest.mark.parametrize("name", MODULES)
def test_options_have_the_order_and_the_defaults_of_torch(name):
    ours = inspect.signature(getattr(fn, name)).parameters
    theirs = inspect.signature(MODULES[name]).parameters
    defaults = {option: p.default for option, p in theirs.items()}
    for deprecated in ("size_average", "reduce"):
        defaults.pop(deprecated, None)
    assert {option: p.default for option, p in ours.items()} == defaults
    assert list(ours) == list(defaults)


SAMPLES = [info for info in module_db if info.module_cls in NAMES]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("info", SAMPLES, ids=lambda info: info.module_cls.__name__)
def test_a_loss_has_the_numbers_of_torch_on_the_samples_of_pytorch(info, dtype):
    name = NAMES[info.module_cls]
    torch.manual_seed(0)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
    assert samples
    for sample in samples:
        assert not sample.constructor_input.args
        options = sample.constructor_input.kwargs
        prediction, target = from_arguments(name, sample.forward_input.args)
        loss = getattr(fn, name)(**options)
        check(name, loss, info.module_cls(**options), prediction, target, dtype)


def test_the_samples_are_of_every_loss_but_the_triplets():
    without = {"triplet_margin", "triplet_margin_with_distance"}
    assert {NAMES[info.module_cls] for info in SAMPLES} == set(MODULES) - without


def focal_of_torchvision(alpha, gamma, reduction):
    def function(y, t):
        p = y.sigmoid()
        loss = F.binary_cross_entropy_with_logits(y, t, reduction="none")
        loss = loss * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
        if alpha >= 0:
            loss = (alpha * t + (1 - alpha) * (1 - t)) * loss
        return loss if reduction == "none" else getattr(loss, reduction)()

    return function


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("alpha", [-1, 0.25, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("target", [SIGNS.relu(), PROBABILITIES], ids=["hard", "soft"])
def test_focal_is_that_of_torchvision(target, gamma, alpha, reduction, dtype):
    loss = fn.focal(alpha, gamma, reduction)
    check("focal", loss, focal_of_torchvision(alpha, gamma, reduction), 3 * ROWS, target, dtype)


def test_focal_of_large_logits_is_finite():
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=F64)
    for gamma in (0.0, 0.3, 1.0, 2.0):
        value, pullback = fn.focal(-1, gamma, "sum").vjp(
            logits, torch.tensor([1.0, 0, 0, 1], dtype=F64)
        )
        assert value == 2e4
        torch.testing.assert_close(pullback(), torch.tensor([0.0, 0, 1, -1], dtype=F64))


ONE, ZERO = torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64)
TIES = {
    "margin_ranking of equals": ("margin_ranking", {}, (ONE, ONE), torch.tensor([1, -1, 1])),
    "margin_ranking at the margin": ("margin_ranking", {"margin": 1.0}, (ONE, ZERO), ONE),
    "margin_ranking of no order": ("margin_ranking", {"margin": 0.5}, (ONE, ZERO), ZERO),
    "hinge_embedding at the margin": ("hinge_embedding", {}, ONE, -ONE),
    "multi_margin at the margin": ("multi_margin", {}, torch.tensor([1.0, 0, 2]), torch.tensor(0)),
    "multi_margin squared at the margin": (
        "multi_margin",
        {"p": 2},
        torch.tensor([1.0, 0, 2]),
        torch.tensor(0),
    ),
    "multilabel_margin at the margin": (
        "multilabel_margin",
        {},
        torch.tensor([1.0, 0, 2]),
        torch.tensor([0, -1, 0]),
    ),
    "cosine_embedding at the margin": (
        "cosine_embedding",
        {},
        (ONE, ONE * torch.tensor([1, -1, 0])),
        -ONE[0],
    ),
    "cosine_embedding of zeros": ("cosine_embedding", {}, (ZERO, ONE), ONE[0]),
    "cosine_embedding of nothing": ("cosine_embedding", {}, (ZERO, ZERO), -ONE[0]),
    "triplet_margin of equals": ("triplet_margin", {"swap": True}, (ONE, ONE, ONE), None),
    "triplet_margin of equals without eps": (
        "triplet_margin",
        {"eps": 0.0},
        (ONE, ONE, ZERO),
        None,
    ),
    "triplet_margin of the 1-norm": (
        "triplet_margin",
        {"p": 1.0, "eps": 0.0},
        (ONE, ONE, ZERO),
        None,
    ),
    "triplet_margin of the largest": (
        "triplet_margin",
        {"p": math.inf, "eps": 0.0},
        (ONE, ZERO, -ONE),
        None,
    ),
    "triplet_margin of a norm below 1": (
        "triplet_margin",
        {"p": 0.5, "eps": 0.0},
        (ONE, ONE, ZERO),
        None,
    ),
    "triplet_margin of the 0-norm": ("triplet_margin", {"p": 0.0}, (ONE, ZERO, 2 * ONE), None),
    "gaussian_nll below eps": (
        "gaussian_nll",
        {"eps": 0.5},
        (ONE, ONE * torch.tensor([0, 0.1, 2])),
        ZERO,
    ),
    "gaussian_nll of an infinite variance": ("gaussian_nll", {}, (ONE, ONE * math.inf), ZERO),
    "poisson_nll of small counts": ("poisson_nll", {"full": True}, ONE, torch.tensor([0.0, 1, 2])),
    "poisson_nll of no rate": (
        "poisson_nll",
        {"log_input": False},
        ZERO,
        torch.tensor([0.0, 1, 2]),
    ),
}


@pytest.mark.parametrize("case", TIES)
def test_ties_and_ends_are_as_in_torch(case):
    name, options, prediction, target = TIES[case]
    prediction, target = cast((prediction, target), F64)
    for reduction in ("none", "mean", "sum"):
        loss, module = pair(name, {**options, "reduction": reduction})(F64)
        check(name, loss, module, prediction, target)


@pytest.mark.parametrize("case", ["none", "mean", "sum"])
def test_a_variance_that_is_a_number_is_as_in_torch_and_has_no_gradient(case):
    value, pullback = fn.gaussian_nll(reduction=case).vjp((ROWS, 0.7), OTHERS)
    module = nn.GaussianNLLLoss(reduction=case)
    expected, (gradient,) = reference(module, (ROWS, 0.7), OTHERS, None, "gaussian_nll")
    torch.testing.assert_close(value, expected)
    dmean, dvar = pullback()
    torch.testing.assert_close(dmean, gradient)
    assert dvar is None


def test_a_distance_is_any_layer_of_a_pair():
    difference = fn.serial(
        fn.parallel(fn.identity(), fn.elementwise(torch.neg, opposite)), fn.add()
    )
    distance = fn.serial(difference, fn.parameterless(maximum, maximum_backward, name="maximum"))
    for swap in (False, True):
        loss = fn.triplet_margin_with_distance(distance, margin=1.5, swap=swap, reduction="none")
        module = nn.TripletMarginWithDistanceLoss(
            distance_function=lambda a, b: (a - b).max(-1).values,
            margin=1.5,
            swap=swap,
            reduction="none",
        )
        check("triplet_margin_with_distance", loss, module, TRIPLET, None)


def opposite(x):
    return -torch.ones_like(x)


def maximum(x):
    values, index = x.max(-1)
    return values, {"index": index}, (x.shape[-1],)


def maximum_backward(dy, features, *, index):
    return dy.unsqueeze(-1) * F.one_hot(index, features)


@pytest.mark.parametrize("name", sorted({name for name, *_ in CASES} - {"gaussian_nll"}))
def test_an_empty_batch_has_no_elements_a_sum_of_0_and_a_mean_that_is_nan(name):
    _, options, prediction, target = next(
        case for case in CASES if case[0] == name and optree.tree_leaves(case[2])[0].dim()
    )
    prediction, target = optree.tree_map(lambda leaf: leaf[:0], (prediction, target))
    make = getattr(fn, name)
    value, pullback = make(**options, reduction="none").vjp(prediction, target)
    assert value.shape[0] == 0
    shapes = [leaf.shape for leaf in optree.tree_leaves(prediction)]
    for reduction, expected in (("sum", 0.0), ("mean", math.nan)):
        value, pullback = make(**options, reduction=reduction).vjp(prediction, target)
        torch.testing.assert_close(value, torch.tensor(expected, dtype=F64), equal_nan=True)
        assert [leaf.shape for leaf in optree.tree_leaves(pullback())] == shapes


def test_gradients_have_the_dtype_of_a_prediction_without_dimensions():
    for loss in (fn.mse(), fn.huber(), fn.soft_margin("none")):
        _, pullback = loss.vjp(ROWS[0, 0].float(), SIGNS[0, 0].float())
        assert pullback(torch.tensor(2.0, dtype=F64)).dtype == F32
    _, pullback = fn.gaussian_nll().vjp(
        (ROWS[0, 0].float(), POSITIVE[0, 0].float()), ROWS[0, 0].float()
    )
    assert {leaf.dtype for leaf in pullback(torch.tensor(2.0, dtype=F64))} == {F32}


def test_a_prediction_of_several_tensors_trains_the_layers_that_give_it():
    net = fn.branch(fn.linear(1), fn.serial(fn.linear(1), fn.softplus()))
    x, target = ROWS.float(), (ROWS[:, :1] * 2 + 1).float()
    step = fn.train_step(net, fn.gaussian_nll(), fn.adam(0.05))
    state = fn.init_train_state(net, fn.adam(0.05), fn.key(0), x)
    measured = []
    for _ in range(60):
        state, metrics = step(state, (x, target))
        measured.append(metrics["loss"].item())
    assert measured[-1] < measured[0] - 0.5
    twins = fn.shared(fn.linear(2))
    step = fn.train_step(twins, fn.triplet_margin(), fn.sgd(0.1))
    triplet = tuple(part.float() for part in TRIPLET)
    state = fn.init_train_state(twins, fn.sgd(0.1), fn.key(0), triplet)
    first_value = step(state, (triplet, None))[1]["loss"]
    for _ in range(20):
        state, metrics = step(state, (triplet, None))
    assert metrics["loss"] < first_value
