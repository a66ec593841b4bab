"""Keys and draws: the numbers of jax.random, and functions of the key alone."""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch

import funcnet as fn
from funcnet import draws as blocks, random

# Made by tests/data/jax_random.py.
VECTORS = json.loads((Path(__file__).parent / "data" / "jax_random.json").read_text())
EPS = {
    dtype: torch.finfo(dtype).eps
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def case_name(case):
    shown = [f"{k}={v}" for k, v in case.items() if k not in ("values", "logits", "entries")]
    return " ".join(shown).replace(" ", "")


def jax_cases(table):
    return pytest.mark.parametrize("case", VECTORS[table], ids=case_name)


def key_of(case):
    return torch.tensor(case["key"], dtype=torch.int64)


def dtype_of(case):
    return getattr(torch, case["dtype"])


def assert_integers(drawn, values, dtype=torch.int64):
    assert drawn.dtype == dtype
    assert drawn.tolist() == values


@jax_cases("keys")
def test_key_has_the_words_of_jax(case):
    assert_integers(random.key(case["seed"]), case["values"])


@jax_cases("splits")
def test_split_has_the_words_of_jax(case):
    assert_integers(random.split(key_of(case), case["n"]), case["values"])


@jax_cases("folds")
def test_fold_in_has_the_words_of_jax_for_an_int_and_a_tensor(case):
    key, data = key_of(case), case["data"]
    assert_integers(random.fold_in(key, data), case["values"])
    assert_integers(random.fold_in(key, torch.tensor(data)), case["values"])
    # Under vmap the tensors' code runs, in eager mode that of Python integers.
    rows = torch.vmap(random.fold_in, (None, 0))(key, torch.tensor([data, data]))
    assert_integers(rows, [case["values"]] * 2)


@jax_cases("chains")
def test_chain_of_fold_in_and_split_has_the_words_of_jax(case):
    key = random.fold_in(random.key(case["seed"]), 2**31 + 7)
    key = random.fold_in(random.split(key, 5)[4], 3)
    assert_integers(random.split(key, 3)[1], case["values"])


@jax_cases("bits")
def test_bits_are_those_of_jax(case):
    drawn = random.bits(key_of(case), case["shape"], width=case["width"])
    assert drawn.shape == tuple(case["shape"])
    assert_integers(drawn, case["values"])


@jax_cases("large_bits")
def test_bits_over_many_blocks_are_those_of_jax(case):
    drawn = random.bits(key_of(case), case["shape"], width=case["width"])
    assert drawn.shape == tuple(case["shape"])
    assert drawn[case["entries"]].tolist() == case["values"]
    assert zlib.crc32(drawn.cpu().numpy().astype("<i8").tobytes()) == case["crc32"]


@jax_cases("randints")
def test_randint_is_that_of_jax(case):
    dtype = dtype_of(case)
    drawn = random.randint(key_of(case), case["shape"], case["minval"], case["maxval"], dtype)
    assert_integers(drawn, case["values"], dtype)


@jax_cases("permutations")
def test_permutation_of_a_range_is_that_of_jax(case):
    assert_integers(random.permutation(key_of(case), case["n"]), case["values"])


@jax_cases("array_permutations")
def test_permutation_of_a_tensor_is_that_of_jax(case):
    x = torch.arange(math.prod(case["shape"])).reshape(case["shape"])
    assert_integers(random.permutation(key_of(case), x, case["axis"]), case["values"])


@jax_cases("uniforms")
def test_uniform_is_that_of_jax(case):
    dtype, low, high = dtype_of(case), case["minval"], case["maxval"]
    drawn = random.uniform(key_of(case), case["shape"], dtype, low, high)
    expected = torch.tensor(case["values"], dtype=dtype)
    if (low, high) == (0.0, 1.0):
        assert torch.equal(drawn, expected)
    # Multiplied and added with one rounding or with two.
    scale = max(abs(low), abs(high))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=EPS[dtype] * scale)


@jax_cases("uniforms")
def test_uniform_with_tensors_as_bounds_is_that_of_jax(case):
    dtype = dtype_of(case)
    low, high = (torch.tensor(case[bound], dtype=dtype) for bound in ("minval", "maxval"))
    drawn = random.uniform(key_of(case), case["shape"], dtype, low, high)
    expected = torch.tensor(case["values"], dtype=dtype)
    scale = max(abs(case["minval"]), abs(case["maxval"]))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=EPS[dtype] * scale)


