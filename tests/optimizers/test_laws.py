"""Every law, for every optimizer and transform: for each row of `CASES` in cases_*.py.

A table joins by existing: a file cases_*.py in this folder with a dict of `Case`. All rows are
traced, the first of each table is compiled, and all of them by
``pytest tests/optimizers/test_laws.py --whole``.
"""

import functools

import optree
import pytest
import torch
from hypothesis import given, settings, strategies as st
from optimizers.tables import CASES, TABLES
from torch.fx.experimental.proxy_tensor import make_fx

import funcnet as fn
from funcnet.core import Box
from funcnet.optimizers.lift import step_params
from funcnet.testing.samples import noise, non_contiguous

F64 = torch.float64
SAMPLE = [next(iter(table)) for table in TABLES.values()]
WHOLE = {name: case for name, case in CASES.items() if case.converges is not None}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_no_two_tables_have_a_row_of_one_name():
    assert len(CASES) == sum(map(len, TABLES.values()))


def numbers(*shape, seed=0, dtype=F64):
    return fn.random.normal(fn.key(seed), shape, F64).to(dtype)


def tree_of(dtype=F64, zeros=True):
    """A scalar, a vector, a matrix whose elements are not next to each other, a zero-size leaf."""
    params = {
        "a": {"bias": numbers(2, seed=1), "weight": non_contiguous(numbers(2, 3))},
        "s": numbers(seed=2),
        **({"empty": {"weight": numbers(0, 3)}} if zeros else {}),
    }
    return fn.tree.map(lambda leaf: leaf.to(dtype) if leaf.is_contiguous() else leaf, params)


TREES = {
    "float64": tree_of(),
    "float32": fn.tree.map(torch.Tensor.float, tree_of()),
    "bfloat16": fn.tree.map(torch.Tensor.bfloat16, tree_of()),
    "of several dtypes": {
        "a": numbers(3, dtype=torch.bfloat16),
        "b": {"c": numbers(2, 2, dtype=torch.float32), "d": numbers(dtype=torch.float16)},
        "f": numbers(4),
    },
    "empty": {},
    "with an empty child": {"none": {}, "w": numbers(2)},
    "one leaf": {"w": numbers(3, 2)},
    "one scalar": {"w": numbers()},
    "one zero-size leaf": {"w": numbers(0)},
    "one filter": {"conv": {"weight": numbers(4, 2, 3, 3)}},
}


def grads_at(step, params):
    """Gradients that depend on the params, so that an error grows from step to step."""
    drawn = noise(fn.random.fold_in(fn.key(7), step), params)
    return fn.tree.map(lambda g, p: (g + 0.3 * p.double().sin()).to(p.dtype), drawn, params)


def trajectory(optimizer, params, steps=3):
    """The params after each step, and the last state."""
    state, after = optimizer.init_state(params), []
    for step in range(steps):
        updates, state = optimizer.update(grads_at(step, params), state, params)
        params = fn.apply_updates(params, updates)
        after.append(params)
    return after, state


def layout(tree):
    leaves, treedef = fn.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def assert_close(found, expected, rtol=1e-11, atol=1e-12):
    assert layout(found) == layout(expected)
    for one, other in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


@cases
def test_it_keeps_the_laws_of_the_protocol(case):
    params = tree_of(zeros=False)
    fn.testing.check_optimizer(case.make(case.rate), params, reference=case.reference, alone=True)


@pytest.mark.parametrize("tree", TREES)
@cases
def test_updates_and_state_keep_structure_shapes_and_dtypes(case, tree):
    params = TREES[tree]
    optimizer = case.make(case.rate)
    expected = layout(optimizer.init_state(params))
    after, state = trajectory(optimizer, params)
    assert layout(state) == expected
    for found in after:
        assert layout(found) == layout(params)
        assert all(leaf.isfinite().all() for leaf in fn.tree.leaves(found))


@cases
def test_strides_do_not_matter(case):
    optimizer = case.make(case.rate)
    apart = {"w": non_contiguous(numbers(3, 2)), "t": numbers(2, 4).t()}
    together = fn.tree.map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), apart)
    assert_close(trajectory(optimizer, apart), trajectory(optimizer, together))


@cases
def test_a_rate_may_be_a_tensor_and_be_vmapped(case):
    def run(rate):
        return trajectory(case.make(rate), tree_of())

    rates = torch.tensor([case.rate, 2 * case.rate], dtype=F64)
    alone = [run(rate) for rate in rates]
    assert_close(alone[0], run(case.rate))
    together = fn.tree.map(lambda *leaves: torch.stack(leaves), *alone)
    assert_close(fn.vmap(run)(rates), together)


