"""The digits: how the images are split and moved, and how the learning rate goes."""

import digits_cnn as example
import pytest
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def data():
    return example.load()


def test_the_images_are_5000_of_28_by_28_as_many_of_each_digit(data):
    assert data.images.shape == (5000, 1, 28, 28)
    assert data.images.aminmax() == (0.0, 1.0)
    assert data.digits.bincount().tolist() == [500] * 10


def test_a_split_has_each_image_once_and_as_many_of_each_digit(data):
    numbered = example.Data(torch.arange(5000), data.digits)
    train, test = example.split(fn.key(0), numbered, 5000)
    assert train.digits.bincount().tolist() == [400] * 10
    assert test.digits.bincount().tolist() == [100] * 10
    both = torch.cat([train.images, test.images])
    assert torch.equal(both.sort().values, torch.arange(5000))
    again, other = [example.split(fn.key(seed), numbered, 5000)[1] for seed in (0, 1)]
    assert torch.equal(again.images, test.images)
    assert not torch.equal(other.images, test.images)


def test_images_move_by_at_most_two_pixels_both_ways_each_on_its_own():
    dot = torch.zeros(200, 1, 28, 28)
    dot[:, :, 14, 14] = 1
    moved = example.shifted(fn.key(0), dot)
    assert moved.sum((1, 2, 3)).eq(1).all()
    _, _, rows, columns = moved.nonzero().unbind(1)
    for places in (rows, columns):
        assert places.unique().tolist() == [12, 13, 14, 15, 16]
    assert not torch.equal(rows, columns)


def test_what_leaves_the_image_does_not_come_back_on_the_other_side():
    left = torch.zeros(100, 1, 28, 28)
    left[..., 0] = 1
    moved = example.shifted(fn.key(1), left)
    assert moved[..., 3:].eq(0).all()


def test_the_learning_rate_rises_for_a_fifth_and_falls_to_0():
    rate = example.one_cycle(100)
    rates = torch.stack([rate(torch.tensor(step)) for step in range(101)])
    assert rates[:21].diff().gt(0).all()
    assert rates[20:].diff().lt(0).all()
    torch.testing.assert_close(rates[20], torch.tensor(example.RATE))
    torch.testing.assert_close(rates[100], torch.tensor(0.0))