@jax_cases("normals")
def test_normal_is_that_of_jax(case):
    dtype = dtype_of(case)
    drawn = random.normal(key_of(case), case["shape"], dtype)
    expected = torch.tensor(case["values"], dtype=dtype)
    torch.testing.assert_close(drawn, expected, rtol=16 * EPS[dtype], atol=8 * EPS[dtype])


@jax_cases("truncated_normals")
def test_truncated_normal_is_that_of_jax(case):
    dtype = dtype_of(case)
    drawn = random.truncated_normal(
        key_of(case), case["lower"], case["upper"], case["shape"], dtype
    )
    expected = torch.tensor(case["values"], dtype=dtype)
    torch.testing.assert_close(drawn, expected, rtol=64 * EPS[dtype], atol=16 * EPS[dtype])


@jax_cases("bernoullis")
def test_bernoulli_is_that_of_jax_for_a_number_and_a_tensor(case):
    key, p = key_of(case), case["p"]
    assert_integers(random.bernoulli(key, p, (50,)), case["values"], torch.bool)
    assert_integers(random.bernoulli(key, torch.tensor(p), (50,)), case["values"], torch.bool)


@jax_cases("categoricals")
def test_categorical_is_that_of_jax(case):
    logits = torch.tensor(case["logits"], dtype=dtype_of(case))
    drawn = random.categorical(key_of(case), logits, case["axis"], case["shape"])
    assert_integers(drawn, case["values"])


def test_vectors_name_the_jax_that_made_them():
    assert int(VECTORS["jax"].split(".")[1]) >= 4


def like(key):
    return {"dtype": torch.float32, "device": key.device}


DRAWS = {
    "split": lambda key: random.split(key, 3),
    "fold_in an int": lambda key: random.fold_in(key, 2**32 - 1),
    "fold_in a tensor": lambda key: random.fold_in(key, torch.tensor(9, device=key.device)),
    "fold_in a name": lambda key: random.fold_in(key, "weight"),
    "bits 8": lambda key: random.bits(key, (2, 3), width=8),
    "bits 16": lambda key: random.bits(key, (2, 3), width=16),
    "bits 32": lambda key: random.bits(key, (2, 3)),
    "bits 64": lambda key: random.bits(key, (2, 3), width=64),
    "bits ()": lambda key: random.bits(key),
    "bits (0,)": lambda key: random.bits(key, (0,)),
    "bits of two blocks": lambda key: random.bits(key, (65537,)),
    "uniform": lambda key: random.uniform(key, (2, 3)),
    "uniform float64": lambda key: random.uniform(key, (2, 3), torch.float64, -2.0, 3.0),
    "uniform bfloat16": lambda key: random.uniform(key, (2, 3), torch.bfloat16),
    "uniform float16": lambda key: random.uniform(key, (2, 3), torch.float16),
    "uniform of tensors": lambda key: random.uniform(
        key,
        (2, 3),
        torch.float32,
        torch.tensor(1.0, **like(key)),
        torch.tensor([2.0, 3.0, 4.0], **like(key)),
    ),
    "normal": lambda key: random.normal(key, (2, 3)),
    "truncated_normal": lambda key: random.truncated_normal(key, -1.0, 2.0, (2, 3)),
    "bernoulli": lambda key: random.bernoulli(key, 0.3, (2, 3)),
    "bernoulli of a tensor": lambda key: random.bernoulli(
        key, torch.tensor([0.1, 0.9], **like(key))
    ),
    "randint": lambda key: random.randint(key, (2, 3), -4, 9),
    "randint int32": lambda key: random.randint(key, (2, 3), -4, 9, torch.int32),
    "permutation": lambda key: random.permutation(key, 7),
    "permutation of a tensor": lambda key: random.permutation(
        key, torch.arange(6, device=key.device).reshape(2, 3), axis=1
    ),
    "categorical": lambda key: random.categorical(
        key, torch.tensor([[0.0, 1.0], [2.0, 0.0]], **like(key))
    ),
}
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@draws
def test_draw_is_the_same_again_and_changes_neither_key_nor_torch_generator(draw):
    key = random.key(5)
    before, version = torch.random.get_rng_state(), key._version
    first, again = draw(key), draw(key)
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (key._version, key.tolist()) == (version, [0, 5])


