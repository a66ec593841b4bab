"""epoch_batches and batches: what loops run over, and sources of batches by key and step."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import funcnet as fn


def test_a_source_shows_arrays_without_advice():
    source = fn.batches({"x": np.ones((10, 2), np.float32)}, 5)
    of = "{'x': a numpy array of float32 (10, 2)}"
    assert repr(source) == f"Batches(shuffled, 2 batches of 5 an epoch, of {of})"


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


SIZES = st.one_of(st.integers(1, 60), st.integers(1020, 3000))


@settings(deadline=None)
@given(size=SIZES, batch_size=st.integers(5, 400), drop_last=st.booleans())
def test_an_epoch_of_a_source_has_every_example_once(size, batch_size, drop_last):
    batch_size = min(size, batch_size)
    data = {"x": torch.arange(size), "pair": torch.arange(2 * size).reshape(size, 2)}
    source = fn.batches(data, batch_size, drop_last=drop_last)
    count = size // batch_size if drop_last else -(-size // batch_size)
    assert source.steps_per_epoch == count
    orders = []
    for epoch in range(2):
        steps = range(epoch * count, (epoch + 1) * count)
        batches = [source(fn.key(7), step) for step in steps]
        assert {len(batch["x"]) for batch in batches[:-1]} <= {batch_size}
        order = torch.cat([batch["x"] for batch in batches])
        assert len(order) == (count * batch_size if drop_last else size)
        assert len(order.unique()) == len(order)
        assert torch.equal(torch.cat([batch["pair"] for batch in batches])[:, 0], 2 * order)
        orders.append(order.tolist())
    assert size < 20 or orders[0] != orders[1]


@pytest.mark.parametrize("size", [1000, 1025, 5003])
def test_a_batch_is_a_function_of_the_key_and_the_step_alone(size):
    source = fn.batches(torch.arange(size), 10)
    late = source(fn.key(3), 1234)
    again = fn.batches(torch.arange(size), 10)
    for step in (5, 77, 1234):
        assert torch.equal(again(fn.key(3), step), again(fn.key(3), torch.tensor(step)))
    assert torch.equal(again(fn.key(3), 1234), late)
    assert not torch.equal(again(fn.key(4), 1234), late)


def test_the_order_is_random():
    # Of 400 orders of 2003 rows: where a row goes, what is next to what, and what stays.
    size, orders = 2003, 400
    source = fn.batches(torch.arange(size), size)
    found = torch.stack([source(fn.key(seed), 0) for seed in range(orders)]).double()
    counts = torch.histc(found[:, 5].cpu(), 20, 0, size)
    assert ((counts - orders / 20) ** 2 / (orders / 20)).sum() < 44  # one of a thousand is above
    neighbours = torch.stack([found[:, :-1].flatten(), found[:, 1:].flatten()])
    assert neighbours.corrcoef()[0, 1].abs() < 0.005
    stays = (found == torch.arange(size)).sum(1).double()
    assert (stays.mean() - 1).abs() < 0.2
    assert (stays.var() - 1).abs() < 0.4


def test_small_orders_are_all_as_frequent():
    source = fn.batches(torch.arange(4), 4)
    found = collections.Counter(
        tuple(source(fn.key(seed // 20), seed % 20).tolist()) for seed in range(1200)
    )
    assert len(found) == 24
    assert sum((n - 50) ** 2 / 50 for n in found.values()) < 50  # one of a thousand is above


def test_under_jit_vmap_and_scan_the_batches_are_those_of_the_loop():
    size = 1031
    x = torch.arange(2.0 * size).reshape(size, 2)
    source = fn.batches((x, torch.arange(size)), 8)
    key, steps = fn.key(5), torch.arange(3, 9)
    expected = [source(key, step) for step in range(3, 9)]
    _, scanned = fn.jit(lambda key, steps: fn.scan(lambda _, s: (_, source(key, s)), 0, steps))(
        key, steps
    )
    mapped = fn.vmap(source, (None, 0))(key, steps)
    for found in (scanned, mapped):
        for index, batch in enumerate(expected):
            assert torch.equal(found[0][index], batch[0])
            assert torch.equal(found[1][index], batch[1])


def test_without_shuffle_the_order_is_that_of_the_data():
    source = fn.batches(torch.arange(7), 3, shuffle=False, drop_last=False)
    assert [source(fn.key(0), step).tolist() for step in range(4)] == [
        [0, 1, 2], [3, 4, 5], [6], [0, 1, 2]
    ]  # fmt: skip
    mapped = fn.vmap(fn.batches(torch.arange(6), 3, shuffle=False), (None, 0))
    assert mapped(fn.key(0), torch.tensor([3, 4])).tolist() == [[3, 4, 5], [0, 1, 2]]


@pytest.mark.cpu_only
@pytest.mark.parametrize("shuffle", [True, False])
def test_of_arrays_on_disk_only_the_rows_of_the_batch_are_read(tmp_path, shuffle):
    images = np.arange(5000 * 6, dtype=np.float32).reshape(5000, 2, 3)
    np.save(tmp_path / "images.npy", images)

    class Watched(np.memmap):
        read = []  # noqa: RUF012

        def __getitem__(self, index):
            self.read.append(len(index))
            return np.asarray(super().__getitem__(index))

    mapped = np.load(tmp_path / "images.npy", mmap_mode="r").view(Watched)
    source = fn.batches((mapped, torch.arange(5000)), 50, shuffle=shuffle)
    x, rows = source(fn.key(1), 7)
    assert Watched.read == [50]
    assert (type(x), x.dtype, x.shape) == (torch.Tensor, torch.float32, (50, 2, 3))
    assert np.array_equal(x.numpy(), images[rows.numpy()])
    x += 1  # memory of its own, that may be written to


@pytest.mark.cpu_only
def test_arrays_of_numpy_are_not_read_where_the_step_is_hidden():
    source = fn.batches(np.arange(6.0), 3)
    with pytest.raises(TypeError, match="call the source outside of jit, vmap and scan"):
        fn.vmap(source, (None, 0))(fn.key(0), torch.arange(2))
    short = fn.batches(torch.arange(7), 3, drop_last=False)
    with pytest.raises(TypeError, match="a short last batch, need a step whose value"):
        fn.vmap(short, (None, 0))(fn.key(0), torch.arange(2))


@pytest.mark.parametrize(
    ("error", "message", "data", "batch_size", "options"),
    [
        (ValueError, "batches: expects tensors with one leading", (torch.ones(3), [1]), 2, {}),
        (ValueError, "batches: expects a batch_size from 1 to 3", torch.ones(3), 4, {}),
        (ValueError, "batches: expects at least one example", torch.ones(0), 4, {}),
        (TypeError, "batches: expects an integer batch_size", torch.ones(3), 2.0, {}),
        (TypeError, "expects a bool as shuffle, got 7", torch.ones(3), 2, {"shuffle": 7}),
        (TypeError, "expects a bool as drop_last", torch.ones(3), 2, {"drop_last": None}),
    ],
)
def test_misuse_of_a_source_is_told(error, message, data, batch_size, options):
    with pytest.raises(error, match=message):
        fn.batches(data, batch_size, **options)
