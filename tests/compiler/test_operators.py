"""A sample of PyTorch's operators under jit; ``python -m tests.operators all`` takes all."""

import random
import warnings

import pytest
import torch

from tests import operators

NAMES = random.Random(2).sample([*operators.database()], 48)
BATCHES = [(NAMES[start : start + 8], torch.float32) for start in range(0, 40, 8)]
BATCHES.append((NAMES[40:], torch.bfloat16))


@pytest.mark.cpu_only
@pytest.mark.parametrize(("names", "dtype"), BATCHES, ids=lambda each: str(each)[:24])
def test_an_operator_gives_what_it_gives_eagerly_in_one_program(names, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [*operators.outcomes([*operators.cases(names, [dtype], 1, 0)])]
    assert found
    assert not [each for each in found if each[1].kind in ("staged", *operators.BAD)]


def test_the_page_of_refused_operators_names_operators():
    assert set(operators.refused_by_page()) <= set(operators.database())


def test_a_result_that_differs_is_said():
    one = [torch.ones(2)]
    assert "expected float64" in operators._differences("add", one, [torch.ones(2).double()])
    assert "not close" in operators._differences("add", one, [torch.zeros(2)])
    assert not operators._differences("empty_like", one, [torch.zeros(2)])