@draws
def test_vmap_over_keys_equals_a_loop_over_keys(draw):
    keys = random.split(random.key(8), 4)
    together = torch.vmap(draw)(keys)
    for row, key in zip(together, keys, strict=True):
        alone = draw(key)
        assert row.dtype == alone.dtype
        assert torch.equal(row, alone)


@draws
def test_draw_of_a_meta_key_has_shape_and_dtype_without_data(draw):
    # A key on meta is what init and apply get when shapes are inferred.
    real = draw(random.key(0))
    shaped = draw(random.key(0, device="meta"))
    assert (shaped.shape, shaped.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize(
    "draw",
    [
        lambda key, **on: random.bits(key, (2, 3), **on),
        lambda key, **on: random.uniform(key, (2, 3), torch.float32, 1.0, 2.0, **on),
        lambda key, **on: random.normal(key, (2, 3), **on),
        lambda key, **on: random.truncated_normal(key, -1.0, 1.0, (2, 3), **on),
        lambda key, **on: random.bernoulli(key, 0.5, (2, 3), **on),
        lambda key, **on: random.randint(key, (2, 3), 0, 5, **on),
        lambda key, **on: random.permutation(key, 5, **on),
    ],
)
def test_draw_on_another_device_than_the_key(draw):
    key = random.key(0)
    there = draw(key, device="meta")
    here = draw(key)
    assert there.device.type == "meta"
    assert here.device == key.device
    assert (there.shape, there.dtype) == (here.shape, here.dtype)
    assert torch.equal(here, draw(key, device=key.device))
    # The words are the same on any device; erfinv is so up to rounding.
    torch.testing.assert_close(draw(key, device="cpu"), here.cpu())


def test_a_key_lies_on_the_default_device_unless_it_is_given_one():
    with torch.device("meta"):
        assert random.key(0).device.type == "meta"
        assert random.key(0, device="cpu").tolist() == [0, 0]


@draws
def test_draw_in_inference_mode_and_with_gradients_off_is_the_same(draw):
    key = random.key(5)
    expected = draw(key)
    with torch.inference_mode():
        assert torch.equal(draw(key), expected)
    with torch.no_grad():
        assert torch.equal(draw(key), expected)


@draws
def test_draw_does_not_read_the_default_dtype_and_device(draw):
    key = random.key(5, device="cpu")
    expected = draw(key)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = draw(key)
    finally:
        torch.set_default_dtype(default)
    assert (found.dtype, found.device) == (expected.dtype, expected.device)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("size", [1, 65535, 65536, 65537, 131073])
def test_the_first_bits_do_not_depend_on_how_many_are_drawn(width, size):
    key = random.key(3)
    long = random.bits(key, (140_000,), width=width)
    assert torch.equal(random.bits(key, (size,), width=width), long[:size])


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (1, 24), (24, 1)])
def test_a_draw_is_by_flat_index_whatever_the_shape(shape):
    key = random.key(3)
    assert torch.equal(random.bits(key, shape).flatten(), random.bits(key, (24,)))
    assert torch.equal(random.normal(key, shape).flatten(), random.normal(key, (24,)))


