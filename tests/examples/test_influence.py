"""Statistics of examples' gradients: those that torch.func gives of the gradients themselves."""

import influence as example
import pytest
import torch
from torch.func import grad, vmap

import funcnet as fn

pytestmark = pytest.mark.cpu_only

IMAGES = fn.random.normal(fn.key(1), (12, 1, 6, 6), torch.float64)
DIGITS = torch.arange(12) % 10
PARAMS, _ = example.NET.init(fn.key(0), IMAGES)


@pytest.fixture(scope="module")
def deferred():
    return example.defer(PARAMS, IMAGES, DIGITS)


@pytest.fixture(scope="module")
def gradients():
    """Of each example and layer, with the bias as the last column."""

    def loss(params, image, digit):
        return example.SUMMED.apply(example.NET.apply(params, image[None])[0], digit[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(PARAMS, IMAGES, DIGITS)
    return {
        path: torch.cat([each["weight"], each["bias"][..., None]], -1)
        for path, each in found.items()
    }


def test_the_noise_scale_is_that_of_the_examples_gradients(deferred, gradients):
    flat = torch.cat([each.flatten(1) for each in gradients.values()], 1)
    trace = flat.var(0).sum()
    expected = trace / (flat.mean(0).square().sum() - trace / 12)
    torch.testing.assert_close(example.noise_scale(deferred), expected)


def test_the_fishers_diagonal_is_the_mean_of_the_squares(deferred, gradients):
    for path, found in example.fisher_diagonal(deferred).items():
        torch.testing.assert_close(found, gradients[path].square().mean(0))


def test_the_factors_have_the_traces_of_the_gradients_and_are_those_of_the_library(deferred):
    mean = example.defer(PARAMS, IMAGES, DIGITS) * (1 / 12)
    for path, factors in fn.kronecker_factors(mean).items():
        for one, other in zip(factors, example.kronecker(deferred)[path], strict=True):
            torch.testing.assert_close(one, other)


def test_influences_are_inner_products_of_gradients(deferred, gradients):
    few = example.defer(PARAMS, IMAGES[:5], DIGITS[:5])
    flat = torch.cat([each.flatten(1) for each in gradients.values()], 1)
    torch.testing.assert_close(example.influence(deferred, few), flat @ flat[:5].mT)


def test_the_share_of_most():
    assert example.share_of_most(torch.tensor([[1.0, 89.0], [9.0, 1.0]])) == 0.5
    assert example.share_of_most(torch.ones(10)) == 0.9


def test_a_tenth_of_the_labels_is_wrong():
    digits = torch.arange(5000) % 10
    labels, wrong = example.mislabeled(fn.key(0), digits)
    assert torch.equal(labels != digits, wrong)
    assert 0.08 < wrong.float().mean() < 0.12
    assert labels.unique().tolist() == [*range(10)]


def test_the_program_prints_a_row_for_each_epoch_and_draws(tmp_path, capsys):
    example.main(["--epochs", "1", "--output", str(tmp_path / "made" / "influence.png")])
    header, before, after, wrote = capsys.readouterr().out.splitlines()
    assert header.startswith("epoch  loss  noise scale")
    assert (before.split()[0], after.split()[0]) == ("0", "1")
    assert float(after.split()[1]) < float(before.split()[1])
    assert int(before.split()[-1][:-1]) < 30 < int(after.split()[-1][:-1])
    assert wrote.startswith("wrote")
