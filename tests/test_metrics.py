"""Metrics: numpy's numbers of all examples at once, however they are split, masked or compiled."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import funcnet as fn
from funcnet import metrics

F64 = torch.float64
pytestmark = pytest.mark.cpu_only  # the oracles are numpy's


def generator(seed):
    return np.random.default_rng(seed)


def scores(seed, n, classes=5, extra=()):
    """Scores of classes and a target, in which each class is there."""
    rng = generator(seed)
    prediction = rng.normal(size=(n, classes, *extra))
    return torch.tensor(prediction), torch.tensor(rng.integers(0, classes, size=(n, *extra)))


def probabilities(seed, n):
    rng = generator(seed)
    target = rng.integers(0, 2, size=n)
    return torch.tensor(rng.random(n) * 0.7 + 0.3 * target), torch.tensor(target)


def on_grid(seed, n):
    prediction, target = probabilities(seed, n)
    return (prediction * 20).round() / 20, target


def softmaxes(seed, n):
    prediction, target = scores(seed, n, 3)
    return prediction.softmax(1), target


def numbers(seed, n, outputs=()):
    rng = generator(seed)
    target = rng.normal(size=(n, *outputs)) + 3
    return torch.tensor(target + 0.3 * rng.normal(size=(n, *outputs))), torch.tensor(target)


def columns(seed, n):
    return numbers(seed, n, (3,))


# Oracles, on numpy arrays of all examples; written from the definitions.


def top(k):
    def oracle(y, t):
        order = np.argsort(-y, axis=1, kind="stable")
        return np.mean([t[i] in order[i, :k] for i in range(len(t))])

    return oracle


def matrix(y, t, classes=5):
    counts = np.zeros((classes, classes))
    for predicted, actual in zip(y.argmax(1).ravel(), t.ravel(), strict=True):
        counts[actual, predicted] += 1
    return counts


def normalized(axis):
    def oracle(y, t):
        counts = matrix(y, t)
        sums = counts.sum(axis=axis, keepdims=True)
        return np.divide(counts, sums, out=np.zeros_like(counts), where=sums > 0)

    return oracle


def binary_counts(y, t):
    predicted = y > 0.5
    return (
        (predicted & (t == 1)).sum(),
        (predicted & (t == 0)).sum(),
        (~predicted & (t == 1)).sum(),
    )


def ratio_of(kind, tp, fp, fn_):
    over = {"precision": tp + fp, "recall": tp + fn_, "f1": tp + (fp + fn_) / 2,
            "f2": tp + (fp + 4 * fn_) / 5}[kind]  # fmt: skip
    return tp / over if over else 0.0


def binary(kind):
    return lambda y, t: ratio_of(kind, *binary_counts(y, t))


def averaged(kind, average):
    def oracle(y, t):
        counts = matrix(y, t)
        tp = counts.diagonal()
        fp, fn_ = counts.sum(0) - tp, counts.sum(1) - tp
        if average == "micro":
            return ratio_of(kind, tp.sum(), fp.sum(), fn_.sum())
        each = np.array([ratio_of(kind, *row) for row in zip(tp, fp, fn_, strict=True)])
        if average is None:
            return each
        there = (tp + fp + fn_) > 0
        weights = counts.sum(1) if average == "weighted" else there
        return (each * weights).sum() / weights.sum()

    return oracle


def area(y, t):
    """How often a positive is above a negative; equal ones count a half."""
    positive, negative = y[t == 1], y[t == 0]
    if not len(positive) or not len(negative):
        return np.nan
    above = positive[:, None] > negative[None, :]
    return (above + (positive[:, None] == negative[None, :]) / 2).mean()


def areas(y, t):
    return np.array([area(np.floor(y[:, c] * 999), t == c) for c in range(3)])


def weighted_areas(y, t):
    return (areas(y, t) * np.bincount(t, minlength=3)).sum() / len(t)


def log_likelihood(y, t):
    shifted = y - y.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return np.take_along_axis(log_p, t[:, None], 1)


def determination(y, t):
    return 1 - ((y - t) ** 2).sum(0) / ((t - t.mean(0)) ** 2).sum(0)


def by_variance(y, t):
    return np.average(determination(y, t), weights=t.var(0))


# A metric, examples of a seed and a number, and the oracle.
CASES = {
    "accuracy": (metrics.accuracy(), scores, lambda y, t: (y.argmax(1) == t).mean()),
    "accuracy of pixels": (
        metrics.accuracy(),
        lambda seed, n: scores(seed, n, 3, (2, 4)),
        lambda y, t: (y.argmax(1) == t).mean(),
    ),
    "accuracy of a threshold": (
        metrics.accuracy(threshold=0.4),
        probabilities,
        lambda y, t: ((y > 0.4) == t).mean(),
    ),
    "accuracy of labels": (
        metrics.accuracy(),
        lambda seed, n: tuple(torch.tensor(generator(seed).integers(0, 4, (2, n)))),
        lambda y, t: (y == t).mean(),
    ),
    "top_k_accuracy of 1": (metrics.top_k_accuracy(1), scores, top(1)),
    "top_k_accuracy of 3": (metrics.top_k_accuracy(3), scores, top(3)),
    "confusion_matrix": (metrics.confusion_matrix(5), scores, matrix),
    "confusion_matrix of pixels": (
        metrics.confusion_matrix(3),
        lambda seed, n: scores(seed, n, 3, (4,)),
        lambda y, t: matrix(y, t, 3),
    ),
    "confusion_matrix, true": (
        metrics.confusion_matrix(5, normalize="true"), scores, normalized(1)
    ),
    "confusion_matrix, pred": (
        metrics.confusion_matrix(5, normalize="pred"), scores, normalized(0)
    ),
    "confusion_matrix, all": (
        metrics.confusion_matrix(5, normalize="all"), scores, normalized((0, 1))
    ),
    "precision": (metrics.precision(), probabilities, binary("precision")),
    "recall": (metrics.recall(), probabilities, binary("recall")),
    "f1": (metrics.f1(), probabilities, binary("f1")),
    "fbeta": (metrics.fbeta(2.0), probabilities, binary("f2")),
    **{
        f"{name}, {average}": (getattr(metrics, name)(5, average), scores, averaged(name, average))
        for name in ("precision", "recall", "f1")
        for average in ("micro", "macro", "weighted", None)
    },
    "auroc on the grid": (metrics.auroc(21), on_grid, area),
    "auroc of classes": (metrics.auroc(1000, classes=3, average=None), softmaxes, areas),
    "auroc, macro": (
        metrics.auroc(1000, classes=3), softmaxes, lambda y, t: areas(y, t).mean()
    ),
    "auroc, weighted": (
        metrics.auroc(1000, classes=3, average="weighted"), softmaxes, weighted_areas
    ),
    "perplexity": (metrics.perplexity(), scores, lambda y, t: np.exp(-log_likelihood(y, t).mean())),
    "perplexity of sequences": (
        metrics.perplexity(),
        lambda seed, n: scores(seed, n, 5, (6,)),
        lambda y, t: np.exp(-log_likelihood(y, t).mean()),
    ),
    "mean of elements": (
        metrics.mean(fn.cross_entropy(reduction="none")),
        scores,
        lambda y, t: -log_likelihood(y, t).mean(),
    ),
    "mean of a batch's mean": (
        metrics.mean(fn.mse()), columns, lambda y, t: ((y - t) ** 2).mean()
    ),
    "mean of a function": (
        metrics.mean(lambda y, t: (y - t).abs().amax(1)),
        columns,
        lambda y, t: np.abs(y - t).max(1).mean(),
    ),
    "mean_squared_error": (
        metrics.mean_squared_error(), columns, lambda y, t: ((y - t) ** 2).mean()
    ),
    "root of mean_squared_error": (
        metrics.mean_squared_error(squared=False),
        numbers,
        lambda y, t: np.sqrt(((y - t) ** 2).mean()),
    ),
    "mean_absolute_error": (
        metrics.mean_absolute_error(), numbers, lambda y, t: np.abs(y - t).mean()
    ),
    "r2": (metrics.r2(), numbers, determination),
    "r2 of columns": (metrics.r2(3), columns, lambda y, t: determination(y, t).mean()),
    "r2, raw_values": (metrics.r2(3, "raw_values"), columns, determination),
    "r2, variance_weighted": (metrics.r2(3, "variance_weighted"), columns, by_variance),
}  # fmt: skip
cases = pytest.mark.parametrize(("metric", "examples", "oracle"), CASES.values(), ids=CASES)


def assert_close(found, expected, **options):
    expected = torch.as_tensor(np.asarray(expected), dtype=F64)
    options = {"rtol": 1e-10, "atol": 1e-12, **options}
    torch.testing.assert_close(found.double(), expected, equal_nan=True, **options)


def assert_accs_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, leaf in found.items():
        assert leaf.dtype == expected[key].dtype
        torch.testing.assert_close(leaf, expected[key], rtol=1e-12, atol=1e-12, equal_nan=True)


def over(metric, *batches):
    acc = metric.init()
    for prediction, target in batches:
        acc = metric.update(acc, prediction, target)
    return acc


def test_each_metric_is_in_the_table():
    public = {name for name, value in vars(metrics).items() if callable(value) and name.islower()}
    named = {word.strip(",") for name in CASES for word in name.split()}
    assert public - {"masked", "summed"} <= named


@cases
@pytest.mark.parametrize("seed", [0, 1])
def test_the_value_is_that_of_all_examples_at_once(metric, examples, oracle, seed):
    prediction, target = examples(seed, 60)
    expected = oracle(prediction.numpy(), target.numpy())
    before = prediction._version, target._version
    whole = over(metric, (prediction, target))
    assert (prediction._version, target._version) == before
    assert_close(metric.value(whole), expected)
    assert_close(metric.of_batch(prediction, target), expected)
    # Batches of any size, none with examples among them, and the parts of two ranks.
    cuts = [0, 7, 7, 30, 60]
    batches = [(prediction[a:b], target[a:b]) for a, b in pairwise(cuts)]
    assert_accs_equal(over(metric, *batches), whole)
    ranks = [over(metric, *batches[:2]), over(metric, *batches[2:])]
    assert_accs_equal(fn.tree.map(torch.add, *ranks), whole)


@cases
def test_sums_are_float64_and_counts_int64_and_each_keeps_its_shape(metric, examples, oracle):
    prediction, target = examples(0, 10)
    start = metric.init()
    found = metric.update(start, prediction, target)
    assert fn.tree.alike(start, found)
    for leaf in found.values():
        assert leaf.dtype in (F64, torch.int64)
        assert not leaf.requires_grad
    assert all(not leaf.any() for leaf in metric.init("cpu").values())
    half = metric.update(start, *_halved(prediction, target))
    assert fn.tree.alike(start, half)


def _halved(prediction, target):
    if prediction.is_floating_point():
        prediction = prediction.bfloat16()
        target = target.bfloat16() if target.is_floating_point() else target
    return prediction, target


@cases
def test_no_value_is_read(metric, examples, oracle):
    prediction, target = (x.to("meta") for x in examples(0, 6))
    acc = metric.update(metric.init("meta"), prediction, target)
    assert all(leaf.is_meta for leaf in acc.values())
    assert metric.value(acc).is_meta


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 3))
def test_however_the_examples_are_split_the_sums_are_the_same(cuts, seed):
    batches = list(pairwise([0, *sorted(cuts), 40]))
    for name in ("accuracy", "confusion_matrix", "f1", "auroc on the grid", "r2 of columns"):
        metric, examples, _ = CASES[name]
        prediction, target = examples(seed, 40)
        parts = [over(metric, (prediction[a:b], target[a:b])) for a, b in batches]
        total = metric.init()
        for part in parts:
            total = fn.tree.map(torch.add, total, part)
        assert_accs_equal(total, over(metric, (prediction, target)))


@cases
def test_no_examples_change_nothing_and_have_no_value(metric, examples, oracle):
    prediction, target = examples(0, 12)
    some = over(metric, (prediction, target))
    assert_accs_equal(metric.update(some, prediction[:0], target[:0]), some)
    value = metric.value(over(metric, (prediction[:0], target[:0])))
    nothing = value.isnan() | (value == 0)  # the sums, or the zero_division, of ratios of counts
    assert bool(nothing.all())


@cases
def test_members_under_vmap_are_their_solo_runs(metric, examples, oracle):
    pairs = [examples(seed, 9) for seed in range(3)]
    stacked = [torch.stack(column) for column in zip(*pairs, strict=True)]
    together = fn.vmap(lambda y, t: metric.update(metric.init(), y, t))(*stacked)
    values = fn.vmap(metric.value)(together)
    for member, (prediction, target) in enumerate(pairs):
        solo = over(metric, (prediction, target))
        assert_accs_equal({key: leaf[member] for key, leaf in together.items()}, solo)
        assert_close(values[member], metric.value(solo))


@cases
def test_a_masked_example_counts_nothing(metric, examples, oracle):
    if metric in (CASES["mean of a batch's mean"][0],):
        pytest.skip("a mean over a batch has no examples")
    prediction, target = examples(0, 20)
    mask = torch.arange(20) % 3 > 0
    expected = over(metric, (prediction[mask], target[mask]))
    start = metric.init()
    assert_accs_equal(metric.update(start, prediction, target, mask), expected)
    masked = metrics.masked(metric)
    assert_accs_equal(masked.update(start, prediction, (target, mask)), expected)
    assert_close(masked.of_batch(prediction, (target, mask)), metric.value(expected).numpy())


COMPILED = {
    name: CASES[name]
    for name in ("accuracy", "top_k_accuracy of 3", "confusion_matrix", "precision, macro",
                 "auroc of classes", "perplexity", "mean of elements", "r2 of columns")
}  # fmt: skip


def test_under_jit_and_scan_they_are_the_same_and_compile_once():
    batches = [
        {name: examples(seed, 8) for name, (_, examples, _) in COMPILED.items()}
        for seed in range(3)
    ]
    stacked = fn.tree.map(lambda *each: torch.stack(each), *batches)
    traces = []

    def update(accs, batch):
        return {name: case[0].update(accs[name], *batch[name]) for name, case in COMPILED.items()}

    def run(batches):
        traces.append(None)
        start = {name: metric.init() for name, (metric, _, _) in COMPILED.items()}
        accs, _ = fn.scan(lambda accs, batch: (update(accs, batch), None), start, batches)
        return accs, {name: case[0].value(accs[name]) for name, case in COMPILED.items()}

    compiled = fn.jit(run)
    for data in (stacked, fn.tree.map(lambda x: x.flip(0), stacked)):
        accs, values = compiled(data)
        for name, (metric, _, _) in COMPILED.items():
            expected = over(metric, *[batch[name] for batch in batches])
            assert_accs_equal(accs[name], expected)
            assert_close(values[name], metric.value(expected).numpy())
    assert len(traces) == 1
    eager, _ = run(stacked)
    for name, acc in accs.items():
        assert_accs_equal(eager[name], acc)


@pytest.mark.parametrize(
    "name", ["accuracy", "top_k_accuracy", "confusion_matrix", "precision", "auroc", "perplexity"]
)
def test_an_ignored_target_counts_nothing(name):
    arguments = {"top_k_accuracy": (2,), "confusion_matrix": (5,), "precision": (5, "macro")}
    options = {"classes": 5} if name == "auroc" else {}
    make = getattr(metrics, name)
    prediction, target = scores(3, 30)
    prediction = prediction.softmax(1) if name == "auroc" else prediction
    ignored = torch.where(torch.arange(30) % 4 == 0, -100, target)
    kept = ignored != -100
    plain = make(*arguments.get(name, ()), **options)
    ignoring = make(*arguments.get(name, ()), **options, ignore_index=-100)
    expected = over(plain, (prediction[kept], target[kept]))
    assert_accs_equal(over(ignoring, (prediction, ignored)), expected)
    with pytest.raises(ValueError, match=r"expects classes in \[0, 5\), got -100"):
        over(plain, (prediction, ignored))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40),
    st.integers(2, 30),
)
def test_the_error_of_auroc_is_within_its_bound(examples, thresholds):
    prediction = torch.tensor([score for score, _ in examples], dtype=F64)
    target = torch.tensor([int(positive) for _, positive in examples])
    metric = metrics.auroc(thresholds)
    acc = over(metric, (prediction, target))
    exact, found = area(prediction.numpy(), target.numpy()), float(metric.value(acc))
    if math.isnan(exact):
        assert math.isnan(found)
        return
    positive, negative = acc["positive"].double(), acc["negative"].double()
    bound = (positive * negative).sum() / (2 * positive.sum() * negative.sum())
    assert abs(found - exact) <= float(bound) + 1e-12


def test_auroc_takes_thresholds_and_logits():
    prediction, target = probabilities(0, 50)
    logits = prediction.logit()
    exact = metrics.auroc(sorted(logits.tolist())).of_batch(logits, target)
    assert_close(exact, area(prediction.numpy(), target.numpy()))
    grid = torch.linspace(-3, 3, 7)
    assert_close(
        metrics.auroc(grid).of_batch(logits, target),
        metrics.auroc(grid.tolist()).of_batch(logits, target),
    )
    one_class = metrics.auroc(50, classes=3).of_batch(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))
    each = metrics.auroc(50, classes=3, average="none").of_batch
    assert each(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))[2].isnan()
    assert not one_class.isnan()


def test_classes_that_are_nowhere_have_no_part_in_a_mean():
    prediction, target = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    assert_close(metrics.recall(5, "macro").of_batch(prediction, target), 0.75)
    assert_close(metrics.recall(5, None).of_batch(prediction, target), [0.5, 1, 0, 0, 0])
    ones = metrics.recall(5, None, zero_division=1).of_batch(prediction, target)
    assert_close(ones, [0.5, 1, 1, 1, 1])
    assert_close(metrics.precision(pos_label=0).of_batch(prediction, target), 1.0)


def test_ties_count_for_the_first_class_and_nan_for_none():
    same = torch.zeros(4, 4)
    target = torch.arange(4)
    for k in range(1, 5):
        assert_close(metrics.top_k_accuracy(k).of_batch(same, target), k / 4)
    assert_close(metrics.accuracy().of_batch(same, target), 0.25)
    nan = torch.full((4, 4), torch.nan)
    assert_close(metrics.top_k_accuracy(3).of_batch(nan, target), 0.0)


def test_binary_targets_may_be_floats_as_those_of_binary_losses():
    prediction, target = probabilities(0, 20)
    for metric in (metrics.accuracy(), metrics.f1(), metrics.auroc(), metrics.confusion_matrix(2)):
        assert_accs_equal(
            over(metric, (prediction, target.double())), over(metric, (prediction, target))
        )


def test_r2_of_a_constant_target():
    constant = torch.full((3,), 2.0)
    assert_close(metrics.r2().of_batch(constant, constant), 1.0)
    assert_close(metrics.r2().of_batch(constant + 1, constant), 0.0)


def test_a_metric_of_ones_own_is_made_of_sums():
    def sums(prediction, target, keep):
        return {"bias": (prediction - target).sum(), "count": target.numel()}

    bias = metrics.summed(
        "bias",
        sums,
        lambda acc: acc["bias"] / acc["count"],
        counts={"count": ()},
        totals={"bias": ()},
    )
    prediction, target = numbers(0, 12)
    assert_close(bias.of_batch(prediction, target), (prediction - target).mean().numpy())


CLASSES, LABELS = torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
REFUSED = [
    (lambda: metrics.top_k_accuracy(0), ValueError, "k of at least 1, got 0"),
    (lambda: metrics.confusion_matrix(1), ValueError, "classes of at least 2"),
    (lambda: metrics.confusion_matrix(3, normalize="rows"), ValueError, "normalize"),
    (lambda: metrics.precision(3), ValueError, "another average than 'binary' for 3 classes"),
    (lambda: metrics.f1(3, "mean"), ValueError, "average to be one of"),
    (lambda: metrics.recall(zero_division=2), ValueError, "zero_division of 0 or 1"),
    (lambda: metrics.recall(pos_label=2), ValueError, "pos_label"),
    (lambda: metrics.fbeta(0.0), ValueError, "beta > 0"),
    (lambda: metrics.auroc(1), ValueError, "at least 2 thresholds"),
    (lambda: metrics.auroc([0.5, 0.1]), ValueError, "rising order"),
    (lambda: metrics.auroc(classes=3, average="micro"), ValueError, "average"),
    (lambda: metrics.r2(0), ValueError, "outputs"),
    (lambda: metrics.r2(2, "mean"), ValueError, "multioutput"),
    (lambda: metrics.mean(metrics.r2()), TypeError, "a Loss or a function, got Metric"),
    (lambda: metrics.masked(fn.mse()), TypeError, "expects a Metric, got Loss"),
    (lambda: metrics.accuracy(ignore_index=0.5), TypeError, "integer as ignore_index"),
    (lambda: metrics.accuracy().of_batch(CLASSES, LABELS[:3]), ValueError, "target of shape .3,"),
    (lambda: metrics.accuracy().of_batch(CLASSES, LABELS.float()), TypeError, "integer class"),
    (lambda: metrics.accuracy().of_batch(CLASSES[:, :1], LABELS), ValueError, "two classes or mor"),
    (
        lambda: metrics.accuracy().of_batch(CLASSES, LABELS + 1),
        ValueError,
        r"in \[0, 3\), got 1 to",
    ),
    (lambda: metrics.precision(4, "macro").of_batch(CLASSES, LABELS), ValueError, "of 4 classes"),
    (lambda: metrics.confusion_matrix(2).of_batch(LABELS, LABELS), ValueError, "predicted|classes"),
    (lambda: metrics.auroc().of_batch(CLASSES, LABELS), ValueError, "pass classes"),
    (lambda: metrics.auroc(classes=4).of_batch(CLASSES, LABELS), ValueError, "of 4 classes, got 3"),
    (lambda: metrics.perplexity().of_batch(LABELS, LABELS), TypeError, "floating-point"),
    (
        lambda: metrics.r2().of_batch(torch.ones(4, 1), torch.ones(4)),
        ValueError,
        "prediction's shape",
    ),
    (lambda: metrics.r2(3).of_batch(torch.ones(4), torch.ones(4)), ValueError, r"\(batch, 3\)"),
    (lambda: metrics.accuracy().update({}, CLASSES, LABELS), ValueError, "acc with"),
    (
        lambda: metrics.accuracy().update(metrics.accuracy().init(), CLASSES, LABELS, LABELS),
        TypeError,
        "mask of bools",
    ),
    (
        lambda: metrics.masked(metrics.accuracy()).of_batch(CLASSES, (LABELS, LABELS[:2] > 0)),
        ValueError,
        r"mask of the shape \(4,\)",
    ),
    (lambda: metrics.masked(metrics.accuracy()).of_batch(CLASSES, LABELS), ValueError, "mask"),
    (
        lambda: metrics.masked(metrics.mean(fn.mse())).of_batch(
            torch.ones(2), (torch.ones(2), torch.tensor([True, False]))
        ),
        ValueError,
        "reduction='none'",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_options_and_inputs_are_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