@cases
def test_it_is_one_graph_of_params_state_and_rate(case):
    """What jit compiles: no value is read while it is traced, the rate is an argument."""

    def run(rate, *leaves):
        state, params = treedef.unflatten(leaves)
        optimizer = case.make(rate)
        for step in range(2):
            grads = fn.tree.map(lambda leaf, shift=step: (leaf + shift).cos(), params)
            updates, state = optimizer.update(grads, state, params)
            params = fn.apply_updates(params, updates)
        return fn.tree.leaves((state, params))

    params = tree_of()
    state = trajectory(case.make(case.rate), params)[1]
    leaves, treedef = fn.tree.flatten((state, params))
    rate = torch.tensor(case.rate, dtype=F64)
    graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(rate, *leaves)
    assert_close(graph(rate, *leaves), run(rate, *leaves))
    assert_close(graph(3 * rate, *leaves), run(3 * rate, *leaves))


@cases
def test_no_value_is_read(case):
    """Tensors without data have none: on a GPU, to read one would be to wait for it."""
    params = fn.tree.map(lambda leaf: torch.empty_like(leaf, device="meta"), tree_of())
    optimizer = case.make(case.rate)
    state = optimizer.init_state(params)
    for _ in range(2):
        updates, after = optimizer.update(params, state, params)
        assert layout(updates) == layout(params)
        assert layout(after) == layout(state)
        state = after


def pytest_generate_tests(metafunc):
    if "group" in metafunc.fixturenames:
        chosen = list(CASES) if metafunc.config.getoption("whole") else SAMPLE
        groups = [chosen[start : start + 12] for start in range(0, len(chosen), 12)]
        metafunc.parametrize("group", groups, ids=[group[0] for group in groups])


def test_compiled_it_is_the_eager_one(group):
    def run(params, rates):
        return {name: trajectory(CASES[name].make(rates[name]), params, 2) for name in group}

    rates = {name: torch.tensor(CASES[name].rate, dtype=F64) for name in group}
    params = tree_of(zeros=False)
    assert_close(fn.jit(run)(params, rates), run(params, rates), 1e-8, 1e-10)


@cases
def test_in_a_chain_it_is_itself(case):
    params, optimizer = tree_of(), case.make(case.rate)
    chained = fn.chain(it=optimizer, twice=fn.optimizers.scale(2.0))
    state, alone = chained.init_state(params), optimizer.init_state(params)
    for step in range(3):
        grads = grads_at(step, params)
        updates, state = chained.update(grads, state, params)
        expected, alone = optimizer.update(grads, alone, params)
        assert_close(updates, fn.tree.map(lambda leaf: 2.0 * leaf, expected))
        assert_close(state.get("it", {}), alone)


def in_pieces(params):
    """Each leaf as a dict of flat pieces of it, of two elements or less."""
    return fn.tree.map(
        lambda leaf: {str(i): piece for i, piece in enumerate(leaf.reshape(-1).split(2))}, params
    )


@cases
def test_it_is_elementwise_if_it_says_so(case):
    """A leaf's update, cut into flat pieces, is that of the pieces, as ranks update them."""
    optimizer = case.make(case.rate)
    params = tree_of(zeros=False)
    grads = [grads_at(step, params) for step in range(4)]
    whole, cut = params, in_pieces(params)
    state, cut_state = optimizer.init_state(whole), optimizer.init_state(cut)
    for each in grads:
        updates, state = optimizer.update(each, state, whole)
        whole = fn.apply_updates(whole, updates)
        updates, cut_state = optimizer.update(in_pieces(each), cut_state, cut)
        cut = fn.apply_updates(cut, updates)
    pairs = zip(fn.tree.leaves(in_pieces(whole)), fn.tree.leaves(cut), strict=True)
    same = all(torch.allclose(one, other, rtol=1e-11, atol=1e-12) for one, other in pairs)
    assert same == optimizer.elementwise


@cases
def test_masked_it_is_itself_on_the_leaves_that_are_meant(case):
    params, optimizer = tree_of(), case.make(case.rate)
    masked = fn.optimizers.masked(optimizer, ["a.weight", "s"])
    state = masked.init_state(params)
    meant, rest = fn.tree.partition(lambda path: path in ("a.weight", "s"), params)
    alone = optimizer.init_state(meant)
    for step in range(3):
        grads = grads_at(step, params)
        updates, state = masked.update(grads, state, params)
        own, others = fn.tree.partition(lambda path: path in ("a.weight", "s"), grads)
        expected, alone = optimizer.update(own, alone, meant)
        assert_close(updates, fn.tree.merge(expected, others))
        assert_close(state, alone)
    assert rest


