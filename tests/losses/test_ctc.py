"""ctc: against torch through the log_softmax that torch supposes, the kernel, what it refuses."""

import importlib
import itertools

import pytest
import torch
from layers.oracle import randn
from torch.nn import functional as F

import funcnet as fn

# The function has the module's name.
ctc_module = importlib.import_module("funcnet.losses.ctc")
TIMES, BATCH, CLASSES = 6, 3, 5
LOGITS = randn(TIMES, BATCH, CLASSES)
TARGETS = torch.tensor([[1, 1, 2], [3, 4, 1], [2, 3, 2]])
LENGTHS = {
    "some": ([6, 5, 4], [3, 2, 1]),
    "nothing": ([0, 5, 1], [0, 2, 0]),
    "too short": ([6, 2, 0], [0, 3, 2]),
}
CASES = list(itertools.product(LENGTHS, ("none", "mean", "sum"), (False, True)))


@pytest.mark.parametrize(("lengths", "reduction", "zero_infinity"), CASES)
def test_value_and_gradient_of_the_logits_are_torchs(lengths, reduction, zero_infinity):
    target = (TARGETS, *map(torch.tensor, LENGTHS[lengths]))
    leaf = LOGITS.clone().requires_grad_()
    expected = F.ctc_loss(leaf.log_softmax(-1), *target, 0, reduction, zero_infinity)
    dvalue = randn(*expected.shape)
    (gradient,) = torch.autograd.grad(expected, leaf, dvalue)
    log_p, pullback, _ = fn.log_softmax(-1).vjp({}, LOGITS)
    value, loss_pullback = fn.ctc(0, reduction, zero_infinity).vjp(log_p, target)
    torch.testing.assert_close(value, expected.detach())
    got = pullback(loss_pullback(dvalue))[1]
    torch.testing.assert_close(got, gradient, equal_nan=True)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_formula_gives_what_the_kernel_gives(lengths, monkeypatch):
    target = (TARGETS, *map(torch.tensor, LENGTHS[lengths]))
    results = []
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(ctc_module, "_has_kernel", lambda *tensors: False)
        value, pullback = fn.ctc(reduction="none").vjp(LOGITS, target)
        results.append((value, pullback(), pullback))
    for one, other in itertools.product(results, repeat=2):
        torch.testing.assert_close(one[:2], other[:2], equal_nan=True)
        # Without a kernel the rule takes the kernel's residuals, too.
        torch.testing.assert_close(one[2](), other[1], equal_nan=True)


def test_a_path_of_probability_zero_is_none():
    log_p = LOGITS.log_softmax(-1).index_fill(2, torch.tensor([1]), -torch.inf)
    target = (TARGETS, *map(torch.tensor, LENGTHS["some"]))
    value, pullback = fn.ctc(reduction="none", zero_infinity=True).vjp(log_p, target)
    expected = F.ctc_loss(log_p, *target, reduction="none", zero_infinity=True)
    torch.testing.assert_close(value, expected)
    assert pullback().isfinite().all()
    several = fn.vmap(lambda log_p: fn.ctc(reduction="none").apply(log_p, target))(log_p[None])
    assert several[0].tolist()[0] == float("inf")
    torch.testing.assert_close(several[0][2], expected[2])


def test_a_step_trains_and_half_precision_is_summed_in_single():
    target = {
        "targets": TARGETS.int(),
        "input_lengths": torch.tensor([6, 6, 6]),
        "target_lengths": torch.tensor([3, 3, 3], dtype=torch.int32),
    }
    model = fn.serial(fn.linear(CLASSES), fn.log_softmax(-1))
    x = randn(TIMES, BATCH, 4, dtype=torch.float32)
    step = fn.train_step(model, fn.ctc(), fn.sgd(0.5))
    state = fn.init_train_state(model, fn.sgd(0.5), fn.key(0), x)
    losses = []
    for _ in range(5):
        state, metrics = step(state, (x, target))
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    half = fn.ctc().apply(LOGITS.bfloat16(), target)
    assert half.dtype == torch.bfloat16
    full = fn.ctc().apply(LOGITS.bfloat16().float(), target)
    torch.testing.assert_close(half, full.bfloat16())


def three(targets=TARGETS, inputs=(6, 5, 4), lengths=(3, 2, 1)):
    return targets, torch.tensor(inputs), torch.tensor(lengths)


REFUSED = {
    "no tuple": (TARGETS, TypeError, "tuple or dict"),
    "two parts": (three()[:2], TypeError, "tuple or dict"),
    "floating lengths": (three(lengths=(3.0, 2.0, 1.0)), TypeError, "int32 or int64"),
    "other names": ({"targets": TARGETS}, TypeError, "tuple or dict"),
    "one length": (three(inputs=6), ValueError, r"input_lengths of shape \(3,\), got \(\)"),
    "long input": (three(inputs=(7, 5, 4)), ValueError, r"input_lengths in \[0, 6\], got 4 to 7"),
    "negative": (three(lengths=(-1, 2, 1)), ValueError, r"target_lengths in \[0, 3\], got -1 to 2"),
    "long target": (three(lengths=(4, 2, 1)), ValueError, r"target_lengths in \[0, 3\], got 1"),
    "class": (three(TARGETS + 2), ValueError, r"targets in \[0, 4\], got 1 to 6"),
    "below": (three(TARGETS - 2), ValueError, r"targets in \[0, 4\], got -1 to 2"),
    "blank": (three(TARGETS - 1), ValueError, "other than the blank 0"),
    "another batch": (three(TARGETS[:2]), ValueError, "for a batch of 3, got"),
    "not all": (three(TARGETS[0]), ValueError, r"add up to 3, got \[3, 2, 1\]"),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", REFUSED)
def test_a_target_that_does_not_fit_is_refused(case):
    target, error, match = REFUSED[case]
    for call in fn.ctc():
        with pytest.raises(error, match=f"ctc: expects .*{match}"):
            call(LOGITS, target)


def test_other_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"ctc: expects \(time, batch, classes\)"):
        fn.ctc().apply(LOGITS[None], three())
    with pytest.raises(ValueError, match="blank within 5 classes, got 5"):
        fn.ctc(5).apply(LOGITS, three())
    with pytest.raises(TypeError, match="floating-point prediction"):
        fn.ctc().apply(LOGITS.long(), three())
    with pytest.raises(TypeError, match="pass reduction='sum'"):
        fn.ctc("sum")
    with pytest.raises(ValueError, match="reduction must be one of"):
        fn.ctc(0, "batchmean")
