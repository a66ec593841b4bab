"""A sample of the table of parity with torch.nn; `python -m tests.parity` makes the whole of it."""

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

import funcnet as fn
from tests.parity import exceptions, names
from tests.parity.compare import check
from tests.parity.own import OWN
from tests.parity.report import Report, outcome
from tests.parity.runs import add_class
from tests.parity.samples import DTYPES, TORCH, samples_of

pytestmark = pytest.mark.cpu_only

COMPUTING = sorted(filter(exceptions.computes, nn.modules.__all__))


@pytest.mark.parametrize("name", COMPUTING)
def test_a_class_of_torch_gives_the_same_as_its_layer_or_loss(name):
    report = Report()
    add_class(report, name, DTYPES.values(), count=8)
    assert not report.failed, "\n".join(report.lines(name, verbose=True))


@pytest.mark.parametrize("name", nn.modules.__all__)
def test_a_class_of_torch_has_cases_or_a_reason_for_having_none(name):
    assert (name in exceptions.CLASSES) != (name in OWN)


@pytest.mark.parametrize("name", COMPUTING)
def test_a_class_that_is_no_exception_has_a_layer_or_a_loss(name):
    assert callable(names.constructor(getattr(nn.modules, name)))


def test_no_sample_of_torch_is_lost(monkeypatch):
    monkeypatch.setattr("tests.parity.runs.check", lambda sample: None)
    report, count = Report(), 0
    for info in module_db:
        for training in (True, False):
            options = {"device": "cpu", "dtype": torch.float64, "requires_grad": False}
            with torch.random.fork_rng():
                count += len([*info.module_inputs_func(info, training=training, **options)])
        add_class(report, info.module_cls.__name__, [torch.float64])
    rows = [sum(row.values()) for (_, source), row in report.counts.items() if source == TORCH]
    assert sum(rows) == count > 3000


def test_a_wrong_gradient_fails(monkeypatch):
    right = fn.tanh()

    def wrong():
        def vjp(params, x, state, *, key=None, train=True):
            y, pullback, state = right.vjp(params, x, state, key=key, train=train)
            return y, lambda dy, **halves: pullback(dy * (1 + 1e-8), **halves), state

        return right._replace(vjp=vjp)

    monkeypatch.setattr(fn, "tanh", wrong)
    sample = samples_of("Tanh", [torch.float64])[TORCH][0]
    found = outcome(lambda: check(sample))
    assert found.kind == "fail"
    assert found.reason.startswith("dx: the error at '0.0' is")


def test_what_fails_is_told_with_its_reason():
    report = Report()
    for number in (1.5, 2.5):

        def check(number=number):
            raise AssertionError(f"dx: the error is {number}")

        report.add("Linear", "own", f"case {number}", outcome(check))
    report.add("Linear", "own", "case 3", outcome(lambda: None))
    row, reason, first = report.lines("Linear")
    assert row.split() == ["Linear", "own", "1", "0", "2"]
    assert reason.strip() == "fail 2: dx: the error is 1.5"
    assert first.strip() == "case 1.5: dx: the error is 1.5"
    assert report.total().split() == ["total", "1", "0", "2"]
    assert report.failed == 2
