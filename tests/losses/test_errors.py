"""What losses refuse: targets out of range, shapes and dtypes that do not fit, bad options."""

import pytest
import torch
from losses.cases import (
    CASES,
    CLASSES,
    COUNTS,
    F64,
    LISTED,
    MODULES,
    OTHERS,
    POSITIVE,
    PROBABILITIES,
    ROWS,
    SIGNS,
    TRIPLET,
    WEIGHT,
    randn,
)

import funcnet as fn

ONE = torch.ones(3, dtype=F64)
P, N = PROBABILITIES, None
BAD_TARGETS = {
    "bce": (P, 2 * SIGNS, r"targets in \[0, 1\], got -2 to 2"),
    "bce_with_logits": (ROWS, SIGNS, r"targets in \[0, 1\], got -1 to 1"),
    "focal": (ROWS, SIGNS, r"targets in \[0, 1\], got -1 to 1"),
    "multilabel_soft_margin": (ROWS, LISTED.clamp(min=0), r"targets in \[0, 1\], got 0 to 3"),
    "cross_entropy of probabilities": (
        ROWS,
        2 * P.round(),
        r"probabilities as target in \[0, 1\], got 0 to 2",
    ),
    "cross_entropy": (ROWS, CLASSES + 1, r"classes in \[0, 4\), got \d to 4"),
    "nll": (ROWS, CLASSES - 1, r"classes in \[0, 4\), got -1 to \d"),
    "multi_margin": (ROWS, CLASSES + 1, r"classes in \[0, 4\), got \d to 4"),
    "multilabel_margin": (ROWS, LISTED + 1, r"classes in \[-1, 4\), got 0 to 4"),
    "multilabel_margin below": (ROWS, LISTED - 1, r"classes in \[-1, 4\), got -2 to 2"),
    "hinge": (ROWS, P, "targets of -1 and 1, got sizes of 0.*"),
    "soft_margin": (ROWS, SIGNS.relu(), "targets of -1 and 1, got sizes of 0 to 1"),
    "hinge_embedding": (ROWS, 2 * SIGNS, "targets of -1 and 1, got sizes of 2 to 2"),
    "cosine_embedding": ((ROWS, ROWS), CLASSES, "targets of -1 and 1, got sizes of 0 to 3"),
    "margin_ranking": ((ROWS, ROWS), 2 * SIGNS, r"targets in \[-1, 1\], got -2 to 2"),
    "gaussian_nll": ((ROWS, SIGNS), OTHERS, "variances >= 0, got -1 to 1"),
    "gaussian_nll of a number": ((ROWS, -1.0), OTHERS, "variances >= 0, got -1 to -1"),
}


# Elsewhere values are not read: that would wait for the device.
@pytest.mark.cpu_only
@pytest.mark.parametrize("case", BAD_TARGETS)
def test_a_target_out_of_range_is_refused(case):
    prediction, target, match = BAD_TARGETS[case]
    name = case.split()[0]
    for call in getattr(fn, name)():
        with pytest.raises(ValueError, match=f"{name}: expects {match}"):
            call(prediction, target)


def test_every_loss_of_a_limited_target_is_in_the_table():
    free = {"mse", "mae", "huber", "smooth_l1", "triplet_margin", "triplet_margin_with_distance"}
    free |= {"kl_div", "poisson_nll"}  # as in torch
    limited = {name.split()[0] for name in BAD_TARGETS}
    assert limited | free == set(MODULES) | {"hinge", "focal"}