@cases
def test_in_a_partition_it_is_itself_on_each_part(case):
    params, optimizer = tree_of(), case.make(case.rate)
    rules = {"one": "a", "other": lambda path: not path.startswith("a.")}
    parts = fn.optimizers.partition(dict.fromkeys(rules, optimizer), rules)
    found, state = trajectory(parts, params, 1)
    for label, part in zip(
        rules, fn.tree.partition(lambda path: path.startswith("a."), params), strict=True
    ):
        grads, _ = fn.tree.partition(
            lambda path, part=part: path in fn.tree.to_dotted(part), grads_at(0, params)
        )
        updates, after = optimizer.update(grads, optimizer.init_state(part), part)
        expected = fn.tree.to_dotted(fn.apply_updates(part, updates))
        whole = fn.tree.to_dotted(found[-1])
        assert_close({path: whole[path] for path in expected}, expected)
        assert_close(state.get(label, {}), after)


@cases
def test_donated_memory_changes_no_number(case):
    optimizer = case.make(case.rate)
    params = tree_of(zeros=False)
    expected, _ = trajectory(optimizer, params)
    own = fn.tree.map(torch.clone, params)
    state = fn.tree.map(torch.clone, optimizer.init_state(own))
    for step in range(3):
        grads = Box([grads_at(step, own)])
        own, state = step_params(optimizer, grads, state, own, donated=True)
        assert_close(own, expected[step])


@cases
def test_params_of_another_run_are_refused(case):
    optimizer = case.make(case.rate)
    params = tree_of()
    state = optimizer.init_state(params)
    other = {"b": numbers(2)}
    with pytest.raises(ValueError, match=r"b"):
        optimizer.update(params, state, other)
    if fn.tree.leaves(state):
        with pytest.raises((ValueError, TypeError)):
            optimizer.update(params, {"another's": numbers(2)}, params)


SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
NAMES = st.text("abc0123_", min_size=1, max_size=3)
DTYPES = st.sampled_from([F64, torch.float32, torch.bfloat16])
LEAVES = st.builds(lambda shape, dtype: numbers(*shape, dtype=dtype), SHAPES, DTYPES)
DICTS = st.recursive(
    st.dictionaries(NAMES, LEAVES, max_size=3),
    lambda children: st.dictionaries(NAMES, children | LEAVES, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(CASES)), DICTS, st.data())
def test_any_tree_of_params_will_do(name, params, data):
    optimizer = CASES[name].make(CASES[name].rate)
    (after, *_), state = trajectory(optimizer, params, 1)
    assert layout(after) == layout(params)
    assert layout(state) == layout(optimizer.init_state(params))
    paths = list(fn.tree.to_dotted(params))
    if paths:
        chosen = data.draw(st.sets(st.sampled_from(paths), min_size=1))
        grads = grads_at(0, params)
        masked = fn.optimizers.masked(optimizer, sorted(chosen))
        updates, _ = masked.update(grads, masked.init_state(params), params)
        updates, kept = fn.tree.to_dotted(updates), fn.tree.to_dotted(grads)
        assert layout(updates) == layout(kept)
        assert all(updates[path] is kept[path] for path in {*paths} - chosen)


MINIMUM = {
    "quadratic": {"weight": torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=F64)},
    "rosenbrock": torch.ones(2, dtype=F64),
}
CURVATURE = torch.tensor([[1.0, 2.0], [4.0, 0.5]], dtype=F64)


def slopes(params):
    """The gradients of a quadratic, and of Rosenbrock's ``(1 - x)^2 + 100 (y - x^2)^2``."""
    difference = params["quadratic"]["weight"] - MINIMUM["quadratic"]["weight"]
    x, y = params["rosenbrock"].tolist()
    valley = y - x * x
    along = torch.tensor([2 * (x - 1) - 400 * x * valley, 200 * valley], dtype=F64)
    return {"quadratic": {"weight": CURVATURE * difference}, "rosenbrock": along}


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_it_finds_the_minimum_of_a_quadratic_and_of_rosenbrocks_function(case):
    optimizer = case.make(case.converges)
    params = fn.tree.map(torch.zeros_like, MINIMUM)
    state = optimizer.init_state(params)
    for step in range(10_000):
        params, state = step_params(optimizer, Box([slopes(params)]), state, params)
        if step % 50 == 0 and distance(params) < 0.05:
            return
    raise AssertionError(f"it is {distance(params):.3g} away after 10000 steps")


def distance(params):
    """The greatest of a coordinate from the minimum."""
    far = optree.tree_map(lambda one, other: (one - other).abs().max(), params, MINIMUM)
    return float(functools.reduce(torch.maximum, fn.tree.leaves(far)))