@pytest.mark.parametrize("size", [65535, 65536, 65537, 131073])
def test_the_first_floats_do_not_depend_on_how_many_are_drawn(size):
    key = random.key(3)
    for draw in (random.uniform, random.normal):
        assert torch.equal(draw(key, (size,)), draw(key, (140_000,))[:size])


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_draws_do_not_depend_on_the_block_size(monkeypatch, block):
    key = random.key(9)
    expected = [random.bits(key, (10, 11)), random.normal(key, (110,)), random.split(key, 9)]
    monkeypatch.setattr(blocks, "_BLOCK", block)
    found = [random.bits(key, (10, 11)), random.normal(key, (110,)), random.split(key, 9)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


BEGUN = {
    "bits": lambda shape, **options: random.bits(random.key(5), shape, **options),
    "words of 64 bits": lambda shape, **o: random.bits(random.key(5), shape, width=64, **o),
    "uniform": lambda shape, **o: random.uniform(random.key(5), shape, torch.float64, -1, 2, **o),
    "normal": lambda shape, **options: random.normal(random.key(5), shape, **options),
    "truncated_normal": lambda shape, **o: random.truncated_normal(
        random.key(5), -1, 2, shape, **o
    ),
    "bernoulli": lambda shape, **options: random.bernoulli(random.key(5), 0.3, shape, **options),
    "randint": lambda shape, **options: random.randint(random.key(5), shape, 0, 9, **options),
}


@pytest.mark.parametrize("name", BEGUN)
def test_a_draw_that_starts_at_an_index_is_a_part_of_the_longer_one(name):
    draw = BEGUN[name]
    whole = draw((6, 5))
    assert torch.equal(draw((2, 5), start=15), whole[3:5])
    assert torch.equal(draw((2, 5), start=torch.tensor(15)), whole[3:5])
    columns = torch.arange(6) * 5 + 2
    assert torch.equal(draw((6, 3), start=columns), whole[:, 2:])
    assert torch.equal(draw((6, 0), start=columns), whole[:, 5:])
    by_member = torch.vmap(lambda start: draw((1, 5), start=start))(torch.tensor([20, 0]))
    assert torch.equal(by_member[:, 0], whole[[4, 0]])


def test_a_compiled_draw_starts_at_the_index_that_a_tensor_has():
    def draws_from(start, rows):
        found = {name: draw((2, 5), start=start) for name, draw in BEGUN.items()}
        return found, random.bits(random.key(5), (3, 2), start=rows)

    f, rows = fn.jit(draws_from), torch.tensor([7, 0, 2**32 - 1])
    for start in (0, 15, 2**32 - 3, 2**40):
        found, expected = f(torch.tensor(start), rows), draws_from(start, rows)
        for ours, eager in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
    batched = fn.jit(fn.vmap(lambda start: random.bits(random.key(5), (4,), start=start)))
    assert torch.equal(batched(rows), random.bits(random.key(5), (3, 4), start=rows))


def test_a_start_may_be_beyond_and_a_draw_go_across_32_bits():
    before = random.bits(random.key(5), (3,), start=2**32 - 3)
    behind = random.bits(random.key(5), (4,), start=2**32)
    across = random.bits(random.key(5), (7,), start=2**32 - 3)
    assert torch.equal(torch.cat([before, behind]), across)
    unread = random.bits(random.key(5), (1, 7), start=torch.tensor([2**32 - 3]))
    assert torch.equal(unread[0], across)
    assert not torch.equal(behind, random.bits(random.key(5), (4,)))


def test_a_wrong_start_is_refused():
    with pytest.raises(ValueError, match="a start of at least 0, got -1"):
        random.bits(random.key(0), (2,), start=-1)
    with pytest.raises(ValueError, match=r"first sizes of \(2, 3\), got \(3,\)"):
        random.bits(random.key(0), (2, 3), start=torch.arange(3))
    with pytest.raises(TypeError, match="a start of integers, got 0"):
        random.bits(random.key(0), (2,), start=0.5)


def test_a_name_is_folded_in_by_its_crc():
    key = random.key(1)
    for name in ("weight", "", "schlüssel", "0"):
        assert torch.equal(
            random.fold_in(key, name), random.fold_in(key, zlib.crc32(name.encode()))
        )
    assert not torch.equal(random.fold_in(key, "0"), random.fold_in(key, 0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8])
def test_fold_in_takes_a_scalar_tensor_of_any_integer_dtype(dtype):
    key = random.key(1)
    found = random.fold_in(key, torch.tensor(100, dtype=dtype))
    assert torch.equal(found, random.fold_in(key, 100))


def test_fold_in_of_data_batched_by_vmap_equals_a_loop():
    keys, data = random.split(random.key(1), 4), torch.tensor([0, 1, 2**31, 2**32 - 1])
    one_key = torch.vmap(random.fold_in, (None, 0))(keys[0], data)
    both = torch.vmap(random.fold_in)(keys, data)
    for i in range(4):
        assert torch.equal(one_key[i], random.fold_in(keys[0], int(data[i])))
        assert torch.equal(both[i], random.fold_in(keys[i], int(data[i])))


def test_nested_vmap_over_keys_equals_loops():
    keys = random.split(random.key(1), 6).reshape(2, 3, 2)
    together = torch.vmap(torch.vmap(lambda key: random.normal(key, (5,))))(keys)
    for i in range(2):
        for j in range(3):
            assert torch.equal(together[i, j], random.normal(keys[i, j], (5,)))


def test_bounds_and_probabilities_batched_by_vmap_equal_a_loop():
    key = random.key(4)
    low, p = torch.tensor([0.0, 1.0, -3.0]), torch.tensor([0.1, 0.5, 0.9])
    uniforms = torch.vmap(lambda a: random.uniform(key, (4,), torch.float32, a, 5.0))(low)
    choices = torch.vmap(lambda a: random.bernoulli(key, a, (20,)))(p)
    for i in range(3):
        assert torch.equal(uniforms[i], random.uniform(key, (4,), torch.float32, low[i], 5.0))
        assert torch.equal(choices[i], random.bernoulli(key, p[i], (20,)))


MANY = 100_000


def assert_moments(draws, mean, variance):
    draws = draws.double()
    error = math.sqrt(variance / draws.numel())
    assert abs(draws.mean().item() - mean) < 5 * error
    assert abs(draws.var().item() / variance - 1) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_uniform_has_the_moments_of_the_uniform_distribution(dtype):
    drawn = random.uniform(random.key(1), (MANY,), dtype, -1.0, 3.0)
    # Half precision draws multiples of 2**-10 of the span, by their lower end.
    assert_moments(drawn.double() + (2.0**-9 if dtype == torch.float16 else 0.0), 1.0, 16 / 12)
    assert drawn.min() >= -1.0
    assert drawn.max() <= 3.0


@pytest.mark.parametrize("dtype", EPS)
def test_unit_uniform_lies_below_one_and_reaches_zero_and_all_of_its_mantissa(dtype):
    drawn = random.uniform(random.key(1), (MANY,), dtype).double()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    scaled = drawn / EPS[dtype]
    assert torch.equal(scaled, scaled.round())
    if EPS[dtype] > 1e-3:
        assert scaled.unique().numel() == round(1 / EPS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_normal_has_the_moments_of_the_normal_distribution(dtype):
    drawn = random.normal(random.key(1), (MANY,), dtype)
    assert drawn.dtype == dtype
    assert drawn.isfinite().all()
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.01
    assert abs(drawn.double().mean()) < 2 * tolerance
    assert abs(drawn.double().std() - 1) < 2 * tolerance
    if dtype.itemsize >= 4:
        assert_moments(drawn, 0.0, 1.0)
        assert abs((drawn.double() ** 4).mean() - 3) < 0.1
        assert (drawn.abs() > 3).double().mean().item() == pytest.approx(0.0027, abs=0.0006)


@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (0.5, 1.0), (-1.0, math.inf), (2.0, 2.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncated_normal_lies_inside_and_has_its_mean(bounds, dtype):
    low, high = bounds
    drawn = random.truncated_normal(random.key(2), low, high, (MANY,), dtype)
    assert drawn.min() > low
    assert drawn.max() < high

    def density(z):
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    inside = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    assert drawn.double().mean().item() == pytest.approx(
        (density(low) - density(high)) / inside, abs=0.01
    )


@pytest.mark.parametrize("bounds", [(6.0, 7.0), (-7.0, -6.0), (-1e-3, 1e-3), (40.0, 41.0)])
@pytest.mark.parametrize("dtype", EPS)
def test_truncated_normal_lies_inside_narrow_and_far_bounds(bounds, dtype):
    low, high = bounds
    drawn = random.truncated_normal(random.key(2), low, high, (100,), dtype)
    assert drawn.dtype == dtype
    assert (drawn >= low).all()
    assert (drawn <= high).all()


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.99, 1.0])
def test_bernoulli_is_true_with_its_probability(p):
    drawn = random.bernoulli(random.key(6), p, (MANY,)).double()
    assert abs(drawn.mean() - p) <= 5 * math.sqrt(p * (1 - p) / MANY)


def test_bernoulli_of_a_tensor_has_its_shape_and_draws_each_apart():
    p = torch.full((100, 50), 0.5)
    drawn = random.bernoulli(random.key(6), p)
    assert drawn.shape == p.shape
    assert 0.4 < drawn.double().mean() < 0.6
    with_prefix = random.bernoulli(random.key(6), p[0], (1000, 50))
    assert with_prefix.shape == (1000, 50)
    assert ((with_prefix.double().mean(0) - 0.5).abs() < 0.1).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("low", "high"), [(0, 7), (-3, 4), (10**6, 10**6 + 7)])