BAD = {
    "hinge of another shape": (
        fn.hinge(),
        ROWS,
        SIGNS[0],
        ValueError,
        r"target of shape \(6, 4\).*\(4,\)",
    ),
    "soft_margin of another dtype": (
        fn.soft_margin(),
        ROWS,
        SIGNS.float(),
        TypeError,
        "target of integers or of dtype torch.float64",
    ),
    "hinge_embedding without target": (
        fn.hinge_embedding(),
        ROWS,
        N,
        TypeError,
        "target of integers",
    ),
    "hinge of integers": (fn.hinge(), CLASSES, CLASSES, TypeError, "floating-point prediction"),
    "margin_ranking of one": (fn.margin_ranking(), ROWS, SIGNS, TypeError, r"tuple \(x1, x2\)"),
    "margin_ranking of three": (
        fn.margin_ranking(),
        TRIPLET,
        SIGNS,
        TypeError,
        r"tuple \(x1, x2\)",
    ),
    "margin_ranking of two dtypes": (
        fn.margin_ranking(),
        (ROWS, ROWS.float()),
        SIGNS,
        TypeError,
        "of one dtype",
    ),
    "margin_ranking of two shapes": (
        fn.margin_ranking(),
        (ROWS, ROWS[:1]),
        SIGNS,
        ValueError,
        "of one shape",
    ),
    "margin_ranking's target": (
        fn.margin_ranking(),
        (ROWS, ROWS),
        SIGNS[:1],
        ValueError,
        "target of shape",
    ),
    "cosine_embedding of scalars": (
        fn.cosine_embedding(),
        (ROWS[0, 0], ROWS[0, 0]),
        SIGNS[0, 0],
        ValueError,
        r"\(batch, features\)",
    ),
    "cosine_embedding's target": (
        fn.cosine_embedding(),
        (ROWS, ROWS),
        SIGNS,
        ValueError,
        r"target of shape \(6,\)",
    ),
    "triplet_margin of two": (
        fn.triplet_margin(),
        (ROWS, ROWS),
        N,
        TypeError,
        r"\(anchor, positive, negative\)",
    ),
    "triplet_margin of two shapes": (
        fn.triplet_margin(),
        (ROWS, ROWS, ROWS[:1]),
        N,
        ValueError,
        "of one shape",
    ),
    "triplet_margin with a target": (
        fn.triplet_margin(),
        TRIPLET,
        SIGNS,
        TypeError,
        "None as target",
    ),
    "gaussian_nll of a mean": (fn.gaussian_nll(), ROWS, OTHERS, TypeError, r"tuple \(mean, var\)"),
    "gaussian_nll of integers": (
        fn.gaussian_nll(),
        (CLASSES, CLASSES),
        CLASSES,
        TypeError,
        "floating-point",
    ),
    "gaussian_nll of two dtypes": (
        fn.gaussian_nll(),
        (ROWS, POSITIVE.float()),
        OTHERS,
        TypeError,
        "variance of dtype",
    ),
    "gaussian_nll's target's dtype": (
        fn.gaussian_nll(),
        (ROWS, POSITIVE),
        OTHERS.float(),
        TypeError,
        "target of dtype",
    ),
    "gaussian_nll's variance": (
        fn.gaussian_nll(),
        (ROWS, POSITIVE[:1, :1]),
        OTHERS,
        ValueError,
        "variance of the mean's shape",
    ),
    "gaussian_nll's target": (
        fn.gaussian_nll(),
        (ROWS, POSITIVE),
        OTHERS[:2],
        ValueError,
        "target of the mean's shape",
    ),
    "multi_margin of images": (
        fn.multi_margin(),
        randn(2, 4, 3),
        CLASSES,
        ValueError,
        r"\(batch, classes\) or \(classes,\)",
    ),
    "multi_margin's weight": (
        fn.multi_margin(weight=WEIGHT[:2]),
        ROWS,
        CLASSES,
        ValueError,
        "weight for each of 4 classes",
    ),
    "multi_margin's target": (
        fn.multi_margin(),
        ROWS,
        LISTED,
        ValueError,
        r"target of shape \(6,\)",
    ),
    "multi_margin's dtype": (
        fn.multi_margin(),
        ROWS,
        SIGNS[:, 0],
        TypeError,
        "int64 class indices",
    ),
    "multilabel_margin's target": (
        fn.multilabel_margin(),
        ROWS,
        CLASSES,
        ValueError,
        "target of the prediction's shape",
    ),
    "multilabel_margin's dtype": (
        fn.multilabel_margin(),
        ROWS,
        SIGNS,
        TypeError,
        "int64 class indices",
    ),
    "multilabel_soft_margin of a number": (
        fn.multilabel_soft_margin(),
        ROWS[0, 0],
        SIGNS[0, 0],
        ValueError,
        "classes",
    ),
    "multilabel_soft_margin's weight": (
        fn.multilabel_soft_margin(WEIGHT[:2]),
        ROWS,
        SIGNS.relu(),
        ValueError,
        "weight that broadcasts",
    ),
    "poisson_nll's target": (fn.poisson_nll(), ROWS, COUNTS[0], ValueError, "target of shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case):
    loss, prediction, target, error, match = BAD[case]
    name = case.split()[0].removesuffix("'s")
    for call in loss:
        with pytest.raises(error, match=f"{name}: expects .*{match}"):
            call(prediction, target)


BAD_OPTIONS = {
    "bce": (lambda: fn.bce("sum"), "'sum' in the place of another option; pass reduction='sum'"),
    "bce_with_logits": (lambda: fn.bce_with_logits("sum"), "pass reduction='sum'"),
    "cross_entropy": (lambda: fn.cross_entropy("none"), "pass reduction='none'"),
    "nll": (lambda: fn.nll("mean"), "pass reduction='mean'"),
    "multilabel_soft_margin": (lambda: fn.multilabel_soft_margin("sum"), "pass reduction='sum'"),
    "poisson_nll": (lambda: fn.poisson_nll("sum"), "pass reduction='sum'"),
    "multi_margin": (lambda: fn.multi_margin(1, "sum"), "pass reduction='sum'"),
    "hinge_embedding": (lambda: fn.hinge_embedding("sum"), "pass reduction='sum'"),
    "cosine_embedding": (lambda: fn.cosine_embedding("sum"), "pass reduction='sum'"),
    "margin_ranking": (lambda: fn.margin_ranking("sum"), "pass reduction='sum'"),
    "triplet_margin": (lambda: fn.triplet_margin("sum"), "pass reduction='sum'"),
    "focal": (lambda: fn.focal("sum"), "pass reduction='sum'"),
    "bce of a list": (lambda: fn.bce([1.0]), "expects a tensor as weight, got list"),
    "nll of a list": (lambda: fn.nll([1.0]), "expects a tensor as weight, got list"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_reduction_in_the_place_of_another_option_is_refused(case):
    call, match = BAD_OPTIONS[case]
    with pytest.raises(TypeError, match=f"{case.split()[0]}: .*{match}"):
        call()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: fn.multi_margin(3), ValueError, "multi_margin: p must be 1 or 2, got 3"),
        (lambda: fn.triplet_margin(0.0), ValueError, "triplet_margin: margin must be positive"),
        (
            lambda: fn.triplet_margin_with_distance(margin=-1.0),
            ValueError,
            "triplet_margin_with_distance: margin must be positive, got -1",
        ),
        (
            lambda: fn.triplet_margin_with_distance(fn.mse),
            TypeError,
            "expects a Layer as distance_function, got the function mse, which makes a Loss",
        ),
        (
            lambda: fn.triplet_margin_with_distance(2.0),
            TypeError,
            "a Layer as distance_function, got",
        ),
        (lambda: fn.focal(1.5), ValueError, r"focal: alpha must be in \[0, 1\] or -1, got 1.5"),
        (lambda: fn.focal(gamma=-1.0), ValueError, "focal: gamma must be >= 0, got -1"),
    ],
)
def test_a_bad_option_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("name", [*MODULES, "hinge", "focal"])
def test_the_reduction_is_one_that_the_loss_has(name):
    with pytest.raises(ValueError, match=f"{name}: reduction must be one of .*, got 'average'"):
        getattr(fn, name)(reduction="average")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_dvalue_of_another_shape_is_refused_by_the_name_of_the_loss(name):
    _, options, prediction, target = next(case for case in CASES if case[0] == name)
    value, pullback = getattr(fn, name)(**options, reduction="none").vjp(prediction, target)
    for shape in ((), (1, *value.shape), (*value.shape, 1)):
        match = rf"{name}: pullback expects dvalue of the value's shape \({value.shape[0]},.*, got"
        with pytest.raises(ValueError, match=match):
            pullback(torch.ones(shape, dtype=F64))
    with pytest.raises(TypeError, match=f"{name}: pullback expects a tensor or a number"):
        pullback(None)
    _, pullback = getattr(fn, name)(**options).vjp(prediction, target)
    with pytest.raises(ValueError, match=rf"{name}: .* value's shape \(\), got \(1,\)"):
        pullback(torch.ones(1, dtype=F64))


def test_a_custom_loss_that_tells_no_value_takes_a_scalar_dvalue():
    pullback = fn.LossPullback(doubled_rule, {"x": ONE})
    assert torch.equal(pullback(torch.tensor(2.0)), 4 * ONE)
    with pytest.raises(ValueError, match=r"doubled: .* value's shape \(\), got \(3,\)"):
        pullback(ONE)
    elements = fn.LossPullback(doubled_rule, {"x": ONE}, (), ONE)
    assert torch.equal(elements(3 * ONE), 6 * ONE)
    assert torch.equal(elements(), 2 * ONE)


def doubled_rule(residuals, dvalue):
    return residuals["x"] * (2 * dvalue)


@pytest.mark.parametrize("check_finite", [False, True])
def test_a_step_refuses_a_loss_whose_value_is_not_a_scalar(check_finite):
    net = fn.linear(4)
    state = fn.init_train_state(net, fn.sgd(0.1), fn.key(0), ROWS)
    match = r"loss: expects a scalar value to train on, got \(6, 4\); pass reduction='mean'"
    with pytest.raises(ValueError, match=match):
        fn.train_step(net, fn.mse("none"), fn.sgd(0.1), check_finite=check_finite)(
            state, (ROWS, ROWS)
        )
    with pytest.raises(ValueError, match=match):
        fn.value_and_grad(net, fn.mse("none"), check_finite=check_finite)(
            state.params, (ROWS, ROWS)
        )
    step = fn.train_step(net, fn.mse(), fn.sgd(0.1), metrics={"each": fn.mse("none")})
    assert step(state, (ROWS, ROWS))[1]["each"].shape == (6, 4)
