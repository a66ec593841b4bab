"""epoch_batches: what a loop over an epoch runs over."""

import pytest
import torch
from hypothesis import given, strategies as st

import funcnet as fn


@given(st.integers(1, 30), st.integers(1, 30))
def test_every_example_comes_at_most_once_and_only_a_part_batch_is_left_out(size, batch_size):
    if batch_size > size:
        batch_size = size
    data = {"x": torch.arange(size), "pair": torch.arange(2 * size).reshape(size, 2)}
    batches = fn.epoch_batches(fn.key(size), data, batch_size)
    count = size // batch_size
    assert batches["x"].shape == (count, batch_size)
    assert batches["pair"].shape == (count, batch_size, 2)
    seen = batches["x"].flatten()
    assert len(set(seen.tolist())) == count * batch_size
    assert torch.equal(batches["pair"].flatten(0, 1)[:, 0], 2 * seen)


def test_keys_shuffle_and_none_keeps_the_order():
    x = torch.arange(100)
    one, same, other = (fn.epoch_batches(fn.key(seed), x, 10) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(one.flatten(), fn.random.permutation(fn.key(0), 100))
    assert torch.equal(fn.epoch_batches(None, x, 30), x[:90].reshape(3, 30))


def test_it_is_part_of_a_compiled_program():
    x = torch.arange(20.0).reshape(10, 2)
    shuffle = fn.jit(lambda key: fn.epoch_batches(key, (x, x[:, 0]), 3))
    for found, expected in zip(
        shuffle(fn.key(1)), fn.epoch_batches(fn.key(1), (x, x[:, 0]), 3), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("error", "message", "data", "batch_size"),
    [
        (ValueError, "one leading extent", (torch.ones(3), torch.ones(4)), 2),
        (ValueError, "one leading extent", torch.tensor(1.0), 1),
        (ValueError, "from 1 to 3, the number of examples, got 4", torch.ones(3), 4),
        (ValueError, "from 1 to 3, the number of examples, got 0", torch.ones(3), 0),
        (TypeError, "integer batch_size, got 2.0", torch.ones(3), 2.0),
    ],
)
def test_misuse_is_told(error, message, data, batch_size):
    with pytest.raises(error, match=message):
        fn.epoch_batches(fn.key(0), data, batch_size)