def test_randint_takes_each_value_equally_often(dtype, low, high):
    drawn = random.randint(random.key(7), (70_000,), low, high, dtype)
    assert drawn.dtype == dtype
    counts = torch.bincount(drawn.long() - low, minlength=7)
    assert counts.numel() == 7
    assert ((counts - 10_000).abs() < 500).all()


@pytest.mark.parametrize("span", [2**16 + 1, 10**6, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_randint_over_a_wide_span_has_the_moments_of_the_uniform_distribution(span, dtype):
    drawn = random.randint(random.key(7), (MANY,), 0, span, dtype)
    assert_moments(drawn.double() / span, 0.5, 1 / 12)


def test_permutation_has_every_element_once_and_every_order_equally_often():
    assert torch.equal(random.permutation(random.key(0), 1000).sort().values, torch.arange(1000))
    keys = random.split(random.key(1), 6000)
    orders = torch.vmap(lambda key: random.permutation(key, 3))(keys)
    _, counts = torch.unique(orders, dim=0, return_counts=True)
    assert counts.numel() == 6
    assert ((counts - 1000).abs() < 150).all()


def test_permutation_moves_slices_together():
    x = torch.arange(12.0).reshape(4, 3)
    rows = random.permutation(random.key(2), x)
    assert sorted(rows.tolist()) == x.tolist()
    columns = random.permutation(random.key(2), x, axis=-1)
    assert sorted(columns.t().tolist()) == x.t().tolist()
    assert x._version == 0


def test_categorical_draws_by_softmax_along_its_axis():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, -torch.inf]])
    drawn = random.categorical(random.key(3), logits, shape=(50_000, 2))
    for column, row in enumerate(logits):
        frequency = torch.bincount(drawn[:, column], minlength=3) / 50_000
        torch.testing.assert_close(frequency, row.softmax(-1), rtol=0, atol=0.01)
    along = random.categorical(random.key(3), logits.t(), axis=0, shape=(50_000, 2))
    frequency = torch.bincount(along[:, 0], minlength=3) / 50_000
    torch.testing.assert_close(frequency, logits[0].softmax(-1), rtol=0, atol=0.01)


def test_keys_of_a_split_draw_independent_numbers():
    keys = random.split(random.key(0), 200)
    assert torch.unique(keys, dim=0).shape == (200, 2)
    drawn = torch.vmap(lambda key: random.normal(key, (500,)))(keys).double()
    correlation = torch.corrcoef(drawn) - torch.eye(200, dtype=torch.float64)
    assert correlation.abs().max() < 6 / math.sqrt(500)


KEY = random.key(0)
BAD = {
    "float seed": (lambda: random.key(1.0), TypeError, "integer seed"),
    "str seed": (lambda: random.key("1"), TypeError, "integer seed"),
    "None seed": (lambda: random.key(None), TypeError, "integer seed"),
    "float key": (lambda: random.bits(torch.zeros(2)), TypeError, "expected a key"),
    "int32 key": (lambda: random.bits(KEY.int()), TypeError, "expected a key"),
    "key of 3 words": (lambda: random.bits(torch.zeros(3).long()), TypeError, "expected a key"),
    "0-d key": (lambda: random.bits(torch.tensor(0)), TypeError, "expected a key"),
    "int as key": (lambda: random.bits(0), TypeError, "expected a key"),
    "None as key": (lambda: random.split(None), TypeError, "expected a key"),
    "many keys": (lambda: random.bits(random.split(KEY)), ValueError, "expected one key"),
    "normal, no key": (lambda: random.normal((2, 3)), TypeError, "expected a key"),
    "fold_in, no key": (lambda: random.fold_in(None, 1), TypeError, "expected a key"),
    "fold_in, int as key": (lambda: random.fold_in(3, 1), TypeError, "expected a key"),
    "fold_in, float key": (lambda: random.fold_in(torch.zeros(2), 1), TypeError, "expected a key"),
    "fold_in, key of 3 words": (
        lambda: random.fold_in(torch.zeros(3).long(), "a"),
        TypeError,
        "expected a key",
    ),
    "fold_in, many keys": (
        lambda: random.fold_in(random.split(KEY), 1),
        ValueError,
        "expected one key",
    ),
    "fold_in 2**32": (lambda: random.fold_in(KEY, 2**32), ValueError, r"\[0, 2\*\*32\)"),
    "fold_in -1": (lambda: random.fold_in(KEY, -1), ValueError, r"\[0, 2\*\*32\)"),
    "fold_in float": (lambda: random.fold_in(KEY, 1.0), TypeError, "fold_in"),
    "fold_in float tensor": (
        lambda: random.fold_in(KEY, torch.tensor(1.0)),
        TypeError,
        "fold_in",
    ),
    "fold_in 1-d tensor": (lambda: random.fold_in(KEY, torch.tensor([1])), TypeError, "fold_in"),
    "fold_in None": (lambda: random.fold_in(KEY, None), TypeError, "fold_in"),
    "width": (lambda: random.bits(KEY, (2,), width=24), ValueError, "width"),
    "split -1": (lambda: random.split(KEY, -1), ValueError, "-1"),
    "negative size": (lambda: random.normal(KEY, (-2,)), ValueError, "-2"),
    "int as shape": (lambda: random.bits(KEY, 3), TypeError, "int"),
    "uniform of integers": (
        lambda: random.uniform(KEY, (2,), torch.int64),
        TypeError,
        "uniform.*int64",
    ),
    "uniform of complex": (
        lambda: random.uniform(KEY, (2,), torch.complex64),
        TypeError,
        "uniform.*complex64",
    ),
    "uniform bounds of another shape": (
        lambda: random.uniform(KEY, (2,), torch.float32, torch.zeros(3, 2), 1.0),
        ValueError,
        r"\(3, 2\)",
    ),
    "normal of integers": (
        lambda: random.normal(KEY, (2,), torch.int32),
        TypeError,
        "normal.*int32",
    ),
    "truncated_normal of integers": (
        lambda: random.truncated_normal(KEY, -1.0, 1.0, (2,), torch.int32),
        TypeError,
        "int32",
    ),
    "truncated_normal bounds": (
        lambda: random.truncated_normal(KEY, 1.0, 1.0),
        ValueError,
        "lower < upper",
    ),
    "truncated_normal NaN": (
        lambda: random.truncated_normal(KEY, math.nan, 1.0),
        ValueError,
        "lower < upper",
    ),
    "p above 1": (lambda: random.bernoulli(KEY, 1.5), ValueError, r"\[0, 1\]"),
    "p below 0": (lambda: random.bernoulli(KEY, -0.1), ValueError, r"\[0, 1\]"),
    "p NaN": (lambda: random.bernoulli(KEY, math.nan), ValueError, r"\[0, 1\]"),
    "p of a larger shape than shape": (
        lambda: random.bernoulli(KEY, torch.full((3,), 0.5), ()),
        ValueError,
        r"broadcasts to \(\)",
    ),
    "randint dtype": (
        lambda: random.randint(KEY, (2,), 0, 5, torch.uint8),
        TypeError,
        "int32 or int64",
    ),
    "randint float dtype": (
        lambda: random.randint(KEY, (2,), 0, 5, torch.float32),
        TypeError,
        "int32 or int64",
    ),
    "randint span": (lambda: random.randint(KEY, (2,), 0, 2**31 + 1), ValueError, "span"),
    "randint float bounds": (lambda: random.randint(KEY, (2,), 0.5, 9.0), TypeError, "int"),
    "randint beyond int32": (
        lambda: random.randint(KEY, (2,), 2**31, 2**31 + 5, torch.int32),
        ValueError,
        "int32",
    ),
    "categorical shape": (
        lambda: random.categorical(KEY, torch.zeros(3, 4), shape=(4,)),
        ValueError,
        "ends in",
    ),
    "categorical of integers": (
        lambda: random.categorical(KEY, torch.zeros(3, dtype=torch.int64)),
        TypeError,
        "floating.point",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_uniform_keeps_its_dtype_for_bounds_of_another():
    low, high = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(3)
    assert random.uniform(KEY, (4, 2), torch.float32, low, high).dtype == torch.float32
    assert random.uniform(KEY, (4, 2), torch.float16, -1.0, low).dtype == torch.float16
